"""The train command: flags, files and sweeps become one configuration; failures are one sentence and an exit status."""

from __future__ import annotations

import importlib.util
import json

import pytest
from stores import make_store
from tcsae.pipeline import main
from tcsae.train.presets import build_config
from tcsae.train.run_folder.record import find_runs, load_run


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return str(make_store(tmp_path_factory.mktemp("cache"), rows=64, context=16, d_model=8))


def arguments(store, tmp_path, *more):
    small = ["--steps", "4", "--batch-size", "60", "--k", "4", "--log-every", "2"]
    return ["train", "--store", store, "--out", str(tmp_path), *small, *more]


def test_the_defaults_train_a_pair_and_say_so(store, tmp_path, capsys):
    assert main(arguments(store, tmp_path)) == 0
    printed = capsys.readouterr()
    assert "trained" in printed.out
    assert [path.name for path in find_runs(tmp_path)] == ["l3-topk4-none-s0", f"l3-topk4-pairwise{weight()}-w5-s0"]
    assert "12 windows of 5" in printed.err
    assert "the studies so far find one thing that it does better than all controls" in " ".join(printed.err.split())
    assert main(arguments(store, tmp_path / "chosen", "--temporal-weight", "0.1")) == 0
    assert "no study" not in capsys.readouterr().err, "it was asked for"
    assert main(arguments(store, tmp_path)) == 0
    assert "already trained" in capsys.readouterr().out


def weight():
    return f"{build_config().temporal.weight:g}"


def test_json_is_one_line_for_machines(store, tmp_path, capsys):
    assert main(arguments(store, tmp_path, "--json", "--quiet", "--no-baseline", "--width", "16")) == 0
    printed = capsys.readouterr()
    facts = json.loads(printed.out)
    assert printed.err == ""
    assert [load_run(path).config["sae"]["width"] for path in facts["runs"]] == [16]
    assert (facts["steps"], facts["tokens"]) == (4, 240)


def test_show_config_is_a_file_that_trains_the_same(store, tmp_path, capsys):
    assert main(arguments(store, tmp_path, "--preset", "paper", "--seed", "3", "--show-config")) == 0
    (tmp_path / "my.toml").write_text(capsys.readouterr().out)
    assert main(["train", "--config", str(tmp_path / "my.toml")]) == 0
    records = [load_run(path) for path in find_runs(tmp_path)]
    assert {record.config["preset"] for record in records} == {"paper"}
    assert {record.seed for record in records} == {3}


def test_sweeps_and_short_counts(store, tmp_path, capsys):
    more = [
        "--sweep",
        "temporal-weight=0,0.1",
        "--sweep",
        "seed=0,1",
        "--tokens",
        "0.3k",
        "--steps",
        "auto",
        "--name",
        "x",
    ]
    assert main(arguments(store, tmp_path, *more)) == 0
    assert [path.name for path in find_runs(tmp_path)] == [
        "x-l3-topk4-none-s0", "x-l3-topk4-none-s1", "x-l3-topk4-pairwise0.1-w5-s0", "x-l3-topk4-pairwise0.1-w5-s1",
    ]  # fmt: skip
    assert {load_run(path).steps for path in find_runs(tmp_path)} == {5}
    assert main(arguments(store, tmp_path, "--sweep", "seed=0,1,2", "--width", "16")) == 0
    assert "s1 and 2 more\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "status", "sentence"),
    [
        (["--k", "0"], 2, "sae.k: Input should be greater than or equal to 1"),
        (["--width", "many"], 2, "'many' is not a count"),
        (
            ["--temporal", "wavelet"],
            2,
            "there is no temporal term 'wavelet': choose one of pairwise, window_mean",
        ),
        (["--preset", "old"], 2, "preset 'old' is unknown"),
        (["--config", "none.toml"], 2, "the configuration none.toml is missing: name a TOML file"),
        (["--sweep", "lr"], 2, "write --sweep KEY=V1,V2"),
        (["--window", "17"], 2, "the store's rows have 16 positions"),
        (["--device", "cuda"], 2, "no usable CUDA device"),
        (["--log", "wandb"], 2, "--log wandb needs the package wandb, which is not installed"),
        (["--store", "nowhere"], 1, "there is no store at nowhere"),
        (["--width", "0"], 2, "--width 0 is nothing to train: give a number, or auto for 8 × d_model"),
        (["--steps", "0"], 2, "--steps 0 is nothing to train"),
        (["--tokens", "0"], 2, "--tokens 0 is nothing to train"),
        (["--sweep", "width=0,16"], 2, "--width 0 is nothing to train"),
        (["--steps", "9" * 25], 2, "more than 64 bits"),
        (["--seed", "9" * 25], 2, "run.seed"),
        (["--data-seed", "-1"], 2, "data.seed"),
        (["--config", "/dev/zero"], 2, "is a device and no regular file: name a TOML file with --config"),
        (["--plugin", "/dev/zero"], 2, "is a device and no regular file: name a Python file with --plugin"),
        (["--name", "../elsewhere"], 2, "'/' and '..' belong into --out"),
        (["--out", "x" * 300], 1, "choose a shorter name"),
        (["--out", "/proc/nowhere"], 1, "cannot make the folder"),
    ],
)
def test_every_failure_is_one_sentence(store, tmp_path, capsys, more, status, sentence):
    if "wandb" in more and importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed")
    assert main(arguments(store, tmp_path, *more)) == status
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert sentence in lines[0]


def test_an_unfinished_store_is_refused_saying_how_to_finish(tmp_path, capsys):
    store = make_store(tmp_path, rows=64, context=16, d_model=8, finish=False)
    assert main(arguments(str(store), tmp_path)) == 1
    assert "finish it with the same extract command" in capsys.readouterr().err
