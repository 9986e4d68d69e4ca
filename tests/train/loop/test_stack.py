"""Members that step together are what each would be alone: the one-by-one step is the slow twin."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from stores import make_store
from tcsae.train import run
from tcsae.train.loop import memory_plan
from tcsae.train.loop.member import Member
from tcsae.train.loop.memory_plan import member_bytes, split_passes, stacks, step_bytes
from tcsae.train.loop.stack import Stack
from tcsae.train.loss.partners import Batch, draw_partners, generator_of
from tcsae.train.plan import MemberPlan, plan_members
from tcsae.train.presets import build_config
from tcsae.train.run_folder.checkpoint import load_checkpoint, save_checkpoint
from tcsae.train.step import active_entries, by_hand
from tcsae.train.step.autograd import autograd_step
from tcsae.train.step.registry import GRADIENTS

WINDOWS, W, D, F = 8, 5, 8, 24
SMALL = {
    "sae.width": F,
    "sae.k": 3,
    "loss.l1": 0.3,
    "run.steps": 12,
    "run.baseline": False,
    "data.batch_size": WINDOWS * W,
}
FORMS = tuple(GRADIENTS)


def plans_of(changes: dict[str, Any], grid: dict[str, tuple[str, ...]]) -> list[MemberPlan]:
    return plan_members(build_config(None, None, SMALL | changes), grid, layer=3, d_model=D, n_tokens=1000)


def members_of(plans: list[MemberPlan]) -> list[Member]:
    """In training, each with dead features of its own: none, some, most."""
    members = [Member(plan, torch.full((D,), 0.1), torch.device("cpu"), torch.float32) for plan in plans]
    for at, member in enumerate(members):
        member.idle_F[: (0, 3, 20)[at % 3]] = 10**9
    return members


def batch(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(WINDOWS, 1, D, generator=generator)
    return shared + 0.5 * torch.randn(WINDOWS, W, D, generator=generator)


def partners_of(members: list[Member], step: int) -> list[torch.Tensor | None]:
    documents = torch.arange(WINDOWS) // 2
    terms = [member.objective.temporal for member in members]
    rows, starts = torch.arange(WINDOWS) // 2, torch.arange(WINDOWS) % 2 * W
    batches = [Batch(documents, rows, starts, W, generator_of(0, step), siblings=2) for _ in terms]
    pairs = zip(terms, batches, strict=True)
    return [draw_partners(t.partner, batch) if t.active else None for t, batch in pairs]


def check_alike(plans: list[MemberPlan], *, bits: bool = True, steps: int = 4) -> None:
    """Terms, norms, counters and weights of a stack equal those of its members alone, after every step."""
    together, alone = members_of(plans), members_of(plans)
    stack, singles = Stack(together), [Stack([member]) for member in alone]
    rtol, atol = (0, 0) if bits else (1e-4, 1e-5)
    for step in range(steps):
        x, partners = batch(step), partners_of(alone, step)
        updates = stack.train_step(x, partners)
        for at, single in enumerate(singles):
            (expected,) = single.train_step(x, [partners[at]])
            for name in ("total", "reconstruction", "sparsity", "temporal", "auxiliary"):
                mine, theirs = getattr(updates[at].result, name), getattr(expected.result, name)
                torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6, msg=f"{name} of {plans[at].name}")
            torch.testing.assert_close(updates[at].grad_norm, expected.grad_norm, rtol=rtol, atol=atol)
            assert torch.equal(updates[at].result.fired_F, expected.result.fired_F)
            assert torch.equal(together[at].idle_F, alone[at].idle_F)
            for name, value in alone[at].sae.state_dict().items():
                mine = together[at].sae.state_dict()[name]
                torch.testing.assert_close(mine, value, rtol=rtol, atol=atol, msg=f"{name}, step {step}")
    assert [member.step for member in together] == [steps] * len(plans)


@pytest.fixture(params=["entries", "matrices"])
def kind_of_codes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "entries":
        monkeypatch.setattr(active_entries, "_TOO_SMALL", 0)
        monkeypatch.setattr(active_entries, "DENSE_ABOVE", {"cpu": 1.0})


@pytest.mark.usefixtures("kind_of_codes")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("activation", ["relu", "topk", "batchtopk", "jumprelu"])
def test_every_term_at_several_weights(activation: str, form: str) -> None:
    changes = {"sae.activation": activation, "temporal.form": form}
    plans = plans_of(changes, {"temporal.weight": ("0", "0.1", "0.4"), "run.seed": ("0", "1")})
    # That form divides by a sum over all entries, which a library takes in another order where the memory begins
    # elsewhere.
    check_alike(plans, bits=form != "normalised", steps=3)


@pytest.mark.usefixtures("kind_of_codes")
def test_forms_partners_scopes_and_lags_may_differ() -> None:
    plans = plans_of(
        {"temporal.weight": 0.2}, {"temporal.form": ("pairwise", "cosine", "none"), "run.seed": ("0", "1")}
    )
    plans += plans_of(
        {"temporal.weight": 0.1}, {"temporal.partner": ("other_document", "same_document", "shuffled", "l2")}
    )
    plans += plans_of(
        {"temporal.weight": 0.3, "temporal.partner": "lag", "temporal.lag": 2}, {"temporal.scope": ("0.3", "1")}
    )
    check_alike(plans)


@pytest.mark.usefixtures("kind_of_codes")
@pytest.mark.parametrize("form", ["pairwise", "window_mean", "l1"])
def test_weights_of_features_may_differ(form: str) -> None:
    rules = ("none", "density", "autocorrelation")
    plans = plans_of({"temporal.form": form}, {"temporal.weight": ("0.1", "0.4"), "temporal.per_feature": rules})
    check_alike(plans, steps=12)


@pytest.mark.usefixtures("kind_of_codes")
@pytest.mark.parametrize("changes", [
    {"sae.activation": "relu"}, {"sae.activation": "jumprelu"},
    {"sae.activation": "jumprelu", "loss.l0_penalty": "quadratic"},
])  # fmt: skip
def test_targets_for_l0_may_differ(changes: dict[str, Any]) -> None:
    plans = plans_of(changes | {"loss.l1_warmup": 0.0}, {"loss.target_l0": ("2", "3.5"), "run.seed": ("0", "1")})
    check_alike(plans, steps=12)


@pytest.mark.usefixtures("kind_of_codes")
@pytest.mark.parametrize("activation", ["relu", "topk", "batchtopk", "jumprelu"])
def test_nested_groups(activation: str) -> None:
    changes = {"sae.activation": activation, "sae.groups": "0.2,0.5,1", "sae.group_weights": "0.2,1,0.5"}
    check_alike(plans_of(changes, {"temporal.weight": ("0", "0.1"), "temporal.scope": ("0.2", "1")}))


@pytest.mark.usefixtures("kind_of_codes")
@pytest.mark.parametrize("decoder", ["unit", "free"])
@pytest.mark.parametrize("optimiser", ["adam", "adamw"])
def test_sparsity_weights_and_warm_ups_may_differ(decoder: str, optimiser: str) -> None:
    changes = {"sae.activation": "relu", "sae.decoder": decoder, "optimiser.name": optimiser, "optimiser.clip": 0.5}
    check_alike(plans_of(changes, {"loss.l1": ("0", "0.1", "1"), "loss.l1_warmup": ("0", "0.5")}))


def test_entries_in_company_and_matrices_alone_agree_within_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    # The stack is large enough for active entries, its members alone are not: other kernels, other sums.
    monkeypatch.setattr(active_entries, "_TOO_SMALL", 2 * WINDOWS * W * F)
    check_alike(plans_of({}, {"run.seed": ("0", "1", "2")}), bits=False)


@pytest.mark.parametrize("seeds", [("0",), ("0", "1")])
@pytest.mark.parametrize("activation", ["relu", "jumprelu"])
def test_descent_is_torchs_own_with_nothing_fused(activation: str, seeds: tuple[str, ...]) -> None:
    """autograd_step, clip_grad_norm_ and AdamW one tensor at a time, on rows left free: the slow twin of the
    whole step.
    """
    changes = {"sae.activation": activation, "sae.decoder": "free", "loss.decoder_norms": False, "loss.l1_warmup": 0.0}
    plans = plans_of(
        changes | {"optimiser.lr": 1e-2, "optimiser.warmup": 0, "optimiser.decay_share": 0.0}, {"run.seed": seeds}
    )
    stack, twins = Stack(members_of(plans)), members_of(plans)
    optimisers = []
    for twin in twins:
        groups = [{**group, "lr": 1e-2 * group.get("times", 1)} for group in twin.optimiser.param_groups]
        plain = [{key: group[key] for key in ("params", "lr", "weight_decay")} for group in groups]
        optimisers.append(torch.optim.AdamW(plain, foreach=False, fused=False))
    for step in range(4):
        updates = stack.train_step(batch(step))
        for twin, optimiser, update in zip(twins, optimisers, updates, strict=True):
            optimiser.zero_grad(set_to_none=True)
            autograd_step(twin.sae, batch(step), twin.objective)
            norm = torch.nn.utils.clip_grad_norm_(twin.sae.parameters(), 1.0)
            optimiser.step()
            torch.testing.assert_close(update.grad_norm, norm, rtol=1e-4, atol=1e-5)
    for member, twin in zip(stack.members, twins, strict=True):
        for name, value in twin.sae.named_parameters():
            torch.testing.assert_close(dict(member.sae.named_parameters())[name], value, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.usefixtures("kind_of_codes")
def test_auxiliary_terms_padded_together_are_those_of_every_member() -> None:
    """As on a GPU, where a call costs more than padding."""
    members = members_of(plans_of({}, {"run.seed": ("0", "1", "2", "3")}))
    weights = Stack(members).weights
    generator = torch.Generator().manual_seed(0)
    pre, centred, residual = (torch.randn(4, WINDOWS * W, n, generator=generator) for n in (F, D, D))
    dead_MF, objective = torch.stack([member.dead for member in members]), members[0].objective
    found = []
    for parts in ([slice(None)], [slice(m, m + 1) for m in range(4)]):
        names = ("W_enc", "b_enc", "W_dec", "b_dec")
        sums = by_hand.Stacked(*(torch.zeros_like(getattr(weights, name)) for name in names))
        args = [(sums.part(of), weights.part(of), pre[of], centred[of], residual[of], dead_MF[of]) for of in parts]
        found.append(
            (
                torch.cat([by_hand._add_auxiliary(*each, objective) for each in args]),
                *(getattr(sums, name) for name in names),
            )
        )
    assert found[0][0].count_nonzero() == 2
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_a_member_that_is_not_finite_stops_the_stack_and_is_known() -> None:
    members = members_of(plans_of({}, {"run.seed": ("0", "1", "2")}))
    stack = Stack(members)
    with torch.no_grad():
        members[1].sae.W_enc[2, 5] = math.nan
    before = [member.sae.W_dec.clone() for member in members]
    updates = stack.train_step(batch(0))
    assert [math.isfinite(update.result.total) for update in updates] == [True, False, True]
    assert all(torch.equal(member.sae.W_dec, rows) for member, rows in zip(members, before, strict=True))
    assert [member.step for member in members] == [0, 0, 0]


@pytest.mark.parametrize("stacked_first", [True, False])
def test_a_checkpoint_fits_either_way_of_stepping(tmp_path, stacked_first: bool) -> None:
    plans = plans_of({}, {"temporal.weight": ("0", "0.1"), "run.seed": ("0", "1")})

    def stacks_of(members: list[Member], together: bool) -> list[Stack]:
        return [Stack(members)] if together else [Stack([member]) for member in members]

    def train(all_stacks: list[Stack], steps: range) -> None:
        for step in steps:
            for stack in all_stacks:
                stack.train_step(batch(step))

    whole, first, second = members_of(plans), members_of(plans), members_of(plans)
    train(stacks_of(whole, stacked_first), range(6))
    train(stacks_of(first, stacked_first), range(3))
    size = sum(parameter.nbytes for parameter in first[0].sae.parameters())
    for member in first:
        save_checkpoint(tmp_path / member.plan.name, 3, {"member": member.state_dict()})
        assert (
            next((tmp_path / member.plan.name).rglob("*.pt")).stat().st_size < 3 * size + 20_000
        )  # not the others' weights
    rest = stacks_of(second, not stacked_first)
    train(rest, range(2))  # so that there are states to be replaced
    for member in second:
        member.load_state_dict(load_checkpoint(tmp_path / member.plan.name, 3)["member"])
    train(rest, range(3, 6))
    for one, other in zip(whole, second, strict=True):
        assert all(torch.equal(other.sae.state_dict()[name], value) for name, value in one.sae.state_dict().items())


def test_a_checkpoint_with_moments_the_other_way_round_goes_on_the_same(tmp_path) -> None:
    (one,), (other,) = members_of(plans_of({}, {})), members_of(plans_of({}, {}))
    stack = Stack([one])
    for step in range(3):
        stack.train_step(batch(step))
    state = one.state_dict()
    for name in ("exp_avg", "exp_avg_sq"):
        of_W_enc = state["optimiser"]["state"][0]
        assert of_W_enc[name].shape == (F, D)
        of_W_enc[name] = of_W_enc[name].t()
    save_checkpoint(tmp_path, 3, {"member": state})
    other.load_state_dict(load_checkpoint(tmp_path, 3)["member"])
    again = Stack([other])
    for step in range(3, 5):
        stack.train_step(batch(step))
        again.train_step(batch(step))
    assert all(torch.equal(other.sae.state_dict()[name], value) for name, value in one.sae.state_dict().items())


def test_only_what_is_alike_is_stacked_and_only_so_many() -> None:
    plans = plans_of({}, {"sae.width": ("24", "48"), "run.seed": ("0", "1", "2", "3", "4")})
    by_width = [[plan.config.sae.width for plan in stack] for stack in stacks(plans, "cpu")]
    assert by_width == [[24] * 5, [48] * 5]
    for field, values in {
        "sae.activation": ("relu", "topk"), "sae.k": ("2", "3"), "sae.decoder": ("unit", "free"),
        "loss.aux_weight": ("0", "1"), "sae.groups": ("1", "0.2:1"),
        "optimiser.lr": ("1e-3", "1e-4"),
    }.items():  # fmt: skip
        assert [len(stack) for stack in stacks(plans_of({}, {field: values}), "cpu")] == [1, 1]
    assert [len(stack) for stack in stacks(plans_of({}, {"temporal.form": FORMS}), "cpu")] == [len(FORMS)]
    aimed = {"sae.activation": "jumprelu", "loss.target_l0": 3}
    for field, values, sizes in (
        ("loss.l0_penalty", ("linear", "quadratic"), [1, 1]), ("loss.target_l0", ("0", "2", "3"), [3]),
    ):  # fmt: skip
        assert [len(stack) for stack in stacks(plans_of(aimed, {field: values}), "cpu")] == sizes


def test_large_members_step_alone_and_memory_counts_whole_stacks(monkeypatch: pytest.MonkeyPatch) -> None:
    plans = plans_of({}, {"run.seed": ("0", "1", "2", "3", "4")})
    weights, step = member_bytes(plans[0]), step_bytes(plans[0])
    for room, sizes in ((0, [1] * 5), (1, [1] * 5), (2, [1, 2, 2]), (3, [2, 3]), (5, [5])):
        monkeypatch.setattr(memory_plan, "STACK_BELOW", {"cpu": room * WINDOWS * W * F})
        assert [len(stack) for stack in stacks(plans, "cpu")] == sizes
        assert len(split_passes(plans, 5 * weights + max(sizes) * step)) == 1
        assert len(split_passes(plans, 5 * weights + max(sizes) * step - 1)) == 2


def test_a_sweep_is_the_same_stacked_and_one_by_one(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(tmp_path / "cache", rows=64, context=16, d_model=8, documents=12)
    grid = {"temporal.weight": ("0", "0.1"), "run.seed": ("0", "1")}
    for folder, room in (("stacked", 2**20), ("single", 0)):
        monkeypatch.setattr(memory_plan, "STACK_BELOW", {"cpu": room})
        about = {
            "data.store": str(store),
            "run.out": str(tmp_path / folder),
            "run.device": "cpu",
            "run.dtype": "float32",
        }
        run.train(build_config(None, None, SMALL | about), sweep=grid)
    names = [path.name for path in (tmp_path / "single").iterdir()]
    assert len(names) == 4
    for name in names:
        for file in ("sae_weights.safetensors", "cfg.json"):
            assert (tmp_path / "single" / name / file).read_bytes() == (tmp_path / "stacked" / name / file).read_bytes()
