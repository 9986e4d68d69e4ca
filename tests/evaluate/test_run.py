import json
import math
from pathlib import Path

import pytest
import torch
from tcsae.errors import ModelError, ResourceError, RunError, UsageError
from tcsae.evaluate import run as run_module
from tcsae.evaluate.config import REFERENCES, UNTRAINED_TWINS, EvaluateConfig
from tcsae.evaluate.one_pass import Measurement
from tcsae.evaluate.results import read_results
from tcsae.evaluate.run import within_memory
from tcsae.evaluate.table_row import MADE_OF
from tcsae.pipeline import main
from tcsae.train.sae.activation import Activation
from tiny import tiny_corpus, tiny_model
from tiny_runs import make_manifest, make_run, random_sae

PLAIN = set(REFERENCES) - {UNTRAINED_TWINS}
MADE = set(MADE_OF)  # without a pass
SMALL = {"batches": 3, "batch_rows": 4, "device": "cpu", "dtype": "float32"}


pytestmark = pytest.mark.usefixtures("no_figures")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny Gemma 2, a text, and three runs: a pair at layer 1 and one SAE at layer 3."""
    folder = tmp_path_factory.mktemp("evaluate")
    model, text = tiny_model("gemma2", folder / "model"), tiny_corpus(folder / "text", documents=60, words=40)
    at_1, at_3 = (make_manifest(model, text, layer) for layer in (1, 3))
    make_run(folder / "runs", "tc", at_1, twin="twin")
    make_run(
        folder / "runs",
        "twin",
        at_1,
        role="twin",
        twin="tc",
        seed=1,
        sae=random_sae(24, 32, Activation("topk", k=3), 1),
    )
    make_run(folder / "runs", "deep", at_3, sae=random_sae(24, 16, Activation("relu"), 2))
    make_run(folder / "runs", "unfinished", at_3, finished=False)
    return folder


@pytest.fixture(scope="module")
def report(place):
    (outcome,) = run_module.evaluate(
        EvaluateConfig(runs_folder=str(place / "runs"), out=str(place / "reports"), **SMALL)
    )
    return outcome.report


def test_every_finished_run_and_every_reference_has_a_row(place, report):
    names = {(record.layer, record.name) for record in report.records}
    rows = {(layer, name) for layer in (1, 3) for name in PLAIN} | {(1, "tc"), (1, "twin"), (3, "deep")}
    assert names == rows | {(1, "untrained:topk"), (3, "untrained:relu")}
    assert report.layers == [1, 3]
    assert not report.failures
    assert read_results(place / "reports" / "model") == report


def test_reference_rows_say_what_they_should(report):
    for layer in (1, 3):
        value = lambda name, key, layer=layer: report.record(name, layer).metrics[key].value  # noqa: E731
        assert value("zero_all", "ce") == pytest.approx(math.log(report.model.vocab_size), abs=1e-5)
        assert value("mean", "ce_score_mean") == pytest.approx(0)
        assert value("mean", "explained_variance") == pytest.approx(0, abs=0.05)
        assert value("zero_sae", "ce") == value("zero", "ce")
        assert value("zero_sae", "l0") == 0
        assert value("zero_sae", "cosine") is None
        assert value("mean", "l0") is None
        assert value("untrained", "l0") == pytest.approx(report.model.d_model / 2, rel=0.2)
        assert abs(value("untrained", "cosine")) < 0.15
        assert 0 < value("identity_bf16", "kl") < 1e-3
        assert value("deep" if layer == 3 else "tc", "kl_noise_floor") == value("identity_bf16", "kl")
    # At the last layer every other position is gone too; at layer 1 BOS still feeds attention above.
    assert report.record("zero", 1).metrics["ce"].value != pytest.approx(math.log(report.model.vocab_size), abs=1e-3)


def test_every_metric_is_defined_and_every_interval_holds_its_value(report):
    for record in report.records:
        for name, metric in record.metrics.items():
            assert metric.definition in report.definitions, name
            assert metric.unit == report.definitions[metric.definition].unit, name
            if metric.low is not None and metric.high is not None and metric.value is not None:
                assert metric.low <= metric.high
        for name, curve in record.curves.items():
            assert curve.definition in report.definitions, name
            assert len(curve.x) == len(curve.y) + (curve.kind == "histogram"), name


def test_pairs_are_compared_and_unequal_sparsity_is_said(report):
    (pair,) = report.paired
    assert (pair.first, pair.second, pair.layer) == ("tc", "twin", 1)
    for key in ("kl", "explained_variance", "l0", "ce_score_mean"):
        difference = report.record("tc", 1).metrics[key].value - report.record("twin", 1).metrics[key].value
        assert pair.metrics[key].value == pytest.approx(difference), key
    assert "L0 differs (6.0 against 3.0)" in (pair.warning or "")


def test_training_terms_are_weighted_as_in_their_total(report):
    series = report.training["tc"].series
    assert series["total"] == [2.0, 2.0]
    assert series["temporal"] == [0.5, 0.5]


def test_cards_show_the_text(report):
    card = next(card for card in report.features["tc"] if card.passages)
    passage = card.passages[0]
    assert max(a for a in passage.activations if a is not None) == passage.activations[passage.peak] > 0
    assert any(character.isalpha() for character in "".join(passage.tokens))


def same_numbers(a, b) -> bool:
    drop = {"created", "seconds", "peak_memory_bytes", "machine"}
    return a.model_dump(exclude=drop) == b.model_dump(exclude=drop)


def test_finished_rows_are_kept(place, report, monkeypatch):
    monkeypatch.setattr(Measurement, "run", lambda *_: pytest.fail("everything was measured before"))
    (again,) = run_module.evaluate(EvaluateConfig(runs_folder=str(place / "runs"), out=str(place / "reports"), **SMALL))
    assert same_numbers(again.report, report)


def test_an_evaluation_that_was_stopped_goes_on(place, report, monkeypatch):
    config = EvaluateConfig(runs_folder=str(place / "runs"), out=str(place / "stopped"), name="model", **SMALL)
    monkeypatch.setattr(run_module, "PASS_BYTES", 8.0 * 24 * 32)  # one SAE per pass
    real, passes = Measurement.run, []

    def stop_in_the_second(self, batch_rows, progress):
        passes.append([candidate.row.name for candidate in self.candidates])
        if len(passes) == 2:
            raise KeyboardInterrupt
        real(self, batch_rows, progress)

    monkeypatch.setattr(Measurement, "run", stop_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        run_module.evaluate(config)
    kept = {path.name for path in (place / "stopped" / "model").rglob("*.npz")}
    assert len(kept) == len(passes[0]) + len(MADE) * 2 >= len(REFERENCES)
    (outcome,) = run_module.evaluate(config)
    assert not set(passes[0]) & set(passes[2])
    assert same_numbers(outcome.report, report)


def test_one_failing_sae_leaves_the_others_and_the_exit_status_says_so(place, capsys):
    broken = random_sae(24, 32, Activation("relu"), 5)
    with torch.no_grad():
        broken.W_dec.fill_(3e38)
    manifest = make_manifest(place / "model", place / "text", 1)
    bad = make_run(place / "others", "bad", manifest, sae=broken)
    runs = ["--run", str(bad), str(place / "runs" / "unfinished"), str(place / "runs" / "tc")]
    common = [
        "--out",
        str(place / "partial"),
        "--batches",
        "2",
        "--batch-size",
        "4",
        "--device",
        "cpu",
        "--quick",
        "--json",
    ]
    assert main(["evaluate", *runs, *common]) == 1
    captured = capsys.readouterr()
    (facts,) = json.loads(captured.out)["reports"]
    assert "tc" in [record["name"] for record in facts["records"]]
    assert "bad" not in [record["name"] for record in facts["records"]]
    messages = " | ".join(failure["message"] for failure in facts["failures"])
    assert "gives NaN or infinity at layer 1" in messages
    assert "is unfinished" in messages
    assert "gives NaN or infinity" in captured.err


def test_a_language_model_that_is_gone_is_in_the_report_and_the_exit_status(place, capsys):
    manifest = make_manifest(place / "model", place / "text", 1)
    gone = manifest.model_copy(update={"model": manifest.model.model_copy(update={"id": str(place / "was-here")})})
    lost = make_run(place / "lost", "lost", gone)
    common = [
        "--out",
        str(place / "gone"),
        "--batches",
        "1",
        "--batch-size",
        "2",
        "--device",
        "cpu",
        "--quick",
        "--json",
    ]
    assert main(["evaluate", "--run", str(place / "runs" / "tc"), str(lost), *common]) == 1
    (facts,) = json.loads(capsys.readouterr().out)["reports"]
    assert "tc" in [record["name"] for record in facts["records"]]
    (failure,) = facts["failures"]
    assert "was-here" in failure["message"]
    assert [one.path for one in read_results(Path(facts["folder"])).failures] == [failure["path"]]


FULL = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"
    ),
    MemoryError("Unable to allocate 728. TiB for an array"),
)


@pytest.mark.parametrize("failure", FULL, ids=lambda failure: type(failure).__name__)
def test_a_device_without_memory_is_one_sentence_and_what_is_finished_is_kept(place, tmp_path, monkeypatch, failure):
    real, passes = Measurement.run, []

    def one_row_and_no_tc(self, batch_rows, progress):
        """Room for one row of the table at a time, and none for the TC-SAE."""
        passes.append([candidate.row.name for candidate in self.candidates])
        if len(self.candidates) > 1 or passes[-1] == ["tc"]:
            raise failure
        real(self, batch_rows, progress)

    common = [
        "--out",
        str(tmp_path),
        "--batches",
        "3",
        "--batch-size",
        "4",
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--quick",
    ]
    command = ["evaluate", "--run", str(place / "runs" / "twin"), str(place / "runs" / "tc"), *common]
    with monkeypatch.context() as patch:
        patch.setattr(Measurement, "run", one_row_and_no_tc)
        assert main(command) == 1
    assert len(passes[0]) == len(REFERENCES) - len(MADE) + 2
    kept = {part[0] for part in passes if len(part) == 1} - {"tc"}
    assert kept == {*PLAIN - MADE, "untrained:topk", "twin"}
    seen = []
    monkeypatch.setattr(
        Measurement, "run", lambda self, *a: (seen.append([c.row.name for c in self.candidates]), real(self, *a))[1]
    )
    assert main(command) == 0
    assert seen == [["tc"]]


def test_the_sentence_names_the_flag():
    for rows, words in (
        (16, "batches of 16 rows, one SAE at a time: give a smaller --batch-size"),
        (1, "another --device"),
    ):
        with pytest.raises(ResourceError, match=words), within_memory(rows):
            raise FULL[1]
    with pytest.raises(RuntimeError, match="something else"), within_memory(1):
        raise RuntimeError("something else")


def test_what_does_not_fit_is_one_sentence(place, tmp_path):
    wide = random_sae(12, 16, Activation("relu"))
    wide.save(tmp_path / "wide")
    common = {"out": str(tmp_path), "model": str(place / "model"), "dataset": str(place / "text"), **SMALL}
    with pytest.raises(RunError, match="has width 24; the SAE expects 12"):
        run_module.evaluate(EvaluateConfig(saes=(str(tmp_path / "wide"),), layers=(1,), **common))
    run = make_run(tmp_path / "runs", "wide", make_manifest(place / "model", place / "text", 1), sae=wide)
    with pytest.raises(RunError, match="is of layer 1 and width 12, the store in its record of layer 1 and width 24"):
        run_module.evaluate(EvaluateConfig(runs=(str(run),), out=str(tmp_path), **SMALL))
    fitting = random_sae(24, 16, Activation("relu"))
    fitting.save(tmp_path / "fitting")
    with pytest.raises(RunError, match=r"belongs to layer 9; .* has layers 0 to 3"):
        run_module.evaluate(EvaluateConfig(saes=(str(tmp_path / "fitting"),), layers=(9,), **common))
    with pytest.raises(UsageError, match="no finished run under"):
        run_module.evaluate(EvaluateConfig(runs_folder=str(tmp_path / "none")))
    with pytest.raises(RunError, match="is no training run"):
        run_module.evaluate(EvaluateConfig(runs=(str(tmp_path),), **SMALL))
    gone = {**common, "model": str(tmp_path / "gone")}
    with pytest.raises(ModelError):
        run_module.evaluate(EvaluateConfig(saes=(str(tmp_path / "fitting"),), layers=(1,), **gone))


def test_someone_elses_sae_alone(place, tmp_path):
    random_sae(24, 16, Activation("relu"), 3).save(tmp_path / "theirs")
    place_of = {"model": str(place / "model"), "dataset": str(place / "text"), "out": str(tmp_path)}
    theirs = {"saes": (str(tmp_path / "theirs"),), "layers": (2,), "references": ("mean",)}
    config = EvaluateConfig(**theirs, **place_of, quick=True, **SMALL)
    (outcome,) = run_module.evaluate(config)
    record = outcome.report.record("theirs", 2)
    assert record.sae.source == "saelens"
    assert record.metrics["ce_score_mean"].value is not None
    assert "kl_noise_floor" not in record.metrics
    assert outcome.report.text.held_out == 0


def test_config_refuses_nonsense():
    for wrong in (
        {"batches": 0},
        {"batch_rows": 0},
        {"saes": ("a", "b", "c"), "layers": (1, 2)},
        {"references": ("best",)},
    ):
        with pytest.raises(UsageError):
            EvaluateConfig(**wrong)


def test_no_number_depends_on_how_many_rows_go_through_the_model_at_a_time(place, report, tmp_path):
    """The same 12 rows of text in batches of 4, 1 and 12: only rounding may differ."""

    def measured(rows):
        config = EvaluateConfig(
            runs_folder=str(place / "runs"), out=str(tmp_path / str(rows)), batches=12 // rows, batch_rows=rows,
            device="cpu", dtype="float32",
        )  # fmt: skip
        return run_module.evaluate(config)[0].report

    def numbers(record):
        found = {key: (metric.value, metric.n) for key, metric in record.metrics.items()}
        found |= {key: tuple(curve.y) for key, curve in record.curves.items()}
        return {(key, at): value for key, values in found.items() for at, value in enumerate(values)}

    for other in (measured(1), measured(12)):
        for ours, theirs in zip(report.records, other.records, strict=True):
            here, there = numbers(ours), numbers(theirs)
            assert here.keys() == there.keys()
            assert {key for key in here if here[key] is None} == {key for key in there if there[key] is None}
            apart = {
                key: (value, there[key])
                for key, value in here.items()
                if value is not None and value != pytest.approx(there[key], rel=1e-4, abs=1e-6)
            }
            assert not apart, ours.name


def test_saes_may_be_spliced_into_some_of_the_rows_alone(place, report):
    """Every number but those of the splice is that of all rows; those are of so many rows, over all documents."""
    config = EvaluateConfig(
        runs=(str(place / "runs/tc"),),
        out=str(place / "few"),
        splice_rows=5,
        **{**SMALL, "batch_rows": 6, "batches": 2},
    )
    (few,) = run_module.evaluate(config)
    assert "CE and KL are of 5 of the 12 rows" in few.report.notes
    whole, part = report.record("tc", 1).metrics, few.report.record("tc", 1).metrics
    for name in ("explained_variance", "l0", "mse_per_token", "same_token"):
        assert part[name].n == whole[name].n
        assert part[name].value == pytest.approx(whole[name].value, rel=1e-5)
    assert 0 < part["kl"].n < whole["kl"].n / 2
    tokens, kept = whole["kl"].n / 12, part["kl"].n
    assert kept == pytest.approx(5 * tokens, rel=0.1)
    assert few.report.record("identity_bf16", 1).metrics["kl"].n == kept


def test_splicing_all_rows_is_splicing_without_a_limit(place, report):
    config = EvaluateConfig(runs=(str(place / "runs/tc"),), out=str(place / "all"), splice_rows=12, **SMALL)
    (outcome,) = run_module.evaluate(config)
    assert outcome.report.record("tc", 1).metrics == report.record("tc", 1).metrics
