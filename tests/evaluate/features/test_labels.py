"""Labels from a stand-in server: asked once, kept, shown, and one sentence for whatever the server does."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from coded_runs import coded
from tcsae.errors import RunError, UsageError
from tcsae.evaluate.codes.encode import EncodeConfig, encode_run
from tcsae.evaluate.features import catalogue
from tcsae.evaluate.features.catalogue import open_run
from tcsae.evaluate.features.chat_endpoint import TRIES, ChatEndpoint
from tcsae.evaluate.features.folder import write_features
from tcsae.evaluate.features.known_labels import FILE, kept_labels
from tcsae.evaluate.features.labels import MOST_LETTERS, label_features, prompt, tidy
from tcsae.pipeline import main

EVIL = "</script><img src=x onerror=alert(1)> \u202eevil `x` [a](b)"


class Server:
    """Answers ``replies`` in turn, the last one for ever: a text, a status with a body, or raw bytes."""

    def __init__(self):
        self.replies: list = ["a label"]
        self.asked: list[dict] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append({"path": self.path, "key": self.headers.get("Authorization"), **body})
                reply = outer.replies.pop(0) if len(outer.replies) > 1 else outer.replies[0]
                status, content, headers = reply if isinstance(reply, tuple) else (200, reply, {})
                if isinstance(content, str):
                    content = {"choices": [{"message": {"role": "assistant", "content": content}}]}
                raw = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                for name, value in {"Content-Length": str(len(raw)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(raw)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()


def refusal(status: int, message: str, **headers: str) -> tuple:
    return status, {"error": {"message": message}}, headers


@pytest.fixture
def server():
    running = Server()
    yield running
    running.close()


@pytest.fixture(autouse=True)
def _words(monkeypatch):
    monkeypatch.setattr(catalogue, "TokenTexts", lambda codes: lambda token: f" w{token % 9}")


@pytest.fixture
def run(tmp_path) -> Path:
    folder, _ = coded(tmp_path, rows=40)
    encode_run(EncodeConfig(str(folder)))
    return folder


def endpoint(server: Server, model: str = "m", waits: list | None = None) -> ChatEndpoint:
    return ChatEndpoint(server.url, model, sleep=(waits if waits is not None else []).append)


def active(run: Path, n: int) -> list[int]:
    return [int(one["feature"]) for one in open_run(str(run)).listed("density", n)]


def test_the_command_asks_with_the_key_and_keeps_the_answers(run, server, monkeypatch, capsys):
    monkeypatch.setenv("TCSAE_LABEL_KEY", "sk-1")
    words = ["features", str(run), "--n", "3", "--label", "--endpoint", server.url + "/", "--label-model", "qwen"]
    assert main([*words, "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["asked"] == len(server.asked) == 3
    assert f"3 of 3 features are sent to {server.url} (qwen): about " in err
    assert {(one["path"], one["key"], one["model"]) for one in server.asked} == {
        ("/v1/chat/completions", "Bearer sk-1", "qwen")
    }
    (view,) = open_run(str(run)).views(active(run, 1))
    assert server.asked[0]["messages"] == prompt(view)
    strongest = view.card.passages[0]
    assert f"<<{strongest.tokens[strongest.peak]}" in server.asked[0]["messages"][1]["content"].replace(">><<", "")
    assert main([*words, "--json"]) == 0  # what was asked is not asked again
    assert json.loads(capsys.readouterr().out) | {"path": ""} == {"path": "", "asked": 0, "kept": 3, "silent": 0}
    assert len(server.asked) == 3
    assert main([*words[:-1], "other"]) == 0  # but of another model
    assert len(server.asked) == 6


def test_labels_are_shown_and_what_is_in_them_is_not_understood(run, server, tmp_path, capsys):
    server.replies = [EVIL]
    first, *_ = active(run, 1)
    label_features(open_run(str(run)), [first], endpoint(server))
    shown = "</script><img src=x onerror=alert(1)> ‹U+202E›evil `x` [a](b"
    assert open_run(str(run)).labels == {first: shown + ")"}
    assert main(["features", str(run), "--n", "1"]) == 0
    assert "<img src=x onerror=alert(1)>" in " ".join(capsys.readouterr().out.split())
    assert main(["features", str(run), "--feature", str(first)]) == 0
    assert "label: </script>" in capsys.readouterr().out
    assert main(["features", str(run), "--search", "ONERROR", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["labelled"] == [first]
    write_features([str(run)], out=str(tmp_path / "page"))
    cards = json.loads((tmp_path / f"page/data/0/f/{first // 16}.js").read_text().split(",", 1)[1][:-3])
    assert cards["f"][first % 16]["label"] == shown + ")"
    words = json.loads((tmp_path / "page/data/0/w/on.js").read_text().split(",", 1)[1][:-3])
    assert ["onerror", [first, 100]] in words
    for file in (tmp_path / "page").rglob("*.html"):
        assert "onerror" not in file.read_text()  # text enters the page through textContent alone


def test_a_busy_server_is_asked_again_later(run, server):
    server.replies = [refusal(429, "slow down", **{"Retry-After": "7"}), refusal(503, "loading"), "fine"]
    waits: list[float] = []
    label_features(open_run(str(run)), active(run, 1), endpoint(server, waits=waits))
    assert waits == [7, 14]
    assert list(open_run(str(run)).labels.values()) == ["fine"]


@pytest.mark.parametrize(("reply", "sentence", "tries"), [
    (refusal(401, "no such key"), r"refuses the key \(no such key\): set TCSAE_LABEL_KEY to one that may use m$", 1),
    (refusal(404, "no model m"), r"has no /chat/completions or no model m \(no model m\): look at", 1),
    (refusal(400, "max_tokens\nis wrong"), r"refuses the question with status 400 \(max_tokens\\x0ais wrong\)$", 1),
    (refusal(429, "slow down"), r"gave no answer in 5 tries \(status 429, slow down\): go on later", TRIES),
    ((500, b"<html>", {}), r"gave no answer in 5 tries \(status 500, Internal Server Error\)", TRIES),
    ((302, b"", {"Location": "http://127.0.0.1:9/"}), r"refuses the question with status 302", 1),
    ((200, b"not json", {}), r"gave no answer with a text in it \(not json\)", 1),
    ((200, b'{"choices": []}', {}), r"gave no answer with a text in it", 1),
    ((200, {"choices": [{"message": {"content": None}}]}, {}), r"gave no answer with a text in it", 1),
])  # fmt: skip
def test_what_the_server_refuses_is_one_sentence_and_what_it_gave_is_kept(run, server, reply, sentence, tries):
    server.replies = ["first", reply]
    with pytest.raises(RunError, match=sentence) as caught:
        label_features(open_run(str(run)), active(run, 3), endpoint(server))
    assert "\n" not in str(caught.value)
    assert len(server.asked) == 1 + tries
    assert list(open_run(str(run)).labels.values()) == ["first"]
    server.replies = ["later"]
    done = label_features(open_run(str(run)), active(run, 3), endpoint(server))
    assert (done.asked, done.kept) == (2, 1)


def test_a_server_that_is_not_there_is_one_sentence(run):
    nowhere = ChatEndpoint("http://127.0.0.1:9/v1", "m", sleep=lambda _: None)
    with pytest.raises(RunError, match=r"9/v1 gave no answer in 5 tries \(Connection refused\)"):
        label_features(open_run(str(run)), active(run, 1), nowhere)


@pytest.mark.parametrize(("words", "sentence"), [
    (["--label"], "--label needs the address and the name of a model: --endpoint URL --label-model NAME"),
    (["--endpoint", "http://x"], "--endpoint and --label-model are for --label"),
    (["--label", "--endpoint", "file:///etc/passwd", "--label-model", "m"], "is no address"),
    (["--label", "--endpoint", "http://x", "--label-model", "m", "--html"], "--label asks for labels alone"),
    (["--label", "--endpoint", "http://x", "--label-model", "m", "--feature", "999"], "has no feature 999"),
])  # fmt: skip
def test_bad_input_is_refused(run, capsys, words, sentence):
    assert main(["features", str(run), *words]) == 2
    assert sentence in capsys.readouterr().err


def test_answers_become_one_short_line():
    assert tidy('<think>hmm\nso "x"</think>\n "Years  in\ndates" ') == "Years in dates"
    assert tidy("<think>cut off") == "unclear"
    assert len(tidy("long " * 100)) <= MOST_LETTERS
    with pytest.raises(UsageError, match="holds characters that no key has"):
        ChatEndpoint("http://x", "m", "a\nb")


def test_labels_of_another_sae_and_damaged_ones_are_left_out(run, server):
    label_features(open_run(str(run)), active(run, 1), endpoint(server))
    file = run / "codes.zarr" / FILE
    codes = open_run(str(run)).codes
    kept = json.loads(file.read_text())
    for damage in (
        "{",
        "[]",
        json.dumps(kept | {"weights": "other"}),
        json.dumps(kept | {"labels": {"x": 1, "3": {}}}),
    ):
        file.write_text(damage)
        assert kept_labels(codes) == {}
    file.write_text(json.dumps(kept))
    assert len(kept_labels(codes)) == 1
