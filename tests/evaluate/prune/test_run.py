import json
from dataclasses import replace
from pathlib import Path

import pytest
import stores
import tcsae
import torch
from safetensors.torch import load_file
from tcsae.cache.format.layout import StoreLayout
from tcsae.cache.writer import StoreSetWriter
from tcsae.errors import RunError, UsageError
from tcsae.evaluate.prune.config import PruneConfig
from tcsae.evaluate.prune.elimination import GainFit, eliminate, plan_elimination
from tcsae.evaluate.prune.run import prune_run
from tcsae.pipeline import main
from tcsae.train.run_folder.record import RunRecord, find_runs, load_run
from tcsae.train.sae.activation import Activation
from tcsae.train.sae.temporal_sae import TemporalSAE

D = 6
RELU = Activation()
CONFIG = {"sae": {"activation": "relu", "width": 5, "k": 64}}


def sae_of(rows, encoders, biases=None, *, activation: Activation = RELU, b_dec=None) -> TemporalSAE:
    """An SAE with these decoder rows and encoder columns."""
    sae = TemporalSAE(D, len(rows), activation, metadata={"layer": 3})
    with torch.no_grad():
        sae.W_dec.copy_(torch.stack(rows))
        sae.W_enc.copy_(torch.stack(encoders).T)
        if biases is not None:
            sae.b_enc.copy_(torch.tensor(biases))
        if b_dec is not None:
            sae.b_dec.copy_(b_dec)
    return sae.eval()


def axis(i: int, size: float = 1.0) -> torch.Tensor:
    return size * torch.eye(D)[i]


def pruned(sae: TemporalSAE, x, *, dropped=(), min_cosine: float = 0.9):
    """The new SAE and its plan, decided and fitted on the tokens ``x``."""
    with torch.no_grad():
        z = sae.encode(x)
    dropped_F = torch.zeros(sae.n_features, dtype=torch.bool)
    dropped_F[list(dropped)] = True
    energy = z.double().square().sum(0) * sae.W_dec.detach().double().square().sum(1)
    plan = plan_elimination(sae.W_dec.detach(), energy, dropped_F, min_cosine=min_cosine)
    new = eliminate(sae, plan, z.double().mean(0))
    fit = GainFit(sae, new, plan)
    with torch.no_grad():
        fit.update(z, new.encode(x))
    fit.apply()
    return new, plan


def tokens(n: int = 200) -> torch.Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(0))


def test_copies_that_fire_together_become_their_sum_however_they_were_scaled():
    sae = sae_of([axis(0), axis(0, 4.0), axis(1)], [axis(0, 0.5), axis(0, 0.125), axis(1)], b_dec=torch.ones(D))
    x = tokens()
    new, plan = pruned(sae, x)
    assert new.n_features == 2
    assert plan.n_merged == 1
    torch.testing.assert_close(new(x).reconstruction, sae(x).reconstruction)


def test_features_that_fire_in_turn_become_their_union():
    sae = sae_of([axis(0), axis(0)], [axis(1), axis(2)])
    x = torch.zeros(100, D)
    x[:50, 1], x[50:, 2] = torch.rand(2, 50, generator=torch.Generator().manual_seed(0)) + 0.5
    new, _ = pruned(sae, x)
    assert new.n_features == 1
    torch.testing.assert_close(new(x).reconstruction, sae(x).reconstruction, rtol=0.05, atol=0.05)
    assert bool((new.encode(x) > 0).all())


def test_the_gain_is_the_best_there_is():
    generator = torch.Generator().manual_seed(0)
    close = axis(0) + 0.3 * axis(3)
    sae = sae_of([axis(0), close, axis(1)], list(torch.randn(3, D, generator=generator)))
    x = tokens()
    new, _ = pruned(sae, x)
    assert new.n_features == 2
    with torch.no_grad():
        z = sae.encode(x)
        joint = z[:, :2] @ sae.W_dec[:2]
        own = new.encode(x)[:, 0]

        def error(scale: float) -> float:
            return float((joint - scale * own[:, None] * new.W_dec[0]).square().sum())

        assert error(1.0) < min(error(0.98), error(1.02))


@pytest.mark.parametrize("kind", ["relu", "topk", "jumprelu"])
def test_features_that_stand_alone_keep_their_weights_to_the_bit(kind):
    generator = torch.Generator().manual_seed(1)
    rows = [3 * torch.randn(D, generator=generator) for _ in range(4)]
    rows[3] = 2 * rows[0]
    activation = Activation(kind, k=4 if kind == "topk" else None)
    sae = sae_of(rows, list(torch.randn(4, D, generator=generator)), [0.1, 0.2, 0.3, 0.4], activation=activation)
    if sae.threshold is not None:
        sae.threshold.data.copy_(torch.tensor([0.5, 0.6, 0.7, 0.8]))
    new, plan = pruned(sae, tokens())
    assert new.n_features == 3
    kept = plan.kept_K.tolist()
    for old_at, new_at in ((1, kept.index(1)), (2, kept.index(2))):
        assert torch.equal(new.W_dec[new_at], sae.W_dec[old_at])
        assert torch.equal(new.W_enc[:, new_at], sae.W_enc[:, old_at])
        assert new.b_enc[new_at] == sae.b_enc[old_at]
        if sae.threshold is not None:
            assert new.threshold[new_at] == sae.threshold[old_at]
    assert new.activation == (replace(activation, k=3) if kind == "topk" else activation)


def test_what_a_dropped_feature_adds_on_average_stays():
    sae = sae_of([axis(0), axis(1)], [axis(0), axis(1)], [2.0, 0.5], b_dec=0.3 * torch.ones(D))
    x = tokens()
    new, _ = pruned(sae, x, dropped=[0])
    assert new.n_features == 1
    torch.testing.assert_close(new.pre_activations(x)[:, 0], sae.pre_activations(x)[:, 1])
    torch.testing.assert_close(new(x).reconstruction.mean(0), sae(x).reconstruction.mean(0))


def test_nothing_merges_above_a_cosine_of_one():
    sae = sae_of([axis(0), axis(0)], [axis(0), axis(0)])
    new, plan = pruned(sae, tokens(), min_cosine=2.0)
    assert plan.n_merged == 0
    assert torch.equal(new.W_dec, sae.W_dec)


# --- a whole run ----------------------------------------------------------------------------------------------------


def store_with_a_position(folder: Path) -> Path:
    """Random activations, and a constant along axis 5 at position 4 only."""
    layout = StoreLayout(d_model=D, context=12, chunk_rows=4, shard_rows=16)
    block = stores.make_block(48, 12, documents=6)
    x = torch.randn(48, 12, D, generator=torch.Generator().manual_seed(0))
    x[..., 5] = 0
    x[:, 4, 5] = 3.0
    bits = {3: x.bfloat16().view(torch.uint16).numpy()}
    with StoreSetWriter.open(
        {3: folder / "l3.zarr"}, {3: stores.make_manifest(layout=layout, planned_rows=48)}
    ) as writer:
        stores.write_rows(writer, block, bits)
    return folder / "l3.zarr"


def run_of(folder: Path, store: Path, sae: TemporalSAE, **changes) -> Path:
    record = RunRecord(
        name=folder.name, role="tc", twin="other", layer=3, store=str(store), store_fingerprint="f", store_rows=48,
        store_manifest={}, config=CONFIG, input_scale=1.0, seed=0, steps=5, planned_steps=5, tokens=100, finished=True,
        metrics={"loss": 1.0}, versions={}, created="2026-01-01T00:00:00+00:00",
    ).model_copy(update=changes)  # fmt: skip
    sae.save(folder)
    record.save(folder)
    return folder


@pytest.fixture
def redundant(tmp_path):
    """A run with a duplicated and a position-locked feature, on such a store."""
    rows = [axis(0), axis(0), axis(1), axis(5), axis(2)]
    sae = sae_of(rows, rows, [0.0, 0.0, 0.0, -1.0, 0.0])
    return run_of(tmp_path / "runs" / "one", store_with_a_position(tmp_path), sae)


def test_a_pruned_run_is_a_finished_run_that_says_what_was_done(redundant):
    done = tcsae.prune(redundant, device="cpu")
    out = redundant.with_name("one-pruned")
    assert done.folder == str(out)
    assert done.dropped == [3]
    assert done.merged == {0: [1]}
    assert (done.before.n_features, done.after.n_features) == (5, 3)
    assert done.after.mse_per_token > 0
    assert done.after.l0 < done.before.l0
    assert find_runs(redundant.parent) == [redundant, out]
    record = load_run(out)
    assert (record.name, record.twin, record.layer, record.metrics) == ("one-pruned", None, 3, {})
    sae = TemporalSAE.load(out)
    assert sae.n_features == 3
    assert (sae.metadata["pruned_from"], sae.metadata["tcsae_run"]) == ("one", "one-pruned")
    assert record.config["sae"]["width"] == 3
    told = json.loads((out / "prune.json").read_text())
    assert told["config"]["min_cosine"] == 0.9
    assert told["dropped"] == [3]


def test_a_pruned_topk_run_is_a_saelens_folder_that_keeps_k_within_its_width(tmp_path):
    rows = [axis(0), axis(0), axis(1), axis(5), axis(2)]
    sae = sae_of(rows, rows, [0.0, 0.0, 0.0, -1.0, 0.0], activation=Activation("topk", k=4))
    out = Path(
        prune_run(PruneConfig(str(run_of(tmp_path / "runs" / "k4", store_with_a_position(tmp_path), sae)))).folder
    )
    config = json.loads((out / "cfg.json").read_text())
    assert (config["architecture"], config["d_in"], config["d_sae"], config["k"]) == ("topk", D, 3, 3)
    assert load_run(out).config["sae"]["k"] == 3
    weights = load_file(out / "sae_weights.safetensors")
    shapes = {"W_enc": (D, 3), "W_dec": (3, D), "b_enc": (3,), "b_dec": (D,)}
    assert {name: tuple(weights[name].shape) for name in weights} == shapes


def test_the_command_prints_what_it_did(redundant, capsys):
    assert main(["prune", str(redundant), "--device", "cpu", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["after"]["n_features"] == 3
    assert main(["prune", str(redundant), "--device", "cpu"]) == 1
    assert "exists already: remove it or choose another folder with --out" in capsys.readouterr().err
    (Path(told["folder"]) / "train.json").unlink()  # killed before it was finished: the same command goes on
    assert main(["prune", str(redundant), "--device", "cpu"]) == 0
    capsys.readouterr()
    assert (
        main(["prune", str(redundant), "--out", str(redundant) + "2", "--min-eta-squared", "2", "--device", "cpu"]) == 0
    )
    assert "5 → 4" in capsys.readouterr().out


def test_a_run_without_redundancy_is_left_alone(redundant):
    done = prune_run(PruneConfig(str(redundant), min_cosine=2.0, min_eta_squared=2.0, device="cpu"))
    assert done.folder is None
    assert done.before == done.after
    assert find_runs(redundant.parent) == [redundant]


def test_runs_and_stores_that_do_not_fit_are_refused(redundant, tmp_path):
    sae = TemporalSAE.load(redundant)
    other = stores.make_stores(tmp_path / "wide", [3], rows=16)[3]
    with pytest.raises(RunError, match="holds layer 3, width 8; the run is of layer 3, width 6: name its own store"):
        prune_run(PruneConfig(str(redundant), store=str(other), device="cpu"))
    half = run_of(tmp_path / "runs" / "half", tmp_path / "l3.zarr", sae, finished=False, steps=2)
    with pytest.raises(RunError, match="has trained 2 of 5 steps"):
        prune_run(PruneConfig(str(half), device="cpu"))


@pytest.mark.parametrize("wrong", [{"min_cosine": 0.0}, {"min_eta_squared": -1.0}, {"tokens": 0}])
def test_thresholds_that_cannot_be_are_refused(wrong):
    with pytest.raises(UsageError):
        PruneConfig("run", **wrong)
