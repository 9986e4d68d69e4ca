"""What is said of features from their codes is what the evaluation's own accumulators say, and what counting says."""

import json

import numpy as np
import pytest
import torch
from coded_runs import WIDTH, coded, random_run
from tcsae.errors import RunError, StoreError, UsageError
from tcsae.evaluate.codes.encode import EncodeConfig, encode_run
from tcsae.evaluate.codes.store import CodeStore
from tcsae.evaluate.features import catalogue
from tcsae.evaluate.features import survey as module
from tcsae.evaluate.features.catalogue import open_run
from tcsae.evaluate.features.search import search
from tcsae.evaluate.features.survey import Survey, nearest_rows, survey
from tcsae.evaluate.metrics.active_entries import ActiveEntries, matches, pair_masks
from tcsae.evaluate.metrics.features import FeatureStatistics
from tcsae.evaluate.metrics.lag_correlation import LagSums
from tcsae.evaluate.metrics.position import PositionStatistics
from tcsae.evaluate.protocol import TokenBatch
from tcsae.pipeline import main
from tcsae.train.sae.protocol import SparseAutoencoder


def whole(path):
    """All codes [R, T, F] and the text of a store of codes."""
    (part,) = list(CodeStore.open(path))
    z_RTF = np.stack([part.dense_row(row, np.arange(WIDTH)) for row in range(len(part.tokens_RT))])
    return z_RTF, part


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder, _ = coded(tmp_path_factory.mktemp("coded"), rows=60)
    encode_run(EncodeConfig(str(folder)))
    return folder


@pytest.fixture(scope="module")
def found(run) -> Survey:
    before = module._ENTRIES_AT_ONCE
    module._ENTRIES_AT_ONCE = 500  # in several pieces
    try:
        return survey(CodeStore.open(run / "codes.zarr"), str(run))
    finally:
        module._ENTRIES_AT_ONCE = before


def test_the_numbers_are_those_of_the_evaluation(run, found):
    z_RTF, part = whole(run / "codes.zarr")
    valid_RT, documents_RT = torch.from_numpy(part.valid), torch.from_numpy(part.documents_RT.astype(np.int64))
    rows = torch.arange(len(valid_RT))
    same = documents_RT, rows[:, None].expand_as(documents_RT)
    batch = TokenBatch(
        torch.zeros(*valid_RT.shape, 1), documents_RT, *same, valid_RT, valid_RT, rows, documents_RT, documents_RT
    )
    active = ActiveEntries.from_dense(torch.from_numpy(z_RTF), valid_RT)
    sae = SparseAutoencoder.load(run).token_coder()
    known = {}
    for accumulator in (FeatureStatistics(sae, context=16, seed=0), PositionStatistics(sae, context=16, seed=0)):
        accumulator.update(batch, active, batch.x_BTD)
        known |= accumulator.result().per_feature
    lags, masks = LagSums(WIDTH, 9, torch.device("cpu")), pair_masks(valid_RT, documents_RT, 9)
    lags.update(active, masks, matches(active, masks), torch.zeros(valid_RT.numel(), dtype=torch.int64))
    for name in ("density", "max_activation", "mean_activation", "eta_squared"):
        np.testing.assert_allclose(found.numbers()[name], known[name], rtol=1e-4, atol=1e-6, err_msg=name)
    np.testing.assert_allclose(found.position_mean_FT[:, 1:], known["position_mean"][:, 1:], rtol=1e-4, atol=1e-6)
    expected = lags.autocorrelations(centred=True)
    np.testing.assert_allclose(found.lag_autocorrelation_FL, expected, rtol=1e-3, atol=1e-6)


def test_places_are_the_rows_where_it_fires_most_strongly(run, found):
    z_RTF, _ = whole(run / "codes.zarr")
    for feature in range(WIDTH):
        peak_R = z_RTF[:, :, feature].max(1)
        best = np.sort(peak_R[peak_R > 0])[::-1][:6]
        places = found.strongest_FK[feature][found.strongest_FK[feature] >= 0]
        values = z_RTF.reshape(-1, WIDTH)[places, feature]
        np.testing.assert_array_equal(values, best)
        random = found.random_FK[feature][found.random_FK[feature] >= 0]
        assert len(random) == min(3, (peak_R > 0).sum())
        assert (z_RTF.reshape(-1, WIDTH)[random, feature] == peak_R[random // 16]).all()


def test_histograms_count_every_token_once(run, found):
    z_RTF, _ = whole(run / "codes.zarr")
    np.testing.assert_array_equal(found.histogram_FB.sum(1), (z_RTF != 0).sum((0, 1)))
    edges = 2.0 ** (np.arange(module.BINS) / module.BINS_PER_OCTAVE + module.LOWEST_OCTAVE)
    for feature in range(WIDTH):
        counted = np.histogram(z_RTF[z_RTF[..., feature] != 0][:, feature], [*edges, np.inf])[0]
        np.testing.assert_array_equal(found.histogram_FB[feature], counted)


def test_features_that_are_active_together(run, found):
    z_RTF, part = whole(run / "codes.zarr")
    on_NF = (z_RTF != 0)[part.valid]
    assert found.pair_tokens == on_NF.any(1).sum()
    on_NF = on_NF[on_NF.any(1)]
    with np.errstate(invalid="ignore", divide="ignore"):
        phi_FF = np.corrcoef(on_NF.T.astype(float))
    shared_FF = on_NF.T.astype(int) @ on_NF.astype(int)
    np.fill_diagonal(phi_FF, -1)
    phi_FF = np.where((shared_FF >= 3) & np.isfinite(phi_FF), phi_FF, -1)
    for feature in range(WIDTH):
        best = np.sort(phi_FF[feature])[::-1][:6]
        there = found.together_FC[feature] >= 0
        np.testing.assert_allclose(found.together_value_FC[feature][there], best[best > 1e-6], rtol=1e-5)
        np.testing.assert_allclose(phi_FF[feature, found.together_FC[feature][there]], best[best > 1e-6], rtol=1e-5)


def test_neighbours_by_cosine_of_decoder_rows(run, found):
    rows = torch.nn.functional.normalize(SparseAutoencoder.load(run).W_dec.detach(), dim=1)
    cosine = (rows @ rows.T).fill_diagonal_(-2)
    np.testing.assert_allclose(found.neighbour_cosine_FC, cosine.topk(6).values, rtol=1e-5)
    numbers, values = nearest_rows(rows[:3], rows[:2], 4)
    assert numbers.tolist() == [[0, 1, -1, -1], [1, 0, -1, -1], numbers[2].tolist()]
    assert np.isnan(values[:, 2:]).all()


def test_the_survey_is_kept_and_made_anew_where_it_is_not_of_these_codes(tmp_path, monkeypatch):
    folder, store = coded(tmp_path)
    encode_run(EncodeConfig(str(folder)))
    first = survey(CodeStore.open(folder / "codes.zarr"), str(folder))
    with monkeypatch.context() as patch:
        patch.setattr(module, "_Pass", None)
        again = survey(CodeStore.open(folder / "codes.zarr"), str(folder))
    np.testing.assert_array_equal(first.histogram_FB, again.histogram_FB)
    (folder / "codes.zarr" / module.SURVEY).write_bytes(b"PK damaged")
    np.testing.assert_array_equal(first.density_F, survey(CodeStore.open(folder / "codes.zarr"), str(folder)).density_F)
    random_run(folder, store, seed=1)
    with pytest.raises(RunError, match=r"holds the codes of another SAE than .*: encode again with .* --fresh"):
        survey(CodeStore.open(folder / "codes.zarr"), str(folder))


WORDS = ["the", "federal", "government", "of", "men"]


def text(token: int) -> str:
    """Words of one or two tokens."""
    word = WORDS[token % len(WORDS)]
    return " " + word if token % 10 < 5 else word


def test_a_phrase_is_found_across_tokens_and_features_ranked_by_their_activation_on_it(run):
    codes = CodeStore.open(run / "codes.zarr")
    z_RTF, part = whole(run / "codes.zarr")
    on_RT, count = np.zeros(part.valid.shape, bool), 0
    for row, tokens in enumerate(part.tokens_RT):
        for at in range(1, 15):
            same = part.documents_RT[row, at] == part.documents_RT[row, at + 1] and part.valid[row, at : at + 2].all()
            before = at == 1 or part.documents_RT[row, at - 1] != part.documents_RT[row, at]
            after = at + 2 > 15 or part.documents_RT[row, at + 2] != part.documents_RT[row, at]
            first, second = int(tokens[at]), int(tokens[at + 1])
            begins = text(first)[0] == " " or before or not part.valid[row, at - 1]
            ends = after or text(int(tokens[at + 2]))[0] == " " or not part.valid[row, at + 2]
            if same and begins and ends and text(first).strip() == "federal" and text(second) == " government":
                on_RT[row, at : at + 2] = True
                count += 1
    assert count > 1
    found = search(codes, text, "Federal  GOVERNMENT", 50)
    assert found.occurrences == count
    z_NF, on_N = z_RTF[part.valid], on_RT[part.valid]
    score_F = (z_NF[on_N].mean(0) - z_NF[~on_N].mean(0)) / z_NF.std(0)
    assert [hit.feature for hit in found.hits] == [int(f) for f in np.argsort(-score_F) if score_F[f] > 0]
    np.testing.assert_allclose([hit.score for hit in found.hits], np.sort(score_F[score_F > 0])[::-1], rtol=1e-3)
    assert search(codes, text, "nowhere", 5).hits == []
    with pytest.raises(UsageError, match="--search has nothing to look for"):
        search(codes, text, "  ", 5)


def test_logit_effects_are_searched_by_word(run):
    from tcsae.evaluate.results import LogitEffect

    effects = {
        3: ([LogitEffect(token=" Government", effect=0.5)], []),
        7: ([LogitEffect(token=" governments", effect=0.9)], []),
        9: ([LogitEffect(token="federal", effect=0.7)], []),
    }
    found = search(CodeStore.open(run / "codes.zarr"), text, "federal government", 5, effects)
    assert found.raises == [(9, "federal", 0.7), (3, " Government", 0.5)]


@pytest.fixture
def words(monkeypatch):
    """Texts of tokens without a tokenizer."""
    monkeypatch.setattr(catalogue, "TokenTexts", lambda codes: text)


def test_the_command_lists_shows_and_searches(run, words, capsys):
    assert main(["features", str(run), "--sort", "max_activation", "--n", "3", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    strengths = [one["max_activation"] for one in listed]
    assert len(listed) == 3
    assert strengths == sorted(strengths, reverse=True)
    feature = listed[0]["feature"]
    assert main(["features", str(run), "--feature", str(feature), "--json"]) == 0
    (one,) = json.loads(capsys.readouterr().out)
    assert one["feature"] == feature
    assert one["passages"][0]["activations"][one["passages"][0]["peak"]] == pytest.approx(strengths[0], rel=1e-3)
    assert sum(count for _, count in one["histogram"]) > 0
    for args, said in (
        (["--search", "federal"], "'federal' stands"),
        (["--feature", "0"], "feature 0"),
        ([], f"of {WIDTH} features"),
    ):
        assert main(["features", str(run), *args]) == 0
        out = capsys.readouterr().out
        assert said in out
        assert max(map(len, out.splitlines())) <= 81


def test_what_cannot_be_asked_is_a_sentence(run, words, tmp_path, capsys):
    with pytest.raises(UsageError, match=r"has no feature 99: they are numbered 0 to 23"):
        open_run(str(run)).views([99])
    assert main(["features", str(run), "--sort", "beauty"]) == 2
    assert "--sort beauty is unknown: choose one of density" in capsys.readouterr().err
    bare, _ = coded(tmp_path)
    with pytest.raises(StoreError, match=r"there are no codes at .*: `pipeline encode RUN` writes them"):
        open_run(str(bare))
