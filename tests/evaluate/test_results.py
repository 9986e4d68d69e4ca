import json
from pathlib import Path

import pytest
from tcsae.errors import RunError
from tcsae.evaluate import results
from tcsae.evaluate.results import EvaluationReport, Metric, ModelFacts, Record, TextFacts, read_results, write_results

SCHEMA = Path(__file__).parents[2] / "docs" / "results.schema.json"


def a_report(**changes) -> EvaluationReport:
    metric = Metric(value=1.5, unit="nats", n=10, low=1.0, high=2.0, definition="kl")
    facts = {
        "name": "tiny",
        "created": "2026-01-01T00:00:00Z",
        "model": ModelFacts(
            id="tiny", fingerprint="f", architecture="Gemma2ForCausalLM", n_layers=4, d_model=16, vocab_size=300,
            attn_implementation="eager", dtype="float32",
        ),
        "text": TextFacts(dataset="text", fingerprint="t", packing="document", context=16, held_out=0.01),
        "n_documents": 3, "n_rows": 4, "n_tokens": 60, "seed": 0, "layers": [1], "resampling": "documents",
        "records": [Record(name="zero", kind="reference", layer=1, metrics={"kl": metric})],
    }  # fmt: skip
    return EvaluationReport(**(facts | changes))


def test_published_schema_is_in_step():
    assert json.loads(SCHEMA.read_text()) == results.json_schema(), (
        "run `python -m tcsae.evaluate.results docs/results.schema.json`"
    )


def test_written_results_satisfy_the_schema_and_read_back(tmp_path):
    jsonschema = pytest.importorskip("jsonschema")
    path = write_results(a_report(), tmp_path)
    jsonschema.validate(json.loads(path.read_text()), results.json_schema())
    assert read_results(tmp_path) == a_report()
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None])
def test_undefined_is_null(value, tmp_path):
    record = Record(
        name="a", kind="sae", layer=1, metrics={"kl": Metric(value=value, unit="nats", n=0, definition="kl")}
    )
    write_results(a_report(records=[record]), tmp_path)
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["records"][0]["metrics"]["kl"]["value"] is None


def test_unreadable_results_say_why(tmp_path):
    with pytest.raises(RunError, match="no results at"):
        read_results(tmp_path)
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(RunError, match=r"cannot be read .* evaluate again to replace it"):
        read_results(tmp_path)
    (tmp_path / "results.json").write_text('{"schema_version": 99}')
    with pytest.raises(RunError, match="schema version 99"):
        read_results(tmp_path)
    (tmp_path / "results.json").write_text('{"schema_version": 1}')
    with pytest.raises(RunError, match=r"name: Field required"):
        read_results(tmp_path)


def test_record_is_found_by_name_and_layer():
    report = a_report()
    assert report.record("zero", 1) is report.records[0]
    assert report.record("zero", 2) is None
