"""Questions to a language model behind an OpenAI-compatible address: one at a time, repeated while it is busy."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from ...console import note
from ...errors import RunError, UsageError
from ...system.untrusted_files import parse_json, reason, shown

KEY_VARIABLE = "TCSAE_LABEL_KEY"
TRIES, FIRST_WAIT, LONGEST_WAIT = 5, 1.0, 60.0  # seconds, doubled after each try
_TIMEOUT = 300.0  # a model on a small machine may take minutes for an answer
_MOST_BYTES = 1 << 20
_BUSY = (408, 409, 429, 500, 502, 503, 504)


class ChatEndpoint:
    """``POST URL/chat/completions``, as OpenAI, vLLM, llama.cpp, Ollama and many others answer it.

    Args:
        url: up to and without ``/chat/completions``: ``http://localhost:8000/v1``.
        model: the name that the server knows it by.
        key: sent as a bearer token; empty: none is sent.
        sleep: waits between tries.

    Raises:
        UsageError: no address of that kind.

    """

    def __init__(self, url: str, model: str, key: str = "", *, sleep: Any = time.sleep):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise UsageError(f"--endpoint {shown(url)} is no address: write http://localhost:8000/v1, say")
        if not key.isascii() or not key.isprintable():
            raise UsageError(f"the key in {KEY_VARIABLE} holds characters that no key has: set it again")
        self.url, self.model, self._key, self._sleep = url.rstrip("/"), model, key, sleep
        # A redirect would take the key to an address that nobody named.
        self._opener = urllib.request.build_opener(_NoRedirect)

    def ask(self, messages: Sequence[dict[str, str]], *, max_tokens: int) -> str:
        """The answer's text.

        Raises:
            RunError: refused, out of reach or busy after several tries, or no answer of that kind.

        """
        body = {"model": self.model, "messages": list(messages), "max_tokens": max_tokens, "temperature": 0}
        raw = self._post(json.dumps(body).encode())
        try:
            answer = parse_json(raw)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError):
            answer = None
        if not isinstance(answer, str) or not answer.strip():
            raise RunError(
                f"{self.url} gave no answer with a text in it ({shown(raw.decode(errors='replace'), 80)}): is it an "
                "OpenAI-compatible address, and does the model answer within its limit of tokens?"
            )
        return answer

    def _post(self, body: bytes) -> bytes:
        wait, problem = FIRST_WAIT, ""
        for number in range(1, TRIES + 1):
            try:
                return self._once(body)
            except urllib.error.HTTPError as refused:
                problem, asked = self._refused(refused)
                wait = min(max(wait, asked), LONGEST_WAIT)
            except (OSError, http.client.HTTPException) as failure:  # URLError is an OSError
                cause = getattr(failure, "reason", None)  # of a URLError
                problem = reason(cause if isinstance(cause, BaseException) else failure)
            if number < TRIES:
                note(f"{self.url}: {problem}; again in {wait:g} s")
                self._sleep(wait)
                wait = min(2 * wait, LONGEST_WAIT)
        raise RunError(f"{self.url} gave no answer in {TRIES} tries ({problem}): go on later with the same command")

    def _once(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        request = urllib.request.Request(f"{self.url}/chat/completions", body, headers)  # noqa: S310 - http(s) alone
        with self._opener.open(request, timeout=_TIMEOUT) as answer:
            return answer.read(_MOST_BYTES)

    def _refused(self, refused: urllib.error.HTTPError) -> tuple[str, float]:
        """What a busy server says, and how long it asks to wait.

        Raises:
            RunError: it is not busy but refuses.

        """
        said = _message(refused)
        if refused.code in (401, 403):
            raise RunError(
                f"{self.url} refuses the key ({said}): set {KEY_VARIABLE} to one that may use {shown(self.model)}"
            ) from None
        if refused.code == 404:
            raise RunError(
                f"{self.url} has no /chat/completions or no model {shown(self.model)} ({said}): look at --endpoint and "
                "--label-model"
            ) from None
        if refused.code not in _BUSY:
            raise RunError(f"{self.url} refuses the question with status {refused.code} ({said})") from None
        try:
            asked = float(refused.headers.get("Retry-After", "0"))
        except ValueError:  # a date
            asked = 0.0
        return f"status {refused.code}, {said}", asked


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """No address but the one that was given."""
        return


def _message(refused: urllib.error.HTTPError) -> str:
    """What the server says of it, as OpenAI does in ``error.message``."""
    try:
        raw = refused.read(_MOST_BYTES)
        found = parse_json(raw)
        error = found.get("error", found) if isinstance(found, dict) else found
        said = error.get("message", error) if isinstance(error, dict) else error
    except (ValueError, OSError):
        said = refused.reason
    return shown(str(said).strip() or refused.reason, 160)
