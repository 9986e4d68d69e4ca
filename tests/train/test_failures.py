"""What goes wrong in training is one sentence, and doing as it says helps."""

from __future__ import annotations

import pytest
from stores import make_store
from tcsae.pipeline import main
from tcsae.train.loop.alarms import collapse


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("cache"), rows=64, context=16, d_model=8, documents=12)


def trained(store, out, capsys, *more):
    """Status and error of the command line."""
    small = ["--batch-size", "60", "--k", "4", "--width", "16", "--device", "cpu", "--dtype", "float32"]
    status = main(["--quiet", "train", "--store", str(store), "--out", str(out), *small, *more])
    return status, capsys.readouterr().err


def test_rows_without_a_window_want_a_smaller_one(store, tmp_path, capsys):
    status, error = trained(store, tmp_path, capsys, "--steps", "4", "--window", "16")  # BOS is one of the 16
    assert status == 2
    assert "holds no 16 consecutive tokens of one document" in error
    assert error.endswith("give a smaller --window\n")
    status, error = trained(store, tmp_path, capsys, "--steps", "4", "--window", "15")  # what failed is not in the way
    assert (status, error) == (0, "")


def test_a_store_too_small_for_a_batch_wants_a_smaller_batch(store, tmp_path, capsys):
    status, error = trained(store, tmp_path, capsys, "--steps", "4", "--batch-size", "2k")
    assert status == 2
    assert "no batch of 2000 tokens can be filled" in error
    assert trained(store, tmp_path, capsys, "--steps", "4", "--batch-size", "200")[0] == 0


def test_a_run_that_diverged_is_begun_anew_with_a_smaller_rate(store, tmp_path, capsys):
    options = ["--steps", "120", "--log-every", "10", "--activation", "relu"]
    status, error = trained(store, tmp_path, capsys, *options, "--lr", "30")
    assert status == 1
    assert "l3-relu" in error
    assert "times that of predicting the mean: use a smaller --lr and begin anew with --fresh" in error
    status, error = trained(store, tmp_path, capsys, *options, "--lr", "1e-3")
    assert status == 1
    assert "optimiser.lr was 30.0 and is now 0.001" in error
    assert trained(store, tmp_path, capsys, *options, "--lr", "1e-3", "--fresh")[0] == 0


def test_a_run_that_failed_in_its_first_steps_is_in_nobodys_way(store, tmp_path, capsys):
    status, error = trained(store, tmp_path, capsys, "--steps", "20", "--lr", "1e30")
    assert status == 1
    assert "is not finite at step" in error
    assert trained(store, tmp_path, capsys, "--steps", "20", "--lr", "1e-3") == (0, "")


@pytest.mark.parametrize(
    ("metrics", "step", "said"),
    [
        ({"l0": 60.0, "dead_share": 0.0, "near_duplicates": 0.1}, 50, None),
        ({"l0": 0.2, "dead_share": 0.0, "near_duplicates": 0.0}, 50, "0.2 features are active per token"),
        ({"l0": 60.0, "dead_share": 0.95, "near_duplicates": 0.0}, 5, None),  # all are dead at first
        ({"l0": 60.0, "dead_share": 0.95, "near_duplicates": 0.0}, 50, "95% of the features are dead"),
        ({"l0": 60.0, "dead_share": 0.0, "near_duplicates": 0.75}, 50, "75% of the decoder's rows are near-duplicates"),
        ({"l0": None, "dead_share": None}, 50, None),
    ],
)
def test_a_collapse_is_one_sentence(metrics, step, said):
    message = collapse(metrics, 100, step)
    assert message is None if said is None else message.startswith(f"collapse at step {step}: ") and said in message
