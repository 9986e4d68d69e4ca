from dataclasses import replace

import numpy as np
import pytest
import torch
from reference import eval_reconstruction
from tcsae.cache.format.layout import PADDING, SPECIAL, RowBlock
from tcsae.errors import TextError
from tcsae.evaluate.intervals.bootstrap import Resampler
from tcsae.evaluate.metrics.fidelity import OUTLIERS, Fidelity, definitions, predictions
from tcsae.evaluate.metrics.saebench import SAEBenchSums
from tcsae.evaluate.model.heldout_text import HeldOutText, number_units
from tcsae.evaluate.model.reference_rows import replacement, spliced_in, untrained_sae
from tcsae.evaluate.protocol import TokenBatch, UnitSums
from tcsae.train.sae.activation import Activation
from tcsae.train.sae.temporal_sae import TemporalSAE


def a_text(rows=6, context=9, documents=3, seed=0) -> HeldOutText:
    rng = np.random.default_rng(seed)
    numbers = np.sort(rng.integers(0, documents, (rows, 1)) * np.ones((1, context), dtype=int), axis=0)
    flags = np.zeros((rows, context), np.uint8)
    flags[:, 0] = SPECIAL
    flags[-1, -2:] = PADDING
    block = RowBlock(rng.integers(1, 50, (rows, context)).astype(np.int32), numbers.astype(np.int32), flags)
    return HeldOutText.gather([block], rows)


def a_batch(text: HeldOutText, d_model=5, seed=0, limit=float("inf")) -> TokenBatch:
    x = torch.randn(*text.tokens_RT.shape, d_model, generator=torch.Generator().manual_seed(seed)) + 2
    x[1, 3] *= 50
    return text.batch(slice(0, len(text)), x, limit)


@pytest.mark.parametrize("limit", [float("inf"), 40.0])
def test_reconstruction_metrics_equal_the_reference(limit):
    text = a_text()
    sae = untrained_sae(5, 0)
    fidelity = Fidelity(torch.full((5,), 1.5), sae.W_dec.norm(dim=1))
    batch = a_batch(text, limit=limit)
    for rows in (slice(0, 2), slice(2, 6)):
        part = TokenBatch(*(getattr(batch, name)[rows] for name in TokenBatch.__dataclass_fields__))
        z = sae.encode(part.x_BTD)
        fidelity.add_reconstruction(part, sae.decode(z).detach(), z.detach())
    resampler = Resampler.of(text.unit_documents, 0)
    sums = fidelity.sums()
    for suffix, mask in (("", batch.real_BT), (OUTLIERS, batch.valid_BT)):
        expected = eval_reconstruction(batch.x_BTD[mask], sae)
        for name, value in expected.items():
            metric = resampler.metric(sums[name + suffix])
            assert metric.value == pytest.approx(value, rel=1e-5), name + suffix
            assert metric.n == int(mask.sum()), name + suffix
            assert metric.definition in definitions()
    assert (limit < 100) == (int(batch.valid_BT.sum()) < int(batch.real_BT.sum()))


def test_an_sae_that_gives_nothing_has_no_cosine_and_no_bias():
    text = a_text()
    sae = TemporalSAE(5, 5, Activation("relu")).eval()
    fidelity = Fidelity(torch.zeros(5), sae.W_dec.norm(dim=1))
    batch = a_batch(text)
    z = sae.encode(batch.x_BTD)
    fidelity.add_reconstruction(batch, sae.decode(z).detach(), z.detach())
    metrics = {name: Resampler.of(text.unit_documents, 0).metric(one) for name, one in fidelity.sums().items()}
    assert metrics["cosine"].value is None
    assert metrics["cosine"].n == 0
    assert metrics["relative_reconstruction_bias"].value is None
    assert metrics["l0"].value == 0.0
    assert metrics["norm_ratio"].value == 0.0
    without_features = Fidelity(torch.zeros(5), None)
    without_features.add_reconstruction(batch, batch.x_BTD, None)
    metric = Resampler.of(text.unit_documents, 0).metric(without_features.sums()["l0"])
    assert (metric.value, metric.n) == (None, 0)


def test_negative_codes_are_active_too():
    """Temporal Feature Analysis predicts codes times a projection, which may be negative."""
    text, batch = a_text(), a_batch(a_text())
    z = untrained_sae(5, 0).encode(batch.x_BTD).detach()
    found = []
    for sign in (1, -1):
        fidelity = Fidelity(torch.zeros(5), torch.ones(z.shape[-1]))
        fidelity.add_reconstruction(batch, batch.x_BTD, sign * z)
        sums = fidelity.sums()
        found.append([Resampler.of(text.unit_documents, 0).metric(sums[name]).value for name in ("l0", "l1")])
    assert found[0] == found[1]
    assert min(found[0]) > 0


def test_the_papers_table_is_an_untrained_sae():
    """As many features as dimensions, on activations of layer 19's norm: L0 ≈ k/2, L1 ≈ 8260 at k = 2304,
    cosine ≈ 0.
    """
    d = 512
    x = torch.randn(400, d, generator=torch.Generator().manual_seed(3))
    x = x / x.norm(dim=-1, keepdim=True) * 308
    sae = untrained_sae(d, 0)
    with torch.no_grad():
        z = sae.encode(x)
        x_hat = sae.decode(z)
    assert (z > 0).sum(-1).float().mean() == pytest.approx(d / 2, rel=0.02)
    assert torch.nn.functional.cosine_similarity(x, x_hat).mean() == pytest.approx(0, abs=0.01)
    # E relu of a normal of variance 2‖x‖²/d, times d features: 0.4 · √(2/d) · 308 · d; 8260 for d = 2304.
    assert z.sum(-1).mean() == pytest.approx(0.39894 * 308 * (2 * d) ** 0.5, rel=0.02)
    assert pytest.approx(8256, rel=0.02) == 0.39894 * 308 * (2 * 2304) ** 0.5


def test_predictions_count_only_real_inputs_and_targets_of_one_document():
    tokens = torch.arange(6)[None]
    documents = torch.tensor([[0, 0, 0, 1, 1, 1]])
    real = torch.tensor([[False, True, True, True, True, False]])
    counted, targets = predictions(tokens, documents, real)
    assert counted.tolist() == [[False, True, False, True, False, False]]
    assert targets[0, 1] == 2


def test_special_positions_keep_their_activation_except_in_zero_all():
    text = a_text()
    batch = a_batch(text)
    for name in ("identity_bf16", "zero", "mean", "previous_token", "zero_all"):
        spliced = spliced_in(name, batch, replacement(name, batch, torch.ones(5)))
        kept = torch.equal(spliced[~batch.real_BT], batch.x_BTD[~batch.real_BT])
        assert kept == (name != "zero_all")
    zero = replacement("zero", batch, torch.ones(5))
    assert (spliced_in("zero", batch, zero)[batch.real_BT] == 0).all()
    rounded = replacement("identity_bf16", batch, torch.ones(5))
    assert 0 < (rounded - batch.x_BTD).abs().max() < 0.01 * batch.x_BTD.abs().max()


def test_previous_token_stays_inside_the_document():
    batch = a_batch(a_text())
    documents = batch.documents_BT.clone()
    documents[0, 5:] = 99
    batch = replace(batch, documents_BT=documents)
    mean = torch.ones(5)
    moved = replacement("previous_token", batch, mean)
    assert torch.equal(moved[0, 1], mean)  # before it stands BOS
    assert torch.equal(moved[0, 2], batch.x_BTD[0, 1])
    assert torch.equal(moved[0, 5], mean)


def test_compat_block_equals_saebenchs_formulas():
    text = a_text(rows=8)
    batch = a_batch(text)
    sae = untrained_sae(5, 0)
    compat = SAEBenchSums()
    parts = []
    for rows in (slice(0, 4), slice(4, 8)):
        part = TokenBatch(*(getattr(batch, name)[rows] for name in TokenBatch.__dataclass_fields__))
        z = sae.encode(part.x_BTD).detach()
        compat.add_reconstruction(part, sae.decode(z).detach(), z)
        x = part.x_BTD[part.real_BT].double()
        parts.append((x, sae.decode(sae.encode(x.float())).detach().double()))
    ones = torch.ones(4)
    has_target = torch.tensor([True, True, True, False])
    compat.add_losses(has_target, ones * 2, ones * 3, torch.tensor([0.0, 1, 2, 5]))
    zero_all = SAEBenchSums()
    zero_all.add_losses(has_target, ones * 2, ones * 6, ones * 4)
    block = SAEBenchSums.from_state(compat.state()).result(zero_all)
    n = sum(len(x) for x, _ in parts)
    assert block["mse"] == pytest.approx(sum(float(((x - y) ** 2).sum()) / len(x) for x, y in parts) / n)
    energy = sum(float((x**2).sum(-1).mean()) for x, _ in parts) / 2
    error = sum(float(((x - y) ** 2).sum(-1).mean()) for x, y in parts) / 2
    element = sum(float((x**2).mean()) for x, _ in parts) / 2
    assert block["explained_variance"] == pytest.approx(1 - error / (energy - element**2), rel=1e-5)
    assert block["ce_loss_score"] == pytest.approx((6 - 3) / (6 - 2))
    assert block["kl_div_with_sae"] == pytest.approx(2.0)
    assert block["kl_div_score"] == pytest.approx((4 - 2) / 4)


def test_units_are_numbered_within_documents():
    documents = np.repeat(np.array([[7], [7], [8], [7]]), 600, axis=1)
    real = np.ones_like(documents, dtype=bool)
    units, owners = number_units(documents, real)
    assert units[:, 0].tolist() == [0, 0, 1, 2]
    assert owners.tolist() == [7, 8, 7]
    mixed, owners = number_units(np.array([[1, 1, 2, 2]]), np.ones((1, 4), bool))
    assert mixed.tolist() == [[0, 0, 1, 1]]
    assert owners.tolist() == [1, 2]


def test_text_without_rows_is_an_error_and_a_fingerprint_covers_every_token():
    with pytest.raises(TextError, match="no held-out text"):
        HeldOutText.gather([], 4)
    text = a_text()
    changed = a_text()
    changed.tokens_RT[2, 4] += 1
    assert text.fingerprint == a_text().fingerprint != changed.fingerprint


def ratio(above, below, **about) -> UnitSums:
    return UnitSums(np.asarray(above, float), np.asarray(below, float), "1", "kl", **about)


def test_bootstrap_over_documents_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        sizes = rng.integers(50, 150, 60)
        effects = rng.normal(0, 0.3, 60)
        sums = ratio([rng.normal(1.0 + effect, 1, n).sum() for n, effect in zip(sizes, effects, strict=True)], sizes)
        metric = Resampler.of(np.arange(60), trial, 300).metric(sums)
        hits += metric.low <= 1.0 <= metric.high
    assert 0.89 <= hits / 200 <= 0.99


def test_pairing_removes_what_both_share():
    rng = np.random.default_rng(1)
    shared, sizes = rng.normal(5, 2, 50) * 100, np.full(50, 100)
    first, second = ratio(shared + 10, sizes), ratio(shared + rng.normal(0, 1, 50), sizes)
    resampler = Resampler.of(np.arange(50), 0)
    paired = resampler.difference(first, second)
    alone = resampler.metric(first)
    assert paired.value == pytest.approx(0.1, abs=0.01)
    assert paired.high - paired.low < 0.05 * (alone.high - alone.low)
    assert paired.low > 0


def test_few_documents_are_cut_into_blocks_and_very_little_text_has_no_interval():
    documents = Resampler.of(np.repeat(np.arange(40), 3), 0)
    assert documents.what == "40 documents"
    assert documents.counts_RG.shape[1] == 40
    blocks = Resampler.of(np.repeat(np.arange(3), 10), 0)
    assert blocks.what.startswith("30 blocks of about 1,000 tokens")
    none = Resampler.of(np.arange(3), 0)
    one = Resampler.of(np.zeros(1, dtype=int), 0)
    assert (
        one.what == "nothing (too little text for intervals: 1 block of about 1,000 tokens (fewer than 30 documents))"
    )
    metric = none.metric(ratio([1, 2, 3], [1, 1, 1]))
    assert (metric.value, metric.low, metric.high) == (2.0, None, None)


def test_undefined_is_none_with_its_count():
    metric = Resampler.of(np.arange(40), 0).metric(ratio(np.zeros(40), np.zeros(40)))
    assert (metric.value, metric.n, metric.low) == (None, 0, None)


def test_the_same_seed_gives_the_same_interval():
    sums = ratio(np.arange(40), np.ones(40))
    one, two, other = (Resampler.of(np.arange(40), seed).metric(sums) for seed in (0, 0, 1))
    assert one == two != other
