"""--only: what is not asked for is not measured, and is absent rather than zero."""

from __future__ import annotations

import json

import datasets
import numpy as np
import pytest
from tcsae.cache.format.layout import of_role
from tcsae.errors import UsageError
from tcsae.evaluate import run as run_module
from tcsae.evaluate.config import PARTS, EvaluateConfig, evaluate_config
from tcsae.evaluate.metrics.fidelity import OUTLIERS
from tcsae.evaluate.metrics.fidelity import definitions as fidelity_definitions
from tcsae.evaluate.model.splice import SplicedModel
from tcsae.evaluate.protocol import Findings
from tcsae.evaluate.report.terminal import print_outcomes
from tcsae.extract.config import ModelSource, text_source
from tcsae.extract.model.load import outline_model
from tcsae.extract.text.rows import row_blocks
from tcsae.train.run_folder.record import load_run
from tcsae.train.sae.activation import Activation
from tiny import tiny_corpus, tiny_model, tiny_text, tiny_tokenizer
from tiny_runs import make_manifest, make_run, random_sae

SMALL = {"batches": 3, "batch_rows": 4, "device": "cpu", "dtype": "float32"}
SPARSITY = {name + suffix for name in ("l0", "l1") for suffix in ("", OUTLIERS)}
COST = {"parameters", "forward_flops", "training_time", "training_memory"}
SIGNS = {
    "fidelity": {"ce", "kl", "explained_variance", "ce_score_mean", "kl_noise_floor"},
    "features": {"alive", "near_duplicate_share", "decoder_norm"},
    "temporal": {"temporal_variation", "adjacent_cosine", "run_length", "same_token_activation"},
    "position": {"eta_squared", "position_specific_share"},
}
CURVES = {"features": {"density"}, "temporal": {"lag_autocorrelation"}, "position": {"position_profile"}}


pytestmark = pytest.mark.usefixtures("no_figures")


@pytest.fixture(scope="module", autouse=True)
def _own_datasets_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A pair whose term sees half of the dictionary."""
    folder = tmp_path_factory.mktemp("only")
    model, text = tiny_model("llama", folder / "model"), tiny_corpus(folder / "text", documents=60, words=40)
    manifest = make_manifest(model, text, 1)
    make_run(folder / "runs", "tc", manifest, twin="twin")
    other = random_sae(manifest.d_model, 32, Activation("topk", k=3), 1)
    make_run(folder / "runs", "twin", manifest, role="twin", twin="tc", seed=1, sae=other)
    return folder


def evaluate(place, out, **more):
    return run_module.evaluate(EvaluateConfig(runs_folder=str(place / "runs"), out=str(out), **(SMALL | more)))


@pytest.fixture(scope="module")
def whole(place, tmp_path_factory):
    return evaluate(place, tmp_path_factory.mktemp("whole"))[0].report


@pytest.mark.parametrize("part", PARTS)
def test_one_part_alone_has_its_numbers_and_no_others(place, whole, tmp_path, part, monkeypatch, capsys):
    if part != "fidelity":
        refused = lambda *_: pytest.fail("nothing was to be spliced")  # noqa: E731
        monkeypatch.setattr(SplicedModel, "spliced", refused)
        monkeypatch.setattr(SplicedModel, "verify", lambda *_: [])
    monkeypatch.setattr(run_module, "probes", _no_probes)
    (outcome,) = evaluate(place, tmp_path, only=(part,))
    report = outcome.report
    assert f"only what was asked for is measured: {part}, and L0 and L1" in report.notes
    record = report.record("tc", 1)
    assert SIGNS[part] | SPARSITY <= record.metrics.keys()
    for other in set(PARTS) - {part}:
        assert not SIGNS[other] & record.metrics.keys(), other
        assert not CURVES.get(other, set()) & record.curves.keys()
    assert not [name for name in record.metrics if name.startswith(("probe_", "boundary", "prefix_shift"))]
    same = whole.record("tc", 1).metrics
    for name, metric in record.metrics.items():
        assert metric == same[name], name
    if part == "fidelity":
        assert record.metrics.keys() <= set(fidelity_definitions()) | COST
    assert bool(record.saebench_compat) == (part == "fidelity")
    assert bool(report.features) == (part == "features")
    names = {one.name for one in report.records if one.kind == "reference"}
    assert ("mean" in names) == ("zero_sae" in names) == (part == "fidelity")
    (pair,) = report.paired
    assert SIGNS[part] & pair.metrics.keys()
    assert "L0 differs" in pair.warning
    page = outcome.page.read_text()
    assert "only what was asked for is measured" in page
    print_outcomes([outcome], as_json=False)
    print_outcomes([outcome], as_json=True)
    assert "tc" in capsys.readouterr().out


def _no_probes(context, chosen):
    assert not [name for name, family in chosen.items() if family.probe is not None]
    return Findings()


def test_several_parts_and_rows_are_kept_apart(place, whole, tmp_path):
    (outcome,) = evaluate(place, tmp_path, only=("position", "temporal"), quick=True)
    record = outcome.report.record("twin", 1)
    assert SIGNS["position"] | SIGNS["temporal"] <= record.metrics.keys()
    assert not (SIGNS["fidelity"] | SIGNS["features"]) & record.metrics.keys()
    (outcome,) = evaluate(place, tmp_path, quick=True)
    assert SIGNS["fidelity"] <= outcome.report.record("twin", 1).metrics.keys()


def test_parts_are_named_as_they_are():
    assert evaluate_config(only="temporal").only == ("temporal",)
    with pytest.raises(UsageError, match=r"--only time is neither a part of an evaluation \(fidelity, features"):
        evaluate_config(only=["time"])


@pytest.fixture(scope="module")
def talks(tmp_path_factory):
    """Runs that were trained on the assistant's tokens of a few conversations, in ``runs``, and the source of these."""
    folder = tmp_path_factory.mktemp("talks")
    model = tiny_model("llama", folder / "model")
    tokenizer = tiny_tokenizer("llama")
    tokenizer.chat_template = "{% for m in messages %}<bos>{{ m['role'] }} {{ m['content'] }}<eos>{% endfor %}"
    tokenizer.save_pretrained(model)
    text = folder / "talks.jsonl"
    with text.open("w") as file:
        for number in range(40):
            talk = [(("user", "assistant")[turn % 2], tiny_text(10 * number + turn, 14)) for turn in range(4)]
            rows = [{"role": role, "content": content} for role, content in talk]
            file.write(json.dumps({"messages": rows}) + "\n")
    manifest = make_manifest(model, text, 1, chat_template=True)
    for name, role, twin in (("tc", "tc", "twin"), ("twin", "twin", "tc")):
        run = make_run(folder / "runs", name, manifest, role=role, twin=twin, seed=len(name))
        record = load_run(run)
        record.model_copy(update={"config": record.config | {"data": {"only": "assistant"}}}).save(run)
    outline = outline_model(ModelSource(id=str(model), device="cpu", dtype="float32"))
    blocks = row_blocks(text_source(manifest.text), outline, held_out=True)
    flags = np.concatenate([block.flags_BT for block, _ in blocks])
    return folder, {role: int(of_role(flags, role).sum()) for role in ("user", "assistant")}, int((flags == 0).sum())


@pytest.mark.parametrize("role", ["assistant", "user", None])
def test_one_role_is_measured_and_a_run_of_another_says_so(talks, tmp_path, role):
    folder, said, nobodys = talks
    (outcome,) = evaluate(folder, tmp_path, only=("temporal", *([role] if role else [])), batches=1000)
    measured = said[role] if role else sum(said.values()) + nobodys
    for name in ("tc", "twin"):
        record = outcome.report.record(name, 1)
        assert record.metrics["l0"].n == measured
        assert record.metrics["adjacent_cosine"].n < measured
        here = f"those of the role '{role}'" if role else "all tokens"
        sentence = f"it was trained on tokens in messages of the role 'assistant' alone and is measured on {here}"
        assert (sentence in record.notes) == (role != "assistant")
    sentence = f"only tokens in messages of the role '{role}' are measured"
    assert (sentence in outcome.report.notes) == (role is not None)
    assert (f"messages of the role &#39;{role}&#39; are measured" in outcome.page.read_text()) == (role is not None)
