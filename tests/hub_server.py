"""A small stand-in for the Hugging Face hub on loopback: repositories in memory, made, written and read as
huggingface_hub does it, for one user ``me`` with the token ``hf_mine``.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

TOKEN, COMMIT = "hf_mine", "a" * 40
Repositories = dict[str, dict[str, bytes]]
"""``models/me/name`` or ``datasets/me/name`` → path → content."""


class _Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    repositories: Repositories
    private: set[str]

    def log_message(self, *_: Any) -> None:
        pass

    def _send(self, status: int, body: Any = None, headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body if body is not None else {}).encode()
        self.send_response(status)
        headers = {"Content-Length": str(len(content)), **(headers or {})}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _refuse(self, status: int, code: str, message: str) -> None:
        self._send(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message})

    def do_POST(self) -> None:
        path = urlsplit(self.path).path
        raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if path == "/api/validate-yaml":
            return self._validate(json.loads(raw)["content"])
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._refuse(401, "", "Invalid username or password.")
        if path == "/api/repos/create":
            return self._create(json.loads(raw))
        if not (
            found := re.fullmatch(r"/api/((?:models|datasets)/[^/]+/[^/]+)/(preupload|commit|paths-info)/.*", path)
        ):
            return self._refuse(404, "", f"no such address: {path}")
        name, what = found.groups()
        if name not in self.repositories:
            return self._refuse(404, "RepoNotFound", "Repository not found")
        files = self.repositories[name]
        if what == "preupload":
            paths = [file["path"] for file in json.loads(raw)["files"]]
            modes = [{"path": each, "uploadMode": "regular", "shouldIgnore": False} for each in paths]
            return self._send(200, {"files": modes})
        if what == "commit":
            for line in map(json.loads, raw.splitlines()):
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            page = f"http://{self.headers['Host']}/{name}/commit/{COMMIT}"
            return self._send(200, {"commitUrl": page, "commitOid": COMMIT, "hookOutput": ""})
        return self._send(404)

    def _create(self, asked: dict[str, Any]) -> None:
        owner = asked.get("organization") or "me"
        if owner != "me":
            return self._refuse(403, "", f"You don't have the rights to create a repo under the namespace {owner}")
        name = f"{asked.get('type') or 'model'}s/me/{asked['name']}"
        page = f"http://{self.headers['Host']}/{name.removeprefix('models/')}"
        there = name in self.repositories
        self.repositories.setdefault(name, {})
        if (asked.get("private") or asked.get("visibility") == "private") and not there:
            self.private.add(name)
        return self._send(409 if there else 200, {"url": page, "error": "You already created this repo"})

    def _validate(self, card: str) -> None:
        base = re.search(r'^base_model: "?([^"\n]*)"?$', card, re.MULTILINE)
        if base and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base[1]):
            return self._send(400, {"errors": [{"message": f'"base_model" {base[1]} is not valid'}], "warnings": []})
        return self._send(200, {"errors": [], "warnings": []})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if found := re.fullmatch(r"/api/((?:models|datasets)/[^/]+/[^/]+)(?:/(revision|tree)/[^/]+)?", path):
            files = self.repositories.get(found[1])
            if files is None:
                return self._refuse(404, "RepoNotFound", "Repository not found")
            if found[2] == "tree":
                tree = [
                    {"type": "file", "path": each, "size": len(body), "oid": _etag(body)}
                    for each, body in files.items()
                ]
                return self._send(200, tree)
            siblings = [{"rfilename": each} for each in files]
            info = {"id": found[1].split("/", 1)[1], "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}
            return self._send(200, info | {"downloads": 0, "likes": 0, "disabled": False, "gated": False})
        if found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            body = self.repositories.get(f"{found[1] or 'models/'}{found[2]}", {}).get(found[3])
            if body is None:
                return self._refuse(404, "EntryNotFound", "Entry not found")
            return self._send(200, body, {"ETag": f'"{_etag(body)}"', "X-Repo-Commit": COMMIT})
        return self._refuse(404, "", f"no such address: {path}")


def _etag(body: bytes) -> str:
    return hashlib.sha1(body, usedforsecurity=False).hexdigest()


class HubOfTests(NamedTuple):
    """Its address, what it holds, and which of its repositories are private."""

    url: str
    repositories: Repositories
    private: set[str]


@contextmanager
def hub_server() -> Iterator[HubOfTests]:
    """One that runs."""
    handler = type("Hub", (_Hub,), {"repositories": {}, "private": set()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield HubOfTests(f"http://127.0.0.1:{server.server_address[1]}", handler.repositories, handler.private)
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def hub_of_tests(monkeypatch: Any, cache: Path) -> Iterator[HubOfTests]:
    """The same, and huggingface_hub asks it, logged in as ``me``."""
    from huggingface_hub import constants

    with hub_server() as hub:
        url = hub.url
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub
