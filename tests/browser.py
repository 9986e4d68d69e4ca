"""A real browser for tests, over the DevTools protocol; tests that use it are skipped without a Chromium."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
from tornado.websocket import websocket_connect

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
CHROME = next((found for name in NAMES if (found := shutil.which(name))), None)
needs_browser = pytest.mark.skipif(CHROME is None, reason="no Chromium here to open the page in")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--no-first-run", "--remote-debugging-port=0",
)  # fmt: skip


class Tab:
    """One tab: commands and their answers, and the events that came meanwhile."""

    def __init__(self, loop, socket):
        self._loop, self._socket, self._last = loop, socket, 0
        self.events: list[dict] = []
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method, **parameters):
        return self._loop.run_until_complete(asyncio.wait_for(self._send(method, parameters), 60))

    async def _send(self, method, parameters):
        self._last += 1
        await self._socket.write_message(json.dumps({"id": self._last, "method": method, "params": parameters}))
        while True:
            answer = json.loads(await self._socket.read_message())
            if answer.get("id") == self._last:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def wait_for(self, event):
        self._loop.run_until_complete(asyncio.wait_for(self._wait_for(event), 30))

    async def _wait_for(self, event):
        while not self.said(event):
            self.events.append(json.loads(await self._socket.read_message()))

    def js(self, expression):
        found = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, expression):
        deadline = time.monotonic() + 30
        while not self.js(expression):
            assert time.monotonic() < deadline, expression
            time.sleep(0.05)

    def open(self, address):
        self.send("Page.navigate", url="about:blank")
        self.events.clear()
        self.send("Page.navigate", url=address)
        self.until(f"document.readyState === 'complete' && location.href === {json.dumps(address)}")

    def click(self, selector):
        element = f"document.querySelector({json.dumps(selector)})"
        place = f"(r => [r.x + r.width / 2, r.y + r.height / 2])({element}.getBoundingClientRect())"
        self.js(f"{element}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
        before, (x, y) = None, self.js(place)
        while before != (x, y):  # the page may still be scrolling to a link of its own
            before = x, y
            time.sleep(0.1)
            self.js(f"{element}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
            x, y = self.js(place)
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def put(self, selector, value, event):
        element = f"document.querySelector({json.dumps(selector)})"
        self.js(f"(e => {{ e.value = {json.dumps(value)}; e.dispatchEvent(new Event('{event}')); }})({element})")

    def press(self, key):
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key)

    def width(self, pixels):
        self.send(
            "Emulation.setDeviceMetricsOverride", width=pixels, height=900, deviceScaleFactor=1, mobile=pixels < 500
        )

    def said(self, *methods):
        return [event for event in self.events if event["method"] in methods]


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with browsing(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@contextmanager
def browsing(profile: Path):
    """A tab of a browser of its own, which ends with the block."""
    process = subprocess.Popen(
        [CHROME, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    loop = asyncio.new_event_loop()
    socket = None
    try:
        port = _port(profile / "DevToolsActivePort", process)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=30) as answer:
            target = next(t for t in json.load(answer) if t["type"] == "page")
        socket = loop.run_until_complete(_connect(target["webSocketDebuggerUrl"]))
        yield Tab(loop, socket)
    finally:
        if socket is not None:
            loop.run_until_complete(_close(socket))
        process.terminate()
        process.wait(30)
        loop.close()


def _port(file: Path, process) -> int:
    deadline = time.monotonic() + 60
    while not (file.exists() and file.read_text().strip()):
        assert process.poll() is None, "the browser ended before it began"
        assert time.monotonic() < deadline, "the browser did not start"
        time.sleep(0.05)
    return int(file.read_text().split()[0])


async def _connect(url):
    return await websocket_connect(url, max_message_size=1 << 28)


async def _close(socket):
    socket.close()
    while await socket.read_message() is not None:
        pass
