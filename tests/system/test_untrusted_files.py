"""Files from anywhere: whatever is in them, one sentence and no surprise."""

from __future__ import annotations

import os

import pytest
from tcsae.errors import RunError
from tcsae.system.untrusted_files import read_json, shown


def test_an_object_is_read(tmp_path):
    (tmp_path / "a").write_text('{"λ": [1, -2.5, null, {"b": true}]}', encoding="utf-8")
    assert read_json(tmp_path / "a") == {"λ": [1, -2.5, None, {"b": True}]}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"{", "cannot be read"),
        (b"", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"[]", "holds no JSON object"),
        (b"3", "holds no JSON object"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100 + b"1" + b"}" * 100, "nested too deeply"),
        (b'{"a": NaN}', "not finite"),
        (b'{"a": 1e999}', "not finite"),
        (b'{"a": 99999999999999999999}', "does not fit into 64 bits"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "does not fit into 64 bits"),
        (b'{"a": 1}' + b" " * 100, "more than the 100"),
    ],
)
def test_anything_else_is_one_sentence(tmp_path, content, sentence):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(RunError, match=sentence) as caught:
        read_json(tmp_path / "a", most=100 if b"   " in content else 1 << 20)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path, kind in ((tmp_path / "fifo", "a FIFO"), (tmp_path, "a folder"), ("/dev/zero", "a device")):
        with pytest.raises(RunError, match=f"is {kind} and no regular file"):
            read_json(path)
    for path in (tmp_path / ("x" * 500), "a\0b", tmp_path / "none"):
        with pytest.raises(RunError) as caught:
            read_json(path)
        assert len(str(caught.value)) < 300
    with pytest.raises(RunError, match=r"^nothing here$"):
        read_json(tmp_path / "none", missing="nothing here")


def test_names_from_outside_are_one_printable_line():
    assert shown("a\nb\x1b[0m") == "a\\x0ab\\x1b[0m"
    assert len(shown("x" * 5000)) == 101
