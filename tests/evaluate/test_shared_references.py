"""Reference rows are measured once for all reports of a folder, and some on a share of the text."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tcsae.errors import UsageError
from tcsae.evaluate import run as run_module
from tcsae.evaluate.config import REFERENCES, REFERENCES_FOLDER, EvaluateConfig, evaluate_config
from tcsae.evaluate.model import reference_rows
from tcsae.evaluate.model.heldout_text import HeldOutText, Survey, number_units
from tcsae.evaluate.model.reference_rows import share_of
from tcsae.evaluate.one_pass import Measurement
from tcsae.evaluate.shared_references import SharedReferences
from tcsae.evaluate.table_row import Candidate, MeasuredRow, row_of_zero_sae
from tcsae.on_disk import entries, removable, remove
from tcsae.sites import Location
from tcsae.train.sae.activation import Activation
from tcsae.train.sae.temporal_sae import TemporalSAE
from tiny import tiny_corpus, tiny_model
from tiny_runs import make_manifest, make_run, random_sae

SMALL = {"batches": 3, "batch_rows": 4, "device": "cpu", "dtype": "float32", "quick": True}


pytestmark = pytest.mark.usefixtures("no_figures")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    model, text = tiny_model("llama", folder / "model"), tiny_corpus(folder / "text", documents=60, words=40)
    manifest = make_manifest(model, text, 1)
    make_run(folder / "runs", "one", manifest)
    make_run(folder / "runs", "two", manifest, seed=1, sae=random_sae(manifest.d_model, 24, Activation("relu"), 1))
    return folder


@pytest.fixture
def passes(monkeypatch):
    """Names of the rows of every pass that is run."""
    found: list[list[str]] = []
    real = Measurement.run

    def note_and_run(self, *a):
        found.append([candidate.row.name for candidate in self.candidates])
        real(self, *a)

    monkeypatch.setattr(Measurement, "run", note_and_run)
    return found


def evaluate(place, out, run="one", **more):
    config = EvaluateConfig(runs=(str(place / "runs" / run),), out=str(out), name=run, **(SMALL | more))
    return run_module.evaluate(config)[0].report


def test_a_second_report_measures_only_what_is_its_own(place, tmp_path, passes, monkeypatch):
    first = evaluate(place, tmp_path)
    assert set(passes[0]) == {*REFERENCES[:-2], "untrained:topk", "one"}, "zero_sae is zero"
    monkeypatch.setattr("tcsae.evaluate.candidates.survey", lambda *_: pytest.fail("the text was looked at before"))
    second = evaluate(place, tmp_path, "two")
    assert passes[1:] == [["untrained:relu", "two"]]
    for name in REFERENCES[:-1]:
        one, other = first.record(name, 1), second.record(name, 1)
        assert one == other, name
        assert (tmp_path / "two" / other.kept).is_file(), "each report is whole without the other"
    alone = evaluate(place, tmp_path / "alone", "two") if monkeypatch.undo() is None else None
    assert alone.record("two", 1).metrics == second.record("two", 1).metrics


def test_damaged_ones_are_measured_again_and_healed(place, tmp_path, passes, capsys):
    first = evaluate(place, tmp_path, references=("mean", "zero"))
    (kept,) = (tmp_path / REFERENCES_FOLDER).rglob("l1-mean.npz")
    (look,) = (tmp_path / REFERENCES_FOLDER).rglob("l1-survey.npz")
    content = bytearray(kept.read_bytes())
    content[len(content) // 2] ^= 1
    kept.write_bytes(bytes(content))
    look.write_bytes(look.read_bytes()[:300])
    second = evaluate(place, tmp_path, "two", references=("mean", "zero"))
    said = capsys.readouterr().err
    assert "l1-mean.npz cannot be used" in said
    assert "l1-survey.npz cannot be used" in said
    assert passes[1:] == [["mean", "two"]]
    assert first.record("mean", 1).metrics == second.record("mean", 1).metrics
    assert MeasuredRow.load(kept) is not None
    evaluate(place, tmp_path, references=("mean", "zero"), fresh=True)
    assert passes[2] == ["mean", "zero", "one"], "--fresh measures them, too"


@pytest.mark.parametrize("changed", [{"batch_rows": 3}, {"batches": 2}, {"dtype": "bfloat16"}])
def test_another_text_or_arithmetic_is_another_row(place, tmp_path, passes, changed):
    evaluate(place, tmp_path, references=("mean",))
    evaluate(place, tmp_path, "two", references=("mean",), **changed)
    assert passes[1] == ["mean", "two"]


def test_other_code_is_another_row(place, tmp_path, passes, monkeypatch):
    evaluate(place, tmp_path, references=("mean",))
    monkeypatch.setattr(run_module, "measuring_code", lambda plugins, of_saes=True: "another version")
    evaluate(place, tmp_path, "two", references=("mean",))
    assert passes[1] == ["mean", "two"]


def test_what_features_are_measured_with_matters_to_rows_with_features(tmp_path):
    row = MeasuredRow("zero", "reference", 1, documents_U=np.zeros(1, dtype=np.int64))
    for name in ("zero", "untrained", "untrained:topk"):
        SharedReferences(tmp_path, ("model",), (0,)).put(f"l1-{name}.npz", replace(row, name=name))
    others = SharedReferences(tmp_path, ("model",), (1,))
    assert others.row("l1-zero.npz", "zero") is not None
    assert others.row("l1-untrained.npz", "untrained") is None
    assert others.row("l1-untrained:topk.npz", "untrained:topk") is None
    survey = Survey(torch.tensor([0.1, 1 / 3]), 12.5, 3, 100)
    others.put_survey(Location(1), survey)
    found = SharedReferences(tmp_path, ("model",), (2,)).survey(Location(1))
    assert torch.equal(found.mean_D, survey.mean_D)
    assert replace(found, mean_D=survey.mean_D) == survey
    assert others.survey(Location(2)) is None


def test_an_all_zero_sae_is_zero_without_features(place, tmp_path, monkeypatch):
    """Its row, made of that of zero, is what measuring such an SAE gives."""
    candidates = []
    real = Candidate.__init__

    def with_zero_sae(self, row, sae, survey, *a, **k):
        if row.name == "mean":
            sae = TemporalSAE(len(survey.mean_D), len(survey.mean_D), Activation("relu")).eval().token_coder()
        real(self, row, sae, survey, *a, **k)
        candidates.append(self)

    monkeypatch.setattr(Candidate, "__init__", with_zero_sae)
    evaluate(place, tmp_path, references=("mean", "zero"))
    rows = {one.row.name: one.row for one in candidates}
    made, measured = row_of_zero_sae(rows["zero"]), rows["mean"]
    assert made.compat.keys() == measured.compat.keys()
    assert all(np.array_equal(one, measured.compat[key], equal_nan=True) for key, one in made.compat.items())
    assert made.sums.keys() == measured.sums.keys()
    for name, one in made.sums.items():
        for side in ("numerator_U", "denominator_U"):
            assert np.array_equal(getattr(one, side), getattr(measured.sums[name], side)), name
        assert (one.unit, one.definition, one.scale, one.n) == tuple(
            getattr(measured.sums[name], key) for key in ("unit", "definition", "scale", "n")
        )


def a_text(rows: int, documents: np.ndarray, context: int = 300) -> HeldOutText:
    documents_RT = np.broadcast_to(documents[:, None], (rows, context)).copy()
    real_RT = np.ones((rows, context), dtype=bool)
    units_RT, owners = number_units(documents_RT, real_RT)
    return HeldOutText(np.ones((rows, context), dtype=np.int64), documents_RT, units_RT, real_RT, owners)


def test_a_share_is_of_whole_units_over_all_documents():
    text = a_text(800, np.arange(800) // 8)  # units of four rows, two per document
    share_R = share_of(text)
    assert share_R.sum() == 200
    units = np.unique(text.units_RT[share_R])
    assert not np.isin(text.units_RT[~share_R], units).any()
    assert len(np.unique(text.documents_RT[share_R])) == 50
    assert share_of(a_text(64, np.arange(64))) is None, "a share of a short text would say nothing"
    chained = replace(text, units_RT=text.units_RT.copy())
    chained.units_RT[:, -1] = np.minimum(text.units_RT[:, -1] + 1, len(text.unit_documents) - 1)
    assert share_of(chained) is None, "where every row holds two units, all hang together"


def test_rows_of_a_share_are_scored_on_it(place, tmp_path, monkeypatch):
    """What a reference on a share says is what an evaluation of the share alone would say."""
    monkeypatch.setattr(reference_rows, "LEAST_ROWS", 4)
    shares = []
    monkeypatch.setattr(run_module, "share_of", lambda text, **_: shares.append(share_of(text)) or shares[-1])
    plain = {"quick": False, "only": ("fidelity",)}
    report = evaluate(place, tmp_path, references=("identity_bf16", "untrained", "mean"), **plain)
    share_R = shares[0]
    assert 4 <= share_R.sum() < len(share_R)
    monkeypatch.setattr(run_module, "share_of", lambda text, **_: None)
    real = HeldOutText.gather
    small = {"tokens_RT", "documents_RT", "units_RT", "real_RT"}

    def only_the_share(*a, **k):
        text = real(*a, **k)
        return replace(text, **{name: getattr(text, name)[share_R] for name in small})

    monkeypatch.setattr(HeldOutText, "gather", only_the_share)
    plain |= {"batches": 1, "batch_rows": 12}
    alone = evaluate(place, tmp_path / "alone", references=("identity_bf16", "untrained"), **plain)
    for name in ("identity_bf16", "untrained"):
        for key in ("ce", "ce_clean", "kl"):
            one, other = report.record(name, 1).metrics[key], alone.record(name, 1).metrics[key]
            assert one.n == other.n < report.record("mean", 1).metrics[key].n
            assert one.value == pytest.approx(other.value, abs=1e-6), (name, key)
    row = {key: one.value for key, one in report.record("untrained", 1).metrics.items()}
    assert row["l0"] == pytest.approx(alone.record("untrained", 1).metrics["l0"].value)
    assert report.record("identity_bf16", 1).metrics["cosine"].n > alone.record("untrained", 1).metrics["cosine"].n
    means = [report.record("mean", 1).metrics[key].value for key in ("ce", "ce_clean")]
    whole = (means[0] - row["ce"]) / (means[0] - means[1])
    assert row["ce_score_mean"] != pytest.approx(whole, abs=1e-9), "the mean's loss on the share, not on all"


def test_a_first_look_splices_all_references_into_a_share(place, tmp_path, monkeypatch):
    """What a reference loses there stands for all rows in the scores."""
    monkeypatch.setattr(reference_rows, "LEAST_QUICK_ROWS", 4)
    whole = evaluate(place, tmp_path / "whole", quick=False, only=("fidelity",))
    quick = evaluate(place, tmp_path / "quick")
    assert "references are spliced into 4 of the 12 rows" in " ".join(quick.notes)
    for report, share in ((whole, False), (quick, True)):
        n = {one.name: one.metrics["ce"].n for one in report.records}
        assert n["one"] == n["zero_all"] == max(n.values())
        for name in ("mean", "zero", "zero_sae", "previous_token", "untrained:topk"):
            assert (n[name] < n["one"]) is share, name
        assert report.record("one", 1).saebench_compat["ce_loss_score"] is not None
    ours = [report.record("one", 1).metrics for report in (whole, quick)]
    assert ours[0]["ce"] == ours[1]["ce"], "the SAE itself sees all rows"
    assert ours[1]["ce_score_mean"].n == ours[0]["ce_score_mean"].n == ours[0]["ce"].n
    rows = {name: MeasuredRow.load(tmp_path / "quick" / "one" / quick.record(name, 1).kept) for name in ("one", "mean")}
    one, mean = rows["one"].sums, rows["mean"].sums
    there = np.flatnonzero(mean["ce"].denominator_U > 0)
    per_token = {name: mean[name].numerator_U[there].sum() / mean[name].denominator_U.sum() for name in ("ce", "kl")}
    clean = one["ce_clean"].numerator_U[there].sum() / one["ce_clean"].denominator_U[there].sum()
    lost = ours[1]["ce"].value - ours[1]["ce_clean"].value
    assert ours[1]["ce_score_mean"].value == pytest.approx(1 - lost / (per_token["ce"] - clean))
    assert ours[1]["kl_score_mean"].value == pytest.approx(1 - ours[1]["kl"].value / per_token["kl"])
    assert ours[1]["ce_score_mean"].value == pytest.approx(ours[0]["ce_score_mean"].value, abs=0.1)
    evaluate(place, tmp_path / "quick", "two", quick=False, only=("fidelity",), references=("mean",))
    later = evaluate(place, tmp_path / "quick", "two", quick=False, only=("fidelity",), references=("mean",))
    assert later.record("mean", 1).metrics["ce"].n == later.record("two", 1).metrics["ce"].n, (
        "no share is taken for all"
    )


def test_references_are_chosen(place, tmp_path, passes):
    assert evaluate_config(references="all").references == REFERENCES
    assert evaluate_config(references=["none"]).references == ()
    assert evaluate_config(references=["zero", "mean"]).references == ("zero", "mean")
    with pytest.raises(UsageError, match="there is no reference 'mode': choose among identity_bf16"):
        evaluate_config(references=["mode"])
    with pytest.raises(UsageError, match="say all, none, or names"):
        evaluate_config(references=["none", "mean"])
    report = evaluate(place, tmp_path, references=())
    assert passes == [["one"]]
    assert "ce_score_mean" not in report.record("one", 1).metrics
    report = evaluate(place, tmp_path, references=("zero_sae",))
    assert passes[1:] == [["zero"]], "measured, and not shown"
    assert [record.name for record in report.records] == ["zero_sae", "one"]


def test_their_folder_is_listed_and_removed(place, tmp_path, passes):
    evaluate(place, tmp_path, references=("mean", "zero_sae"))
    found = {entry.kind: entry for entry in entries([tmp_path])}
    assert found.keys() == {"report", "references"}
    entry = found["references"]
    assert "2 rows and states of the model that reports share" in entry.state
    (going,) = removable([tmp_path / REFERENCES_FOLDER], [tmp_path])
    remove(going)
    assert not entry.path.exists()
    evaluate(place, tmp_path, references=("mean", "zero_sae"))
    assert len(passes) == 1, "the report has its own"
