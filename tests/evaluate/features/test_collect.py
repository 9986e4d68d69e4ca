from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tcsae.evaluate.features.cards import AFTER, BEFORE, CardSource, choose
from tcsae.evaluate.features.collect import RANDOM, STRONGEST, FeatureBrowser
from tcsae.evaluate.metrics.active_entries import ActiveEntries
from tcsae.evaluate.protocol import Accumulator, TokenBatch

R, T, D, F, V = 40, 96, 6, 20, 50  # rows, positions, width, features, vocabulary


class Text:
    """Rows of tokens, two documents each, with the features an SAE would have on them; counts what is encoded again."""

    def __init__(self):
        torch.manual_seed(0)
        z_RTF = torch.relu(torch.randn(R, T, F) - 2.2)
        z_RTF[..., 0] = 0.0  # dead
        z_RTF[..., 1] = torch.rand(R, T) + 0.5  # always on
        z_RTF[5, :, 2] = torch.linspace(0, 9, T)
        self.z_RTF = z_RTF
        self.tokens_RT = np.random.default_rng(0).integers(0, V, (R, T))
        self.documents_RT = np.repeat(np.arange(2 * R).reshape(R, 2), T // 2, axis=1)
        self.valid_RT = torch.ones(R, T, dtype=torch.bool)
        self.valid_RT[:, 0] = False
        self.per_feature: dict[str, np.ndarray] = {}
        self.encoded: list[int] = []
        self.head_DV = torch.randn(D, V)

    def tokens_of(self, rows):
        return self.tokens_RT[list(rows)]

    def documents_of(self, rows):
        return self.documents_RT[list(rows)]

    def encode_rows(self, rows):
        assert len(rows) <= 16
        self.encoded += rows
        return self.z_RTF[list(rows)]

    def token_text(self, token):
        return f" t{token}"

    def logit_effects(self, directions_ND):
        return directions_ND @ self.head_DV


@pytest.fixture
def text() -> Text:
    return Text()


@pytest.fixture
def sae():
    return SimpleNamespace(W_dec=torch.randn(F, D, generator=torch.Generator().manual_seed(1)), n_features=F)


def passed(text: Text, sae, rows_per_batch=7, **options):
    found = FeatureBrowser(sae, seed=3, **options)
    for start in range(0, R, rows_per_batch):
        rows = slice(start, min(start + rows_per_batch, R))
        z_BTF = text.z_RTF[rows].clone()
        z_BTF[:, 0] = 99.0  # whatever a special position holds must not matter
        whole = torch.zeros(len(z_BTF), T, dtype=torch.int64)
        batch = TokenBatch(
            x_BTD=torch.zeros(len(z_BTF), T, D),
            tokens_BT=whole,
            documents_BT=whole,
            units_BT=whole,
            valid_BT=text.valid_RT[rows],
            real_BT=text.valid_RT[rows],
            rows_B=torch.arange(R)[rows],
            labels_BT=whole - 1,
            classes_BT=whole - 1,
        )
        found.update(batch, ActiveEntries.from_dense(z_BTF, batch.valid_BT), torch.zeros(len(z_BTF), T, D))
    return found


def cards_of(text, sae, **options):
    source: CardSource = text
    return {card.feature: card for card in passed(text, sae, **options).cards(source)}


def test_it_is_an_accumulator_without_findings(text, sae):
    found: Accumulator = passed(text, sae)
    assert found.result().metrics == {}
    assert {"feature_lag_curve", "feature_position_profile"} <= set(found.definitions)
    assert FeatureBrowser(sae, seed=0).cards(text) == []  # before the first batch


@pytest.mark.parametrize("rows_per_batch", [1, 7, R])
def test_strongest_rows_are_those_of_a_full_search(text, sae, rows_per_batch):
    seen = passed(text, sae, rows_per_batch)._seen
    assert seen is not None
    masked = text.z_RTF.clone()
    masked[:, 0] = 0
    for feature in range(F):
        peaks = masked[..., feature].amax(dim=1)
        expected = [int(r) for r in peaks.argsort(descending=True) if peaks[r] > 0][:STRONGEST]
        found = seen.strongest.places(feature, "strongest")
        assert [place.row for place in found] == expected
        assert [place.position for place in found] == [int(masked[row, :, feature].argmax()) for row in expected]
    np.testing.assert_array_equal(seen.known({})["density"], (masked > 0).sum((0, 1)).numpy() / (R * (T - 1)))


def test_random_rows_fire_and_are_no_repetition(text, sae):
    seen = passed(text, sae)._seen
    assert seen is not None
    places = seen.places(4)
    rows = [place.row for place in places]
    assert len(rows) == len(set(rows))
    assert STRONGEST < len(places) <= STRONGEST + RANDOM
    assert {place.chosen for place in places[STRONGEST:]} == {"random"}
    assert all(text.z_RTF[place.row, place.position, 4] > 0 for place in places)
    assert seen.places(0) == []


def test_passages_hold_the_text_and_the_activation_of_one_document(text, sae):
    card = cards_of(text, sae, n_cards=F)[2]
    passage = card.passages[0]
    row, start, n = 5, passage.position, len(passage.tokens)
    assert passage.tokens == [f" t{t}" for t in text.tokens_RT[row, start : start + n]]
    assert passage.activations == pytest.approx(text.z_RTF[row, start : start + n, 2].tolist(), rel=1e-3)
    assert passage.position + passage.peak == T - 1
    assert start >= T // 2  # the row's second document begins there
    assert passage.document == 11
    assert n <= BEFORE + AFTER + 1
    assert [p.chosen for p in card.passages].index("random") >= 1


def test_dead_features_get_no_card(text, sae):
    assert set(cards_of(text, sae, n_cards=100)) == set(range(1, F))


def test_few_rows_are_encoded_and_each_once(text, sae):
    cards = cards_of(text, sae, n_cards=F, max_rows=18)
    assert len(text.encoded) == len(set(text.encoded)) == 18
    assert sum(bool(card.passages) for card in cards.values()) >= 16


def test_what_others_measured_is_shown(text, sae):
    text.per_feature = {
        "eta_squared": np.linspace(0, 1, F),
        "lag_autocorrelation": np.tile([0.5, np.nan, 0.1], (F, 1)),
        "position_mean": np.full((F, T), 0.25),
        "neighbour": (np.arange(F) + 1) % F,
        "neighbour_cosine": np.where(np.arange(F) == 7, np.nan, 0.75),
    }
    cards = cards_of(text, sae, n_cards=F)
    assert cards[3].numbers["eta_squared"] == pytest.approx(3 / 19, rel=1e-3)
    assert set(cards[3].numbers) == {"density", "max_activation", "eta_squared", "lag1_autocorrelation"}
    assert cards[3].numbers["lag1_autocorrelation"] == 0.5
    assert cards[3].lag_curve is not None
    assert cards[3].lag_curve.y == [0.5, None, 0.1]
    assert cards[3].position_profile is not None
    assert len(cards[3].position_profile.y) == T
    assert (cards[3].neighbours[0].feature, cards[3].neighbours[0].cosine) == (4, 0.75)
    assert cards[7].neighbours == []


def test_without_others_the_cards_still_come(text, sae):
    card = cards_of(text, sae, n_cards=F)[1]
    assert card.lag_curve is None
    assert card.position_profile is None
    assert card.numbers["density"] == 1.0


def test_logit_effects_are_the_extremes_in_order(text, sae):
    card = cards_of(text, sae, n_cards=F)[6]
    effects = sae.W_dec[6] @ text.head_DV
    assert card.raises[0].token == f" t{int(effects.argmax())}"
    assert card.lowers[0].effect == pytest.approx(float(effects.min()), rel=1e-3)
    assert [e.effect for e in card.raises] == sorted((e.effect for e in card.raises), reverse=True)


def test_half_of_the_choice_is_random_and_the_rest_says_why():
    rng = np.random.default_rng(0)
    known = {
        "density": rng.random(1000),
        "max_activation": rng.random(1000),
        "eta_squared": np.where(np.arange(1000) < 900, np.nan, rng.random(1000)),
        "lag_autocorrelation": rng.random((1000, 3)),
    }
    chosen = choose(known, 60, seed=1)
    reasons = list(chosen.values())
    assert len(chosen) == 60
    assert reasons.count("chosen at random") == 30
    assert {reasons.count(why) for why in set(reasons) - {"chosen at random"}} == {6}
    positional = [feature for feature, why in chosen.items() if why == "most position-dependent"]
    assert min(positional) >= 900
    assert chosen == choose(known, 60, seed=1)
    assert chosen != choose(known, 60, seed=2)
