"""What every registered metric keeps to, and what the decorator says to one that does not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tcsae.errors import RunError, UsageError
from tcsae.evaluate import cost
from tcsae.evaluate.intervals.bootstrap import Resampler
from tcsae.evaluate.metrics import fidelity
from tcsae.evaluate.metrics.active_entries import ActiveEntries
from tcsae.evaluate.metrics.all import AllMetrics, definitions, families, memory_over_weights
from tcsae.evaluate.metrics.by_scope import ByScope
from tcsae.evaluate.metrics.registry import METRICS, metric
from tcsae.evaluate.protocol import Findings
from tcsae.evaluate.results import NO_INTERVAL, Definition
from tcsae.registry import Registry
from worlds import batch_of, fake_sae, value

MEASURED_IN_THE_PASS = [name for name in METRICS if METRICS.get(name).accumulator]
F = 6


def lively_text(rows: int = 48, context: int = 24):
    """Features that last for some tokens, five kinds of token, a document and a unit per row."""
    generator = torch.Generator().manual_seed(0)
    fires = torch.rand(rows, context, F, generator=generator) < 0.4
    fires[:, 1:] |= fires[:, :-1] & (torch.rand(rows, context - 1, F, generator=generator) < 0.3)
    z = fires * (1 + torch.rand(rows, context, F, generator=generator))
    tokens = torch.randint(0, 5, (rows, context), generator=generator)
    x = torch.randn(rows, context, 4, generator=generator)
    return z, tokens, x


def measure(name: str, *, rows_per_batch: int = 48, valid_BT=None, rows: int = 48) -> Findings:
    z, tokens, x = (part[:rows] for part in lively_text())
    found = AllMetrics(fake_sae(F), {name: METRICS.get(name)}, context=24, seed=0)
    for start in range(0, len(z), rows_per_batch):
        part = slice(start, start + rows_per_batch)
        valid = None if valid_BT is None else valid_BT[part]
        batch = batch_of(z[part], tokens_BT=tokens[part], x_BTD=x[part], valid_BT=valid, first_row=start)
        found.update(batch, ActiveEntries.from_dense(z[part], batch.valid_BT), x[part])
    return found.result()


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_says_what_it_means(name):
    family = METRICS.get(name)
    assert family.definitions
    assert set(family.by_part) <= set(family.definitions)
    for key, one in family.definitions.items():
        assert len(one.text) > 10, key
        assert one.unit, key
        assert one.better in (None, "lower", "higher"), key
        assert not one.interval.startswith(NO_INTERVAL) or len(one.interval) > len(NO_INTERVAL) + 10, key
        assert one.label or not one.group, f"{key} heads a column"


@pytest.mark.parametrize("name", MEASURED_IN_THE_PASS)
def test_every_metric_has_the_interval_that_its_definition_names(name):
    found = measure(name)
    resampler = Resampler.of(np.arange(48), seed=0)
    metrics = {key: resampler.metric(sums) for key, sums in found.sums.items()} | found.metrics
    assert set(metrics) == {key for key in METRICS.get(name).definitions if key in metrics}
    assert metrics
    for key, one in metrics.items():
        assert one.value is not None, key
        assert one.unit == METRICS.get(name).definitions[key].unit, key
        without = METRICS.get(name).definitions[key].interval.startswith(NO_INTERVAL)
        assert (one.low is None) == without, key
        assert without or one.low <= one.value <= one.high, key


@pytest.mark.parametrize("name", MEASURED_IN_THE_PASS)
def test_no_metric_depends_on_the_size_of_the_batches(name):
    whole, parts = measure(name), measure(name, rows_per_batch=5)
    assert set(whole.sums) == set(parts.sums)
    for key, sums in whole.sums.items():
        assert value(sums) == pytest.approx(value(parts.sums[key]), rel=1e-9), key
    for key, one in whole.metrics.items():
        assert one.value == pytest.approx(parts.metrics[key].value, rel=1e-6), key


@pytest.mark.parametrize("alternate", [True, False], ids=["no pair", "no token"])
@pytest.mark.parametrize("name", MEASURED_IN_THE_PASS)
def test_every_metric_works_where_no_pair_counts(name, alternate):
    valid = torch.zeros(48, 24, dtype=torch.bool)
    valid[:, ::2] = alternate
    found = measure(name, valid_BT=valid)
    for sums in found.sums.values():
        assert np.isfinite(sums.numerator_U).all()
    for one in found.metrics.values():
        assert one.value is None or np.isfinite(one.value)


def test_no_two_metrics_share_a_name():
    parts = [fidelity.definitions(), cost.DEFINITIONS, *(family.definitions for family in families().values())]
    assert len(definitions()) == sum(len(part) for part in parts)


# --- plain functions


@pytest.fixture
def registered():
    """Register metrics for one test only."""
    before = dict(METRICS._entries)
    yield
    METRICS._entries.clear()
    METRICS._entries.update(before)


def test_a_function_of_pairs_equals_the_slow_way(registered):
    @metric("drop", over="pairs", text="mean fall of the first feature, over pairs in which it is active", unit="1")
    def drop(first, second):
        active = first.z[:, 0] > 0
        return (first.z - second.z)[:, 0] / first.z[:, 0], active

    found = measure("drop", rows_per_batch=7)
    z, *_ = lively_text()
    slow = [
        float((row[t, 0] - row[t + 1, 0]) / row[t, 0]) for row in z for t in range(1, 23) if row[t, 0] > 0
    ]  # position 0 is special
    assert value(found.sums["drop"]) == pytest.approx(np.mean(slow))
    assert found.sums["drop"].n == len(slow)


def test_a_function_of_tokens_sees_everything_that_counts(registered):
    @metric("seen", over="tokens", text="checks what a metric is given, token by token", unit="1")
    def seen(tokens):
        assert tokens.z.shape == (len(tokens), F)
        assert tokens.x.shape == tokens.x_hat.shape == (len(tokens), 4)
        assert torch.equal(tokens.unit, tokens.document)
        assert int(tokens.token.max()) < 5
        assert int(tokens.position.min()) == 1
        return (tokens.x - tokens.x_hat).square().sum(1) + 2.0

    found = measure("seen")
    assert value(found.sums["seen"]) == 2
    assert found.sums["seen"].n == 48 * 23
    assert METRICS.get("seen").by_part == ("seen",)


def test_a_function_is_measured_of_each_part_of_the_dictionary_too(registered):
    @metric("size", over="tokens", text="mean size of the features together", unit="1", label="size", group="mine")
    def size(tokens):
        return tokens.z.sum(1)

    z, tokens, x = lively_text()
    sae = fake_sae(F)
    sae.decode = lambda z_BTF: z_BTF @ sae.W_dec
    found = ByScope(sae, {"size": METRICS.get("size")}, context=24, seed=0, inside=2)
    batch = batch_of(z, tokens_BT=tokens, x_BTD=x)
    found.update(batch, ActiveEntries.from_dense(z, batch.valid_BT), x)
    sums = found.result().sums
    for name, part in (("high", z[:, 1:, :2]), ("low", z[:, 1:, 2:])):
        assert value(sums[f"size_{name}"]) == pytest.approx(float(part.sum(2).mean()))
        assert found.definitions[f"size_{name}"].label == f"size, {name}"
        assert found.definitions[f"size_{name}"].group == "", "parts stand in the table of all metrics"


def test_a_function_that_gives_something_else_is_told_what_is_wanted(registered):
    for at, (values, error, words) in enumerate(
        [
            (lambda first, second: first.z, UsageError, r"gives \(1056, 6\) for 1056 pairs: return a tensor of that"),
            (lambda first, second: 1.0, UsageError, "gives float for 1056 pairs"),
            (lambda first, second: first.x[:, 0] / 0, RunError, "where it is undefined, return a denominator of 0"),
        ]
    ):
        metric(f"wrong{at}", over="pairs", text="something that is not a value for every pair")(values)
        with pytest.raises(error, match=words):
            measure(f"wrong{at}")


def test_what_is_missing_is_named(registered):
    for wrong, words in (
        (lambda: metric("a", over="pairs")(lambda one, two: one), "has no definition: say what it means with text="),
        (lambda: metric("a", over="model")(lambda context: Findings()), "give definitions="),
        (lambda: metric("a")(lambda context: None), "is a function: say over='tokens'"),
        (lambda: metric("a")(type("Empty", (), {"definitions": {}})), "has no 'update': a class needs"),
        (lambda: metric("temporal", over="tokens", text="taken")(len), "registered by this program already"),
    ):
        with pytest.raises(UsageError, match=words):
            wrong()


def test_a_finding_without_a_definition_and_a_name_taken_twice_are_refused(registered):
    class Forgetful:
        definitions = {"known": Definition(text="what it says", unit="1")}  # noqa: RUF012

        def __init__(self, sae, *, context, seed):
            pass

        def update(self, batch, active, x_hat_BTD):
            pass

        def result(self):
            return Findings(metrics={"other": measure("features").metrics["alive"]})

    metric("forgetful")(Forgetful)
    with pytest.raises(UsageError, match="finds 'alive', which its definitions do not have"):
        measure("forgetful")
    metric("ce", over="tokens", text="takes the name of a metric of fidelity")(lambda tokens: tokens.z[:, 0])
    with pytest.raises(UsageError, match="both 'fidelity' and 'ce' define a metric 'ce'"):
        families()


def test_one_evaluation_does_not_see_the_plugins_of_another(registered):
    METRICS._owners["theirs"] = "/somewhere/theirs.py"
    METRICS._entries["theirs"] = METRICS.get("features")
    try:
        assert "theirs" not in METRICS.among({})
        assert "theirs" in METRICS.among({"theirs.py": "hash"})
        assert Registry.kinds("theirs.py") == {"metric"}
    finally:
        del METRICS._owners["theirs"]


def test_what_metrics_hold_of_a_feature_is_counted_beside_its_weights():
    of_all = families()
    short, long, wide = (memory_over_weights(of_all, *facts) for facts in ((128, 576), (1024, 576), (128, 2304)))
    assert 1 < wide < short < long
    assert memory_over_weights({}, 128, 576) == 1
