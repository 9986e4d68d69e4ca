"""Active entries against whole matrices: selection, the three products, lookups."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tcsae.train.loop import memory_plan
from tcsae.train.sae.activation import Activation
from tcsae.train.step import matmul as matmul_module
from tcsae.train.step.active_entries import DENSE_ABOVE, DenseCodes, SparseCodes, codes_of
from tcsae.train.step.matmul import matmul, product
from tcsae.train.step.top_k import count_true, largest, true_positions

settings.register_profile("codes", max_examples=25, deadline=None, derandomize=True)
settings.load_profile("codes")


def random_pre(seed: int, n: int, f: int, share: float, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Pre-activations with about ``share`` positive; 0 and 1 mean none and all."""
    generator = torch.Generator().manual_seed(seed)
    magnitude = torch.rand(n, f, generator=generator, dtype=dtype) + 0.1
    return torch.where(torch.rand(n, f, generator=generator, dtype=dtype) < share, magnitude, -magnitude)


shapes = {
    "seed": st.integers(0, 99),
    "n": st.integers(1, 9),
    "f": st.integers(1, 40),
    "share": st.sampled_from([0.0, 0.05, 0.3, 1.0]),
}


@given(**shapes, d=st.integers(1, 7))
def test_both_kinds_of_codes_compute_the_same_products(seed: int, n: int, f: int, share: float, d: int) -> None:
    pre = random_pre(seed, n, f, share)
    z = torch.relu(pre)
    generator = torch.Generator().manual_seed(seed + 1)
    a, W = (torch.randn(rows, d, generator=generator, dtype=torch.float64) for rows in (n, f))
    values, per_feature = torch.randn(n, f, generator=generator, dtype=torch.float64) * (z > 0), a.new_tensor(range(f))
    kinds = (SparseCodes(pre, pre > 0, true_positions(pre > 0), all_positive=seed % 2 == 0), DenseCodes(pre, pre > 0))
    for codes in kinds:
        sparse = isinstance(codes, SparseCodes)
        mine = codes.gathered(values)

        def dense(entries: torch.Tensor, sparse: bool = sparse) -> torch.Tensor:
            return torch.zeros_like(z).masked_scatter_(z > 0, entries) if sparse else entries

        torch.testing.assert_close(codes.dense(), z)
        torch.testing.assert_close(dense(codes.value), z)
        torch.testing.assert_close(codes.decode(W), z @ W)
        torch.testing.assert_close(dense(codes.sampled(a, W)), (a @ W.t()) * (z > 0))
        torch.testing.assert_close(codes.accumulate(mine, a), values.t() @ a)
        torch.testing.assert_close(codes.column_sums(mine), values.sum(0))
        assert torch.equal(codes.column_counts(), (z > 0).sum(0))
        torch.testing.assert_close(dense(codes.value * codes.of_columns(per_feature)), z * per_feature)


def test_what_is_sliced_is_never_stacked() -> None:
    assert memory_plan.STACK_BELOW["cpu"] * DENSE_ABOVE["cpu"] < matmul_module._MANY


@given(n=st.integers(0, 5000), share=st.sampled_from([0.0, 0.01, 0.5, 1.0]), seed=st.integers(0, 99))
def test_flags_are_counted(n: int, share: float, seed: int) -> None:
    mask = torch.rand(n, generator=torch.Generator().manual_seed(seed)) < share
    assert count_true(mask) == int(mask.sum())
    assert torch.equal(true_positions(mask, int(mask.sum())), mask.nonzero().view(-1))


@pytest.mark.parametrize("d", [7, 32, 33, 64, 150])
def test_tables_in_slices_give_the_products_of_whole_ones(monkeypatch: pytest.MonkeyPatch, d: int) -> None:
    pre = random_pre(3, 40, 30, 0.3, torch.float32)
    generator = torch.Generator().manual_seed(4)
    a, W = (torch.randn(rows, d, generator=generator) for rows in pre.shape)
    found = []
    for reread in (10**9, 0):
        monkeypatch.setattr(matmul_module, "_REREAD", reread)
        monkeypatch.setattr(matmul_module, "_MANY", 0)
        monkeypatch.setattr(matmul_module, "_SLICE_BYTES", 1)
        codes = SparseCodes(pre, pre > 0, true_positions(pre > 0), all_positive=True)
        found.append((codes.decode(W), codes.accumulate(codes.value, a), codes.sampled(a, W)))
        assert len(matmul_module._slices(W, codes.value.numel())) == (1 if reread else -(-d // 32))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    torch.testing.assert_close(found[0][2], found[1][2])
    torch.testing.assert_close(found[1][2], (a @ W.t())[pre > 0], rtol=1e-4, atol=1e-5)


@given(**shapes)
def test_other_tokens_codes_are_found(seed: int, n: int, f: int, share: float) -> None:
    pre = random_pre(seed, n, f, share)
    mask = pre > 0.5  # some positive entries are not active, as in topk
    rows = torch.randint(n, (n,), generator=torch.Generator().manual_seed(seed))
    selected = SparseCodes(pre, mask, true_positions(mask), all_positive=False)
    torch.testing.assert_close(selected.at_rows(rows), (pre * mask)[rows][mask])
    mask = pre > 0
    positive = SparseCodes(pre, mask, true_positions(mask), all_positive=True)
    torch.testing.assert_close(positive.at_rows(rows), torch.relu(pre)[rows][mask])
    per_token = torch.arange(float(n), dtype=pre.dtype)
    torch.testing.assert_close(positive.row_sums(positive.of_rows(per_token)), per_token * mask.sum(1))


@given(**shapes, k=st.integers(1, 6), over_batch=st.booleans())
def test_largest_keeps_what_topk_keeps(seed: int, n: int, f: int, share: float, k: int, over_batch: bool) -> None:
    pre = random_pre(seed, n, f, share)
    k = min(k, f)
    mask, flat = largest(pre, k, over_batch=over_batch)
    flattened = pre.view(1, -1) if over_batch else pre
    kept = flattened.topk(k * n if over_batch else k)
    expected = torch.zeros_like(flattened).scatter_(1, kept.indices, kept.values.clamp(min=0)).view(n, f)
    assert torch.equal(pre * mask, expected)
    assert torch.equal(flat, mask.view(-1).nonzero().view(-1))


def test_largest_keeps_exactly_k_of_equal_values() -> None:
    mask, flat = largest(torch.ones(3, 64), 4, over_batch=False)
    assert mask.sum(1).tolist() == [4, 4, 4]
    assert flat.numel() == 12
    assert largest(torch.ones(3, 64), 4, over_batch=True)[0].sum() == 12


@given(seed=st.integers(0, 99), length=st.integers(0, 300), share=st.sampled_from([0.0, 0.01, 0.1, 1.0]))
def test_true_positions_are_those_of_nonzero(seed: int, length: int, share: float) -> None:
    mask = torch.rand(length, generator=torch.Generator().manual_seed(seed)) < share
    assert torch.equal(true_positions(mask), mask.nonzero().view(-1))


@pytest.mark.parametrize(("share", "kind"), [(0.05, SparseCodes), (0.5, DenseCodes)])
@pytest.mark.parametrize("activation", [Activation("relu"), Activation("topk", k=512)])
def test_the_kind_of_codes_follows_their_density(activation: Activation, share: float, kind: type) -> None:
    assert isinstance(codes_of(random_pre(0, 256, 600, share), activation), kind)
    assert isinstance(codes_of(random_pre(0, 20, 600, share), activation), DenseCodes)  # too small to be worth it


def test_product_agrees_with_the_plain_one() -> None:
    a, W, bias = torch.randn(5, 24), torch.randn(32, 24), torch.randn(32)
    torch.testing.assert_close(product(a, W, bias), a @ W.t() + bias)
    torch.testing.assert_close(product(a.double(), W.double()), a.double() @ W.t().double())


def test_factors_may_be_bfloat16_while_results_are_not() -> None:
    a, W, bias = torch.randn(5, 24), torch.randn(32, 24), torch.randn(32)
    rounded = a.bfloat16().double() @ W.bfloat16().double().t()
    for result, expected in (
        (product(a, W, bias, torch.bfloat16), rounded + bias),
        (matmul(a, W.t(), torch.bfloat16), rounded),
    ):
        assert result.dtype == torch.float32
        torch.testing.assert_close(result.double(), expected, rtol=2**-7, atol=0.02)
