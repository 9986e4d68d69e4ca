"""Temporal SAE as published: the preset, what ``--rivals`` takes of it, and a threshold by moving average."""

from __future__ import annotations

import pytest
import torch
from stores import make_activations, make_block, make_store, manifests, write_rows
from tcsae.cache.format.layout import StoreLayout
from tcsae.cache.views import Pairs
from tcsae.cache.writer import StoreSetWriter
from tcsae.errors import UsageError
from tcsae.train import plan as plan_module
from tcsae.train import run
from tcsae.train.loop import member as member_module
from tcsae.train.loop.memory_plan import stacks, step_bytes, step_of
from tcsae.train.loop.schedule import learning_rate
from tcsae.train.loss.objective import objective_of
from tcsae.train.plan import plan_members, plan_together, tokens_per_step, view_of
from tcsae.train.presets import _SHARED, TSAE, build_config, rivals_of
from tcsae.train.sae.protocol import SparseAutoencoder
from tcsae.train.sae.temporal_sae import TemporalSAE

GEMMA = {"layer": 12, "d_model": 2304, "n_tokens": 100_000_000}


def test_the_preset_is_the_publication():
    tsae, twin = plan_members(build_config("tsae"), {}, **GEMMA)
    assert tsae.name == "l12-batchtopk20-groups0.2-1-contrastive0.1-earlier-scope0.2-s0"
    assert twin.config.data == tsae.config.data
    config, sae = tsae.config, tsae.config.sae
    assert (sae.width, sae.k, sae.groups, sae.decoder, sae.initial) == (16384, 20, (0.2, 1.0), "unit", "tied")
    assert (config.data.scale, config.data.norm_filter, sae.b_dec) == ("none", 0.0, "geometric_median")
    assert view_of(config.data) == Pairs("token", earlier_extra=True)
    assert (tokens_per_step(config), config.run.steps) == (8192, 100_000_000 // 8192)
    objective = objective_of(config, 2304, sae.width)
    assert objective.groups == ((3277, 0.1), (16384, 0.4))  # the mean of .2 e and .8 e
    term = objective.temporal
    assert (term.form, term.weight, term.n_features) == ("contrastive", 0.1, 3277)
    assert (term.similarity, term.temperature, term.partner) == ("dot", 1.0, "earlier")
    assert (objective.aux_weight, objective.aux_k, objective.aux_normalised) == (1 / 32, 1152, True)
    assert (objective.current_only, objective.sparsity_weight) == (True, 0)
    assert member_module.dead_after(config) == 10_000_000
    chosen = config.optimiser
    assert (chosen.name, chosen.betas, chosen.clip) == ("adam", (0.9, 0.999), 1.0)
    rates = [learning_rate(step, config.run.steps, chosen) for step in (499, 1000, config.run.steps - 1)]
    assert rates == pytest.approx([1.5e-4, 3e-4, 3e-4])
    assert TemporalSAE.build(sae, 8).threshold_momentum == 0.999
    assert objective_of(twin.config, 2304, sae.width).temporal.active is False


def test_rivals_take_their_method_from_the_preset():
    plans = plan_together(
        rivals_of(build_config(None, None, {"sae.k": 4, "sae.width": 64, "optimiser.lr": 1e-3})), {}, **GEMMA
    )
    tsae = next(each for each in plans if "contrastive" in each.name)
    flat = {f"{group}.{key}": value for group, fields in tsae.config.model_dump().items() if isinstance(fields, dict)
            for key, value in fields.items()}  # fmt: skip
    for field, value in TSAE.items():
        if field not in _SHARED and not field.startswith(("optimiser.", "sae.b_dec")):
            assert flat[field] == value, field
    shared = {(p.config.sae.width, p.config.sae.k, p.config.data.scale, p.config.sae.threshold_rule) for p in plans}
    assert shared == {(64, 4, "rms", "calibrated")}
    assert {p.config.optimiser.lr for p in plans if p.config.sae.architecture != "tfa"} == {1e-3}


def test_it_steps_by_hand_alone_and_needs_twice_the_memory_of_its_current_tokens():
    changes = {"sae.width": 64, "sae.k": 4, "run.steps": 2000}
    plans = plan_members(build_config("tsae", None, changes), {"run.seed": ["0", "1"]}, **GEMMA)
    assert {step_of(each, "cpu")[0] for each in plans} == {"fast"}
    assert [len(stack) for stack in stacks(plans, "cpu")] == [1] * 4
    (relu,) = plan_members(
        build_config("tsae", None, changes | {"sae.activation": "relu", "run.baseline": False}), {}, **GEMMA
    )
    assert step_of(relu, "cpu") == ("autograd", "no hand-written step for activation 'relu' where data.pair_loss is "
                                    "'current'")  # fmt: skip
    both = plan_members(build_config("tsae", None, changes | {"data.pair_loss": "both"}), {}, **GEMMA)
    assert step_bytes(plans[0]) == 2 * step_bytes(both[0])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"run.steps": 1000}, "'running' averages over the steps after 1000, the run has 1000: train for more --steps"),
        ({"data.view": "windows", "temporal.form": "none"}, "'current' is of pairs of an earlier token and a token, and"
                                                            " windows are seen"),
        ({"temporal.partner": "next"}, "shows an earlier token and a token, no neighbours, which partner 'next' needs"),
        ({"temporal.partner": "shuffled", "temporal.form": "pairwise"}, "which partner 'shuffled' needs"),
        ({"sae.architecture": "txc", "temporal.form": "none", "sae.activation": "topk"}, "'txc' sees windows"),
    ],
)  # fmt: skip
def test_what_it_cannot_be_is_one_sentence(changes, sentence):
    with pytest.raises(UsageError, match=sentence):
        plan_members(build_config("tsae", None, changes), {}, **GEMMA)


def test_a_running_threshold_is_the_moving_average_from_its_first_step_on(tmp_path, monkeypatch):
    for module in (plan_module, member_module):
        monkeypatch.setattr(module, "RUNNING_FROM", 5)
    seen = []
    real = TemporalSAE.track_threshold

    def track_threshold(self, z):
        seen.append(float(z[z > 0].min()))
        real(self, z)

    monkeypatch.setattr(TemporalSAE, "track_threshold", track_threshold)
    store = make_store(tmp_path / "cache", rows=48, d_model=8, documents=12)
    small = {"data.store": str(store), "run.out": str(tmp_path / "runs"), "data.batch_size": 60, "sae.width": 32,
             "sae.k": 4, "run.steps": 12, "run.baseline": False, "run.device": "cpu", "run.dtype": "float32",
             "data.scale": "rms"}  # fmt: skip
    path = run.train(build_config("tsae", None, small)).runs[0]
    assert len(seen) == 12
    expected = seen[6]  # the first step after step 5
    for smallest in seen[7:]:
        expected = 0.999 * expected + 0.001 * smallest
    sae = SparseAutoencoder.load(path)
    assert isinstance(sae, TemporalSAE)
    torch.testing.assert_close(sae.threshold, torch.full((32,), expected))


def test_its_threshold_is_calibrated_on_every_token_not_on_pairs_alone(tmp_path):
    """A row's first token is never the current one of a pair; here it is three times as long as the others."""
    block = make_block(192, 6)
    x_RTD = torch.from_numpy(make_activations(block, 8)).view(torch.bfloat16).clone()
    x_RTD[:, 1] *= 3  # the first token of text: position 0 is special
    layout = StoreLayout(8, 6, 4, 16)
    store = tmp_path / "l3.zarr"
    with StoreSetWriter.open({3: store}, manifests([3], 192, layout)) as writer:
        write_rows(writer, block, {3: x_RTD.view(torch.uint16).numpy()})
    changes = {"data.store": str(store), "run.out": str(tmp_path / "runs"), "run.steps": 60, "sae.width": 64,
               "sae.k": 4, "data.batch_size": 96, "sae.threshold_rule": "calibrated", "run.device": "cpu",
               "run.dtype": "float32", "optimiser.lr": 1e-3, "run.baseline": False}  # fmt: skip
    sae = TemporalSAE.load(run.train(build_config("tsae", None, changes)).runs[0])
    l0_RT = (sae.encode(x_RTD.float()) > 0).sum(-1).float()
    assert l0_RT[:, 1:].mean() == pytest.approx(4, rel=0.05)
    assert l0_RT[:, 1].mean() > 1.3 * l0_RT[:, 2:].mean(), "or the first token would not matter"
