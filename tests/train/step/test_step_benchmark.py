"""The benchmarks of the step still run, and say what they promise."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


def record_of(script: str, *options: str) -> dict:
    command = [sys.executable, str(BENCHMARKS / script), "--threads", "1", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.slow
def test_training_benchmark_trains_all_contenders_to_one_l0() -> None:
    (result,) = record_of("train.py", "--quick")["results"]
    contenders = result["contenders"]
    assert set(contenders) >= {"sparse", "dense", "sparse + temporal", "dense + temporal"}
    assert contenders["sparse"]["l0"] == pytest.approx(contenders["dense"]["l0"], rel=0.02)
    assert all(entry["tokens_per_second"] > 0 for entry in contenders.values())
    assert set(result["peak_mib"]) == {"sparse", "dense", "sparse + temporal", "dense + temporal"}


@pytest.mark.slow
def test_sweep_benchmark_reads_the_store_once_where_runs_read_it_eight_times() -> None:
    results = record_of("sweep.py", "--quick")["results"]
    assert results["small"]["stacks"] == [8]
    for result in results.values():
        assert result["sweep_by_runs"]["bytes"] == pytest.approx(1 / 8, rel=0.05)
        assert result["sweep_by_runs"]["seconds"] > 0


@pytest.mark.slow
def test_candidates_of_every_part_agree() -> None:
    record = record_of(
        "products.py", "--tokens", "64", "--d-model", "16", "--width", "256", "--l0", "8", "--rounds", "2"
    )
    assert "weight gradient" in record["l0 8"]


@pytest.mark.slow
def test_rivals_benchmark_compares_steps_that_compute_the_same() -> None:
    results = record_of("rivals.py", "--quick")["results"]
    assert set(results) == {"groups", "txc", "tfa"}
    assert results["tfa"]["losses"][0] == pytest.approx(results["tfa"]["losses"][1], rel=1e-4)
    assert results["txc"]["k of a window"]["operations"] == 1
    assert results["txc"]["k of a token"]["operations"] == pytest.approx((256 + 4 * 40) / (256 + 4 * 8), rel=1e-3)
    assert all(found["ratio"] > 0 for found in (*results["groups"].values(), *results["txc"].values(), results["tfa"]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_its_benchmark_says_so_in_one_sentence() -> None:
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--with-tests"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 1
    assert done.stdout == ""
    (sentence,) = done.stderr.splitlines()
    assert sentence.startswith("--device cuda was asked for, this machine has no usable CUDA device")
