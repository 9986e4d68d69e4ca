"""Statistics against plain loops, kept and thrown away when they should be, and the same however they are split."""

import dataclasses

import numpy as np
import pytest
import torch
from clusters import LOCAL
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import cache_statistics
from stores import grow_store, make_block, make_manifest, make_store, write_rows
from tcsae.cache import statistics as module
from tcsae.cache.format.layout import PADDING, RowBlock, StoreLayout, to_bits
from tcsae.cache.statistics import STATISTICS, Moments, StoreStatistics, cached_statistics, kept_norms, merge
from tcsae.cache.store import ActivationStore
from tcsae.cache.writer import StoreSetWriter
from tcsae.errors import StoreError, TcsaeError


def close(found: StoreStatistics, x, flags):
    wanted = cache_statistics(x, flags)
    assert (found.n_tokens, found.n_over_norm) == (wanted["n"], wanted["over"])
    assert found.median_norm == pytest.approx(wanted["median"], rel=5e-4)
    np.testing.assert_allclose(found.mean_D, wanted["mean"], rtol=1e-5, atol=1e-6)
    assert found.variance == pytest.approx(wanted["variance"], rel=1e-5)
    assert found.mean_square_norm == pytest.approx(wanted["mean_square"], rel=1e-5)
    assert found.rms_scale**2 * found.mean_square_norm == pytest.approx(x.shape[-1])


def store_of(folder, x, flags=None):
    """A store of given activations."""
    rows, context, d_model = x.shape
    block = make_block(rows, context)
    block = RowBlock(block.tokens_BT, block.documents_BT, block.flags_BT if flags is None else flags)
    layout = StoreLayout(d_model, context, 2, 6)
    with StoreSetWriter.open({3: folder}, {3: make_manifest(layout=layout, planned_rows=rows)}) as writer:
        write_rows(writer, block, {3: to_bits(x)})
    return ActivationStore.open(folder)


def test_they_are_what_plain_loops_give(tmp_path):
    store = ActivationStore.open(make_store(tmp_path, rows=45))
    found = store.statistics()
    x, flags = store.rows(0, 45, dtype=torch.float64), store.flags(0, 45)
    close(found, x, flags)
    norms = x.norm(dim=-1).numpy()
    np.testing.assert_allclose(found.mean_norm_by_position_T, norms.mean(0), rtol=1e-5)
    assert found.special_mean_norm == pytest.approx(norms[:, 0].mean(), rel=1e-5)
    assert (found.n_special, found.n_nonfinite, found.rows) == (45, 0, 45)


def test_massive_activations_are_counted_and_left_out(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(30, 8, 4) + 3
    x[::7, 3] *= 1000
    x[:6] *= 5  # the sample's median is far from the whole store's: the guess must be corrected
    store = store_of(tmp_path / "s", x)
    found = store.statistics()
    assert found.n_over_norm == 5
    close(found, store.rows(0, 30, dtype=torch.float64), store.flags(0, 30))


def test_a_wrong_guess_of_the_limit_is_put_right(tmp_path, monkeypatch):
    torch.manual_seed(1)
    x = torch.randn(24, 8, 4) * torch.logspace(-1, 1.5, 24)[:, None, None]
    store = store_of(tmp_path / "s", x)
    for guess in (1e-3, 1e3):
        monkeypatch.setattr(module, "_sampled_median", lambda _, guess=guess: guess)
        found = module._compute(store, "synchronous")
        close(found, store.rows(0, 24, dtype=torch.float64), store.flags(0, 24))


def test_a_mean_far_from_zero_loses_no_variance(tmp_path):
    torch.manual_seed(2)
    x = (torch.randn(24, 8, 4) + 128).bfloat16().double()
    found = store_of(tmp_path / "s", x.float()).statistics()
    ordinary = x[:, 1:].reshape(-1, 4)
    assert found.variance == pytest.approx(float(ordinary.var(0, unbiased=False).sum()), rel=1e-6)


def test_padding_and_nonfinite_tokens_are_left_out_and_said(tmp_path):
    torch.manual_seed(3)
    x = torch.randn(12, 6, 4)
    flags = make_block(12, 6).flags_BT
    flags[:, 5] = PADDING
    x[:, 5] = 0
    x[4, 2, 1] = float("inf")
    found = store_of(tmp_path / "s", x, flags).statistics()
    assert found.has_nonfinite
    assert found.n_nonfinite == 1
    assert found.n_tokens == 12 * 4 - 1
    assert np.isnan(found.mean_norm_by_position_T[5])
    assert StoreStatistics.from_json(found.to_json()).to_json() == found.to_json()


def test_they_are_kept_until_the_store_grows(tmp_path, monkeypatch):
    path = make_store(tmp_path, rows=45)
    store = ActivationStore.open(path)
    assert cached_statistics(store) is None
    found = store.statistics()
    monkeypatch.setattr(module, "_compute", lambda *_: pytest.fail("computed twice"))
    again = ActivationStore.open(path).statistics()
    assert again.to_json() == found.to_json()
    np.testing.assert_allclose(
        kept_norms(store, 2, 13)[:, 0], store.rows(32, 45).double().norm(dim=-1)[:, 0], rtol=1e-5
    )
    monkeypatch.undo()
    grown = ActivationStore.open(grow_store(path, 60))
    assert cached_statistics(grown) is None
    assert kept_norms(grown, 2, 16) is None
    assert grown.statistics().rows == 60


@pytest.mark.parametrize(
    "change", [lambda s: s[:-30], lambda s: s.replace(b"rows", b"Rows"), lambda s: b"[]", lambda s: b"{"]
)
def test_damaged_ones_are_computed_again(tmp_path, change):
    store = ActivationStore.open(make_store(tmp_path, rows=20))
    found = store.statistics()
    file = tmp_path / "l3.zarr" / STATISTICS
    file.write_bytes(change(file.read_bytes()))
    assert cached_statistics(store) is None
    assert store.statistics().to_json() == found.to_json()
    assert cached_statistics(store) is not None


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 9), max_size=6), st.integers(0, 2**31))
def test_moments_merge_in_any_split(sizes, seed):
    x = torch.randn(sum(sizes), 3, generator=torch.Generator().manual_seed(seed)) * 3 + 50
    whole, parts = Moments.of(x), merge((Moments.of(part) for part in x.split(sizes)), 3)
    assert whole.n == parts.n
    np.testing.assert_allclose(parts.mean_D, whole.mean_D, rtol=1e-6)
    assert parts.m2 == pytest.approx(whole.m2, rel=1e-4, abs=1e-6)


def test_threads_and_one_after_the_other_agree(tmp_path):
    store = ActivationStore.open(make_store(tmp_path, rows=64))
    one, other = (module._compute(store, scheduler) for scheduler in ("threads", "synchronous"))
    assert dataclasses.asdict(one).keys() == dataclasses.asdict(other).keys()
    assert one.to_json() == other.to_json()


def test_a_cluster_gives_the_same_and_a_missing_one_a_sentence(tmp_path):
    from distributed import LocalCluster

    store = ActivationStore.open(make_store(tmp_path, rows=64))
    one = module._compute(store, "synchronous")
    with LocalCluster(n_workers=1, processes=False, **LOCAL | {"threads_per_worker": 2}) as cluster:
        assert module._compute(store, cluster.scheduler_address).to_json() == one.to_json()
    with pytest.raises(TcsaeError, match="no Dask scheduler answers at nonsense"):
        module._compute(store, "nonsense://127.0.0.1:1")


def test_a_store_without_rows_has_none(tmp_path):
    with StoreSetWriter.open({3: tmp_path / "s"}, {3: make_manifest(planned_rows=0)}) as writer:
        writer.finish()
    with pytest.raises(StoreError, match="holds no rows"):
        ActivationStore.open(tmp_path / "s").statistics()
