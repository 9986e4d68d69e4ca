"""Real SAE and run folders, and what can be wrong with them: bytes, JSON values, headers and archives.

Archives and headers are changed inside and put together again with right sums, so that what is read behind the first
check is changed, too.
"""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from saes import random_sae
from stores import make_manifest
from tcsae.evaluate.config import EvaluateConfig
from tcsae.evaluate.subjects import gather_subjects
from tcsae.train.formats.registry import FORMATS
from tcsae.train.run_folder.record import RECORD, RunRecord
from tcsae.train.sae.activation import Activation

NASTY: list[Any] = [
    None, True, False, -1, 0, 1, 2, 1 << 31, 1 << 62, 1 << 64, 1 << 200, -(1 << 63), 0.5, 1e308, float("nan"),
    float("inf"), "", "0", "x" * 500, "a\nb\x1b[2J", "../../etc/passwd", "λ", "\ud800", [], [[]], {}, {"a": {}},
    [0] * 100, "relu", "topk", "jumprelu", "gated", "tcsae:sae", "tcsae:gated", "batchtopk", "AutoEncoderTopK",
]  # fmt: skip


def corpus(folder: Path) -> list[Path]:
    """One folder of every kind that is read."""
    saelens, other = FORMATS.get("saelens"), FORMATS.get("dictionary-learning")
    for kind in (Activation("relu"), Activation("topk", k=3), Activation("jumprelu")):
        saelens.write(random_sae(kind), folder / f"saelens-{kind.kind}")
        other.write(random_sae(kind), folder / f"other-{kind.kind}")
    arrays = {name: value.numpy() for name, value in random_sae(Activation("jumprelu")).state_dict().items()}
    (folder / "gemma").mkdir()
    np.savez_compressed(folder / "gemma/params.npz", **arrays)
    for name in ("run", "run-of-before"):
        random_sae(d=8).save(folder / name)
    record = RunRecord(
        name="run", role="tc", twin=None, layer=3, store="cache/l3.zarr", store_fingerprint="f", store_rows=4,
        store_manifest=make_manifest().model_dump(mode="json"), config={"sae": {"activation": "relu"}},
        input_scale=1.0, seed=0, steps=5,
        planned_steps=5, tokens=10, finished=True, metrics={"l0": 3.0}, versions={}, created="2026-01-01",
    )  # fmt: skip
    record.save(folder / "run")
    record.save(folder / "run-of-before")  # without hashes, so that what is wrong with it is looked at
    plain = json.loads((folder / "run-of-before" / RECORD).read_text())
    del plain["hashes"]
    (folder / "run-of-before" / RECORD).write_text(json.dumps(plain))
    return sorted(folder.iterdir())


def mutated(original: Path, target: Path, dice: random.Random) -> str:
    """Copy a folder and change something in it, once or a few times; returns what, in words."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(original, target)
    said = []
    for _ in range(dice.choice([1, 1, 1, 2, 4])):
        there = sorted(target.iterdir())
        if not there:
            break
        file = dice.choice(there)
        ways: list[Callable[[Path, random.Random], None]] = [_bytes, _bytes, _place]
        inside = {".json": _json, ".safetensors": _header, ".pt": _archive, ".npz": _archive}.get(file.suffix)
        if inside is not None:
            ways += [inside] * 5
        way = dice.choice(ways)
        said.append(f"{file.name} {way.__name__.strip('_')}")
        if file.is_file() and not file.is_symlink() and file.stat().st_size < 1 << 24:
            try:
                way(file, dice)
            except Exception:
                _bytes(file, dice)  # an earlier change left nothing that could be taken apart
    return f"{original.name}: {', '.join(said)}"


def outcome(folder: Path) -> str:
    """Read it as ``evaluate`` does: "read", or "refused" in one sentence; anything else is raised."""
    wanted = {"runs": (str(folder),)} if (folder / RECORD).exists() else {"saes": (str(folder),), "layers": (3,)}
    _, failures = gather_subjects(EvaluateConfig(**wanted, model="a-model"))
    for sentence in (failure.message for failure in failures):
        if "\n" in sentence or not 10 < len(sentence) < 1500 or not sentence.isprintable():
            raise AssertionError(f"no sentence: {sentence!r}")
    return "refused" if failures else "read"


def _bytes(file: Path, dice: random.Random) -> None:
    content = bytearray(file.read_bytes())
    at, length = dice.randrange(len(content) + 1), dice.choice([1, 1, 4, 64, 1000])
    way = dice.randrange(7)
    if way == 0 and content:
        content[at % len(content)] ^= 1 << dice.randrange(8)
    elif way == 1:
        del content[at:]
    elif way == 2:
        del content[at : at + length]
    elif way == 3:
        content[at : at + length] = bytes(length)
    elif way == 4:
        content[at:at] = bytes(dice.randrange(256) for _ in range(length))
    elif way == 5:
        content[at : at + length] = b"\xff" * length
    else:
        content = bytearray(dice.choice([b"", b"PK", b"\x80\x02.", b"[" * 100_000, b'{"a":' * 50_000, bytes(4096)]))
    file.write_bytes(content)


def _place(file: Path, dice: random.Random) -> None:
    """Something else lies in the file's place."""
    file.unlink()
    way = dice.randrange(6)
    if way == 0:
        os.mkfifo(file)
    elif way == 1:
        file.mkdir()
    elif way == 2:
        file.symlink_to(file)
    elif way == 3:
        file.symlink_to("/dev/zero")
    elif way == 4:
        with file.open("wb") as sparse:
            sparse.truncate(1 << 40)  # a terabyte of nothing


def _json(file: Path, dice: random.Random) -> None:
    found = json.loads(file.read_text(encoding="utf-8"))
    _change(found, dice)
    file.write_text(json.dumps(found), encoding="utf-8", errors="surrogatepass")


def _change(found: Any, dice: random.Random) -> None:
    """Replace, remove or add a value somewhere inside."""
    if not isinstance(found, dict | list) or not found:
        return
    keys = list(found) if isinstance(found, dict) else list(range(len(found)))
    key = dice.choice(keys)
    if isinstance(found[key], dict | list) and found[key] and dice.random() < 0.7:
        _change(found[key], dice)
    elif dice.random() < 0.15:
        del found[key]
    elif dice.random() < 0.1 and isinstance(found, dict):
        found[str(dice.choice(NASTY))] = dice.choice(NASTY)
    else:
        found[key] = dice.choice(NASTY)


def _header(file: Path, dice: random.Random) -> None:
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    _change(header, dice)
    raw = json.dumps(header).encode("utf-8", "surrogatepass")
    size = len(raw) if dice.random() < 0.9 else dice.choice([0, 1, len(raw) - 1, 1 << 40, (1 << 64) - 1])
    file.write_bytes(size.to_bytes(8, "little") + raw + content[8 + length :])


def _archive(file: Path, dice: random.Random) -> None:
    with zipfile.ZipFile(file) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
        stored = all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())
    name = dice.choice([*members, *(each for each in members if each.endswith("data.pkl"))])
    content, way = bytearray(members[name]), dice.randrange(6)
    if way == 0:
        del members[name]
    elif way == 1:
        members[name] = members[dice.choice(list(members))]
    elif way == 2 and content.startswith(b"\x93NUMPY"):
        shape = dice.choice(["(1099511627776, 2)", "(-1, 2)", "()", "(6,)", "(6, 10" + ", 1" * 5000 + ")"])
        kind = dice.choice(["<f4", "|O", "<f8", "<c16", "<U5", "<M8[s]"])
        stream = io.BytesIO()
        text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}".encode() + b"\n"
        stream.write(b"\x93NUMPY\x01\x00" + (len(text) & 0xFFFF).to_bytes(2, "little") + text)
        members[name] = stream.getvalue() + bytes(content[128:])
    else:
        for _ in range(dice.choice([1, 1, 3])):
            at = dice.randrange(len(content) + 1)
            if dice.random() < 0.5 and at < len(content):
                content[at] = dice.randrange(256)
            else:
                content[at : at + dice.choice([0, 1, 8])] = dice.choice(
                    [b"", b"\x00", b"\xff" * 8, b"0", b"j\xff\xff\xff\x7f"]
                )
        members[name] = bytes(content)
    buffer = io.BytesIO()
    compression = zipfile.ZIP_STORED if stored and dice.random() < 0.95 else zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for each, data in members.items():
            archive.writestr(each, data)
    file.write_bytes(buffer.getvalue())
