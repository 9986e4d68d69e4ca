"""Conversations: rows of messages, put into words by the tokenizer's chat template, and whose each token is.

A token belongs to the message in whose content it begins. What the template adds (headers, ends of turns, a system
prompt of its own) belongs to nobody. Special tokens that a message spells stay letters; those of the template are
special.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, NamedTuple

import numpy as np

from ...cache.format.layout import ROLES
from ...errors import TextError
from ..model.hub import first_line

COLUMNS = ("messages", "conversations")
ROLE_SHIFT = 27  # a token id that carries a role has the role's number above this bit; no vocabulary is as large
_NAMES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
_NAMES |= {"developer": "system", "function": "tool", "observation": "tool", "ipython": "tool"}
# For templates that print today's date: the same text on every day, whatever the format. It hides the function.
_TODAY = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}"


@dataclass(frozen=True)
class Conversation:
    """Messages in order, each with its role (one of ``ROLES``) and its content."""

    messages: tuple[tuple[str, str], ...]

    @property
    def key(self) -> str:
        """One text that identifies all of it."""
        return "\x1e".join(f"{role}\x1f{content}" for role, content in self.messages)


def conversation_of(value: Any, where: str) -> Conversation:
    """The messages of one row, as ``role``/``content`` or ``from``/``value``.

    Raises:
        TextError: it is something else; ``where`` begins the sentence.

    """
    if isinstance(value, Mapping) and all(isinstance(part, Sequence) for part in value.values()):
        value = [dict(zip(value, each, strict=True)) for each in zip(*value.values(), strict=True)]  # a dict of lists
    if value is None:
        return Conversation(())
    if not isinstance(value, list) or not all(isinstance(message, Mapping) for message in value):
        raise TextError(
            f"{where} holds no messages: --chat-template wants lists of role and content (or from and value)"
        )
    return Conversation(tuple(_message(message, where) for message in value))


def _message(message: Mapping[str, Any], where: str) -> tuple[str, str]:
    role = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    if isinstance(content, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text") or "") for part in content)
    name = _NAMES.get(str(role).lower(), str(role).lower())
    if name not in ROLES:
        raise TextError(f"{where} has a message of the role {role!r}: roles are {', '.join(ROLES)}")
    if content is not None and not isinstance(content, str):
        raise TextError(f"{where} has a message whose content is no text but {type(content).__name__}")
    return name, content or ""


class _Rendered(NamedTuple):
    """A conversation in words: where in ``text`` each message's content lies, and its role's number."""

    text: str
    spans: list[tuple[int, int, int]]


class ChatTemplate:
    """The chat template of a model's tokenizer.

    Raises:
        TextError: the tokenizer has none, or does not say where in a text its tokens lie.

    """

    def __init__(self, tokenizer: Any, model: str):
        if not getattr(tokenizer, "chat_template", None):
            raise TextError(
                f"the tokenizer of {model} has no chat template, so that it cannot put messages into words: give a "
                "model that was trained on conversations, or text without --chat-template"
            )
        if not getattr(tokenizer, "is_fast", False):
            raise TextError(
                f"the tokenizer of {model} is written in Python and does not tell which characters a token covers, "
                "which --chat-template needs: put the messages into words yourself"
            )
        self._tokenizer, self._model = tokenizer, model
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        special = {str(token) for token in added if token.special} | set(tokenizer.all_special_tokens)
        self._special = re.compile("|".join(re.escape(s) for s in sorted(special, key=len, reverse=True)) or r"(?!)")

    @property
    def sha256(self) -> str:
        """Of the template's text."""
        return sha256(str(self._tokenizer.get_chat_template()).encode()).hexdigest()

    def tokens(self, conversation: Conversation, where: str) -> np.ndarray:
        """Token ids, int32, with the number of each one's role (1 + its place in ``ROLES``) above ``ROLE_SHIFT``.

        The BOS in front is left out, since every row gets one.

        Raises:
            TextError: the template refuses the messages, or changes them.

        """
        if not conversation.messages:
            return np.empty(0, np.int32)
        shown = self._render(conversation, where)
        if any(self._special.search(content) for _, content in conversation.messages):
            self._check_apart(conversation, where)
            ids, starts = self._apart(shown)
        else:
            ids, starts = self._together(shown.text)
        roles = np.zeros(len(ids), np.int32)
        for begin, end, role in shown.spans:
            roles[(starts >= begin) & (starts < end)] = role
        found = ids | roles << ROLE_SHIFT
        return found[1:] if len(found) and found[0] == self._tokenizer.bos_token_id else found

    def _render(self, conversation: Conversation, where: str) -> _Rendered:
        """The text, and where the contents are: found by rendering marks in their place and comparing."""
        roles = [role for role, _ in conversation.messages]
        text = self._apply(conversation.messages, where)
        marks = [f"\ue000{number}\ue001" for number in range(len(roles))]
        marked = self._apply(tuple(zip(roles, marks, strict=True)), where)
        parts = re.split("\ue000(\\d+)\ue001", marked)
        fixed, order = parts[::2], [int(number) for number in parts[1::2]]
        if sorted(order) == list(range(len(roles))) and text.startswith(fixed[0]):
            at, spans = len(fixed[0]), []
            for number, after in zip(order, fixed[1:], strict=True):
                role, content = conversation.messages[number]
                fits = (c for c in (content, content.strip(), content.rstrip(), content.lstrip()))
                kept = next((c for c in fits if text.startswith(c + after, at)), None)
                if kept is None:
                    break
                spans.append((at, at + len(kept), 1 + ROLES.index(role)))
                at += len(kept) + len(after)
            if len(spans) == len(roles) and at == len(text):
                return _Rendered(text, spans)
        raise TextError(
            f"the chat template of {self._model} does not show every message of {where} once and as it is, so that "
            "nobody can say whose each token is: put the messages into words yourself"
        )

    def _apply(self, messages: tuple[tuple[str, str], ...], where: str) -> str:
        from jinja2.exceptions import TemplateError

        rows = [{"role": role, "content": content} for role, content in messages]
        try:
            template = self._tokenizer.get_chat_template()
            dated = _TODAY + template if "strftime_now" in template else template
            return self._tokenizer.apply_chat_template(rows, chat_template=dated, tokenize=False)
        except (TemplateError, TypeError, ValueError) as refusal:
            raise TextError(f"the chat template of {self._model} refuses {where}: {first_line(refusal)}") from refusal

    def _together(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        return self._encoded(text, 0, split_special_tokens=False)

    def _apart(self, shown: _Rendered) -> tuple[np.ndarray, np.ndarray]:
        """Special tokens of the template, and the text between them, each by itself."""
        found, at = [], 0
        for special in self._special.finditer(shown.text):
            begin, end = special.span()
            if any(begin < b and a < end for a, b, _ in shown.spans):
                continue  # a message spells it
            found.append(self._encoded(shown.text[at:begin], at, split_special_tokens=True))
            ids = [self._tokenizer.convert_tokens_to_ids(special.group())]
            found.append((np.asarray(ids, np.int32), np.asarray([begin])))
            at = end
        found.append(self._encoded(shown.text[at:], at, split_special_tokens=True))
        return np.concatenate([ids for ids, _ in found]), np.concatenate([starts for _, starts in found])

    def _check_apart(self, conversation: Conversation, where: str) -> None:
        """Check that this tokenizer allows it, on the same messages without the special tokens that they spell."""
        plain = Conversation(tuple((role, self._special.sub("", text)) for role, text in conversation.messages))
        shown = self._render(plain, where)
        if not np.array_equal(self._apart(shown)[0], self._together(shown.text)[0]):
            raise TextError(
                f"a message of {where} spells a special token of {self._model}, whose tokenizer cannot be kept from "
                "taking it for one: take it out of the text"
            )

    def _encoded(self, text: str, at: int, *, split_special_tokens: bool) -> tuple[np.ndarray, np.ndarray]:
        """Token ids, and where each begins in a text in which this one begins at character ``at``."""
        encoded = self._tokenizer(
            text,
            add_special_tokens=False,
            split_special_tokens=split_special_tokens,
            return_offsets_mapping=True,
            verbose=False,
        )
        starts = np.asarray(encoded["offset_mapping"], np.int64).reshape(-1, 2)[:, 0] + at
        return np.asarray(encoded["input_ids"], np.int32), starts
