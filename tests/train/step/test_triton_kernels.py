"""Triton's kernels against float64, by Triton's interpreter, which has to be switched on before Triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
inside = pytest.mark.skipif(not INTERPRETED, reason="runs in the interpreting process that the first test starts")

if INTERPRETED:
    pytest.importorskip("triton")
    from reference import step_terms_and_gradients
    from tcsae.train.loss.objective import Objective, TemporalTerm
    from tcsae.train.sae.activation import Activation
    from tcsae.train.sae.temporal_sae import TemporalSAE
    from tcsae.train.step import triton_kernels
    from tcsae.train.step.by_hand import Stacked, sparse_step, stacked_step
    from tcsae.train.step.fused_relu import FusedCodes, fused_codes

WEIGHTS = ("W_enc", "b_enc", "W_dec", "b_dec")
F32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreting process")
def test_kernels_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        str(Path(__file__)),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert done.stdout.count(".") > 25, f"skipped instead of run: {done.stdout}"


@pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["*fp32", "*bf16"])
def test_kernels_compile_for_gpus_that_are_not_here(
    capability: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # unset, Triton 3.9 warns of a coming default
    import triton
    from tcsae.train.step import triton_kernels
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    codes = {"n_windows": "i32", "n_features": "i32"}
    tile = {"W": 5, "BN": 16, "BF": 128}
    bags = {"starts": "*i32", "out": "*fp32", "width": "i32"}
    sources = {
        "_forward_codes": ({"pre": "*fp32", "z": dtype, "partial": "*fp32", **codes, "n_blocks": "i32"}, tile),
        "_backward_codes": (
            {"z": dtype, "slope": dtype, "sparsity": "*fp32", "temporal": "*fp32", "partial": "*fp32", **codes},
            tile,
        ),
        "_weighted_rows": ({"table": dtype, "index": "*i32", "weights": "*fp32", **bags}, {"BE": 8, "BD": 256}),
        "_inner_products": ({"a": "*fp32", "weight": dtype, "column": "*i32", **bags}, {"BE": 8, "BD": 256}),
    }
    for name, (signature, constants) in sources.items():
        kernel = getattr(triton_kernels, name)
        whole = signature | dict.fromkeys(constants, "constexpr")
        ordered = {argument: whole[argument] for argument in kernel.arg_names}
        source = ASTSource(fn=kernel, signature=ordered, constexprs=constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        assert "cubin" in compiled.asm
        assert "atom" not in compiled.asm["ptx"]  # what is added in no fixed order does not repeat bit for bit


def rounded(pre: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """ReLU in float64 of what a kernel may have stored."""
    return pre.relu().to(dtype).double()


@inside
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("m", "n", "w", "f"), [(1, 1, 1, 1), (1, 19, 5, 200), (3, 16, 2, 128), (2, 3, 7, 130)])
def test_forward_codes(m: int, n: int, w: int, f: int, dtype: torch.dtype) -> None:
    pre = torch.randn(m * n * w, f, generator=torch.Generator().manual_seed(n))
    z, sums, counts, changes = triton_kernels.forward_codes(pre, w, dtype, m)
    # The interpreter cuts bfloat16 where hardware rounds: one unit in the last place is its own doing.
    torch.testing.assert_close(z.double(), rounded(pre, dtype), rtol=0 if dtype == F32 else 2**-7, atol=0)
    by_window = z.double().view(m, n, w, f)
    torch.testing.assert_close(sums.double(), by_window.sum((1, 2)).view(-1), rtol=1e-5, atol=1e-5)
    assert torch.equal(counts, (by_window > 0).sum((1, 2)).view(-1))
    change = (by_window[:, :, 1:] - by_window[:, :, :-1]).square().sum((1, 2)).view(-1)
    torch.testing.assert_close(changes.double(), change, rtol=1e-5, atol=1e-5)


@inside
def test_nan_survives_the_forward_pass() -> None:
    pre = torch.randn(10, 8)
    pre[3, 2] = torch.nan
    z, sums, _, _ = triton_kernels.forward_codes(pre, 5, F32)
    assert torch.isnan(z[3, 2])
    assert torch.isnan(sums[2])
    assert not torch.isnan(sums[[0, 1, 3, 4, 5, 6, 7]]).any()


@inside
@pytest.mark.parametrize(
    ("m", "n", "w", "f", "scope"), [(1, 1, 1, 3, 3), (1, 19, 5, 200, 77), (3, 16, 2, 128, 128), (2, 3, 7, 130, 0)]
)
def test_backward_codes(m: int, n: int, w: int, f: int, scope: int) -> None:
    generator = torch.Generator().manual_seed(n)
    z = torch.randn(m * n * w, f, generator=generator).relu()
    slope, sparsity = torch.randn(m * n * w, f, generator=generator), torch.rand(m, f, generator=generator)
    temporal = torch.rand(m, 1, generator=generator) * (torch.arange(f) < scope)
    leaf = z.double().view(m, n, w, f).requires_grad_()
    loss = (leaf * slope.view(leaf.shape)).sum() + (leaf * sparsity[:, None, None]).sum()
    loss = loss + ((leaf[:, :, 1:] - leaf[:, :, :-1]).square() * temporal[:, None, None]).sum()
    (expected,) = torch.autograd.grad(loss, leaf)
    expected *= leaf > 0
    mine, total = triton_kernels.backward_codes(z, slope.clone(), w, sparsity.view(-1), temporal.view(-1), m)
    torch.testing.assert_close(mine.double().view(leaf.shape), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(total.double(), expected.sum((1, 2)).view(-1), rtol=1e-4, atol=1e-4)


@inside
@pytest.mark.parametrize("width", [1, 40, 256, 300])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_sparse_products(width: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(width)
    table = torch.randn(50, width, generator=generator).to(dtype)
    edges = [0, 0, 3, 11, 11, 40, 40]  # empty bags first, in the middle and last
    starts, index = (
        torch.tensor(edges, dtype=torch.int32),
        torch.randint(50, (40,), generator=generator, dtype=torch.int32),
    )
    weights, rows = torch.randn(40, generator=generator), torch.randn(6, width, generator=generator)
    bags = triton_kernels.weighted_rows(table, index, starts, weights)
    products = triton_kernels.inner_products(rows, table, index, starts)
    for bag, (first, last) in enumerate(pairwise(edges)):
        picked = table.double()[index[first:last].long()]
        torch.testing.assert_close(bags[bag].double(), weights[first:last].double() @ picked, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(products[first:last].double(), picked @ rows[bag].double(), rtol=1e-5, atol=1e-4)


def sae_and_windows(activation: Activation, w: int) -> tuple[TemporalSAE, torch.Tensor]:
    generator = torch.Generator().manual_seed(w)
    sae = TemporalSAE(12, 40, activation).train()
    with torch.no_grad():
        for name in WEIGHTS:
            getattr(sae, name).copy_(torch.randn(getattr(sae, name).shape, generator=generator) * 0.5)
    return sae, torch.randn(6, w, 12, generator=generator)


@inside
@pytest.mark.parametrize("above", [1.0, -1.0])
@pytest.mark.parametrize(
    ("kind", "form", "norms", "w"),
    [
        ("relu", "none", False, 5),
        ("relu", "pairwise", False, 5),
        ("relu nested", "pairwise", True, 5),
        ("topk nested", "none", False, 5),
        ("relu", "pairwise", True, 1),
        ("relu", "window_mean", True, 3),
        ("topk", "pairwise", False, 5),
        ("jumprelu", "pairwise", False, 5),
    ],
)
def test_whole_step_on_kernels_equals_autograd(kind: str, form: str, norms: bool, above: float, w: int) -> None:
    groups = ((7, 0.3), (40, 0.5)) if kind.endswith(" nested") else ()
    activation = {"topk": Activation("topk", k=4), "jumprelu": Activation("jumprelu", bandwidth=0.5)}.get(
        kind.removesuffix(" nested"), Activation()
    )
    sae, x = sae_and_windows(activation, w)
    if kind == "jumprelu":
        torch.nn.init.uniform_(sae.threshold)  # type: ignore[arg-type]
    objective = Objective(0.2, norms, TemporalTerm(form=form, weight=0.3, n_features=25), groups=groups)
    terms, gradients, fired = step_terms_and_gradients(sae, x, objective)
    result = sparse_step(sae, x, objective, dense_above=above)
    for name, value in terms.items():
        torch.testing.assert_close(getattr(result, name), value.detach().float(), rtol=1e-4, atol=1e-5)
    assert torch.equal(result.fired_F, fired)
    for name, expected in gradients.items():
        torch.testing.assert_close(getattr(sae, name).grad.double(), expected, rtol=1e-4, atol=1e-5)


@inside
@pytest.mark.parametrize("above", [1.0, -1.0])
def test_a_stack_on_kernels_equals_its_members_alone(above: float) -> None:
    saes = [sae_and_windows(Activation("relu"), seed)[0] for seed in (2, 3, 4)]
    x = sae_and_windows(Activation("relu"), 5)[1]
    terms = [TemporalTerm(), TemporalTerm("pairwise", 0.3, n_features=40), TemporalTerm("pairwise", 0.1, n_features=25)]
    objectives = [Objective(weight, True, term) for weight, term in zip((0.2, 0.0, 0.5), terms, strict=True)]
    single = [Stacked.of(sae) for sae in saes]
    names = ("W_enc", "b_enc", "W_dec", "b_dec")
    weights = Stacked(*(torch.cat([getattr(each, name) for each in single]) for name in names))
    results, gradients = stacked_step(weights, saes, x, objectives, [None] * 3, dense_above=above)
    for m, (sae, objective) in enumerate(zip(saes, objectives, strict=True)):
        expected = sparse_step(sae, x, objective, dense_above=above)
        torch.testing.assert_close(results[m].total, expected.total)
        torch.testing.assert_close(results[m].temporal, expected.temporal)
        assert torch.equal(results[m].fired_F, expected.fired_F)
        for name in names:
            alone = getattr(sae, name).grad
            mine = getattr(gradients, name)[m]
            torch.testing.assert_close(mine.t() if name == "W_enc" else mine, alone, rtol=1e-5, atol=1e-6)


@inside
def test_bfloat16_factors_cost_only_their_rounding() -> None:
    sae, x = sae_and_windows(Activation("relu"), 5)
    objective = Objective(0.2, False, TemporalTerm(form="pairwise", weight=0.3, n_features=40))
    _, gradients, _ = step_terms_and_gradients(sae, x, objective)
    result = sparse_step(sae, x, objective, dense_above=-1.0, compute_dtype=BF16)
    assert result.total.dtype == F32
    for name in WEIGHTS:
        mine = getattr(sae, name).grad.double()
        assert torch.linalg.vector_norm(mine - gradients[name]) < 0.03 * torch.linalg.vector_norm(gradients[name])


@inside
def test_fused_codes_are_dense_or_sparse_by_density() -> None:
    pre = torch.randn(10, 64)
    assert isinstance(fused_codes(pre, 5, dense_above=0.25), FusedCodes)
    assert not isinstance(fused_codes(pre - 10, 5, dense_above=0.25), FusedCodes)
