"""The command of a study: its plan, its status, and what it refuses before anything runs."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import house
import pytest
import tcsae
from tcsae.errors import MissingPackageError, TcsaeError, UsageError
from tcsae.extract.model.files import weights_in
from tcsae.pipeline import main
from tcsae.study.checks import check_outcomes, member_plans
from tcsae.study.estimate import estimate_study, total
from tcsae.study.file import read_study
from tcsae.study.plan import plan_study
from tiny import tiny_corpus
from tiny_study import without_figures, write_study

FILES = sorted((house.ROOT / "studies").glob("*.toml"))
MODELS = {"demo": (576, 30), "demo-gemma3": (640, 18), "google/gemma-2-2b": (2304, 26)}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return tiny_corpus(tmp_path_factory.mktemp("study") / "text", documents=60, words=60)


@pytest.fixture
def file(tmp_path, tiny_gemma2, text):
    return write_study(tmp_path / "tiny.toml", tiny_gemma2, text)


@pytest.fixture(scope="module")
def done(tmp_path_factory, tiny_gemma2, text):
    """A study that is finished, and its folder."""
    folder = tmp_path_factory.mktemp("done")
    path = write_study(folder / "tiny.toml", tiny_gemma2, text)
    with pytest.MonkeyPatch.context() as patch:
        without_figures(patch)
        assert main(["study", str(path), "--scale", "one", "--out", str(folder / "out"), "--device", "cpu", "-q"]) == 0
    return path, folder / "out"


def asked(capsys, *arguments):
    """What the command says as JSON."""
    status = main(["study", *map(str, arguments), "--json"])
    return status, json.loads(capsys.readouterr().out)


# --- the files of the repository ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("scale", ["small", "medium", "gemma"])
def test_the_studies_of_the_repository_can_be_trained(path, scale):
    plan = plan_study(read_study(path, scale))
    assert len(plan.study.sizes.seeds) >= 3
    check_outcomes(plan)
    for text in plan.texts:
        d_model, layers = MODELS[text.text.model]
        assert max(text.text.layers) < layers
        for training in text.trainings:
            context = text.extraction.text.context
            names = [each.name for each in member_plans(training, d_model, plan.study.sizes.tokens, context)]
            assert names == [each.name for each in training.members]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_outcome_is_in_a_loss(path):
    in_losses = {"temporal_variation", "temporal_variation_refit", "adjacent_cosine", "l0", "l1"}
    assert not {each.metric for each in read_study(path).outcomes} & in_losses


def test_the_verdict_has_every_control_at_the_same_weight():
    study = read_study(house.ROOT / "studies/verdict.toml")
    of = {variant.name: variant.train for variant in study.variants}
    controlled = [each for each in study.comparisons if each.controls]
    assert {of[each.treatment]["temporal.weight"] for each in controlled} == {0.01, 0.03, 0.1, 0.3}
    for each in controlled:
        assert {of[name]["temporal.partner"] for name in each.controls} == {
            "other_document",
            "shuffled",
            "l2",
            "earlier",
        }
        assert {of[name]["temporal.weight"] for name in each.controls} == {of[each.treatment]["temporal.weight"]}


def test_the_file_in_the_documentation_can_be_trained(tmp_path):
    written = (house.ROOT / "docs/STUDY.md").read_text()
    path = tmp_path / "mine.toml"
    path.write_text(re.search(r"```toml\n(.*?)```", written, re.S)[1])
    plan = plan_study(read_study(path))
    assert [each.name for each in plan.members][:4] == ["l5-none-s0", "l5-none-s1", "l5-none-s2", "l5-next-s0"]
    assert len(member_plans(plan.texts[0].trainings[0], 576, 600_000, 128)) == 9


# --- dry run and status -----------------------------------------------------------------------------------------------


def test_a_dry_run_says_what_every_stage_takes_and_writes_nothing(file, tmp_path, capsys):
    status, said = asked(capsys, file, "--dry-run", "--out", tmp_path / "out", "--device", "cpu")
    assert (status, said["SAEs"], said["hash"]) == (0, 12, read_study(file).fingerprint())
    steps = "two steps of each kind"
    assert [(stage["stage"].split()[0], stage["from_what"]) for stage in said["stages"]] == [
        ("extract", "one batch"), ("train", steps), ("train", steps), ("evaluate", "the rate of the forward passes"),
    ]  # fmt: skip
    for stage in said["stages"]:
        assert stage["seconds"] > 0
        assert stage["disk_bytes"] > 0
        assert stage["memory_bytes"] > 0
    assert not (tmp_path / "out").exists()


def test_codes_that_are_kept_are_in_the_disk_of_the_evaluation(file, tmp_path, capsys):
    kept = tmp_path / "kept.toml"
    kept.write_text(file.read_text().replace('scale = "small"', 'scale = "small"\ncodes = true'))
    disk = []
    for each in (file, kept):
        status, said = asked(capsys, each, "--dry-run", "--scale", "one", "--out", tmp_path / "out", "--device", "cpu")
        assert status == 0
        disk.append(said["stages"][-1]["disk_bytes"])
    assert disk[1] - disk[0] == 2 * 4 * 16 * (17 + 8 * 4)  # SAEs, rows, context, k


def test_a_dry_run_is_a_table_for_people(file, tmp_path, capsys):
    assert main(["study", str(file), "--dry-run", "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "planned, nothing written" in said
    assert read_study(file).fingerprint() in said
    assert "6 SAEs, 20 steps, 1 pass" in said


def test_nothing_is_left_of_a_finished_study(done, capsys):
    path, out = done
    assert asked(capsys, path, "--dry-run", "--scale", "one", "--out", out, "--device", "cpu")[1]["stages"] == []
    status, said = asked(capsys, path, "--status", "--scale", "one", "--out", out)
    assert (status, said["left"], said["analysed"]) == (0, 0, True)
    assert [stage["state"] for stage in said["stages"]] == ["done"] * 3
    assert said["stages"][1]["progress"] == "2 of 2 SAEs"


def test_what_is_left_is_said(file, tmp_path, capsys, monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("tcsae.study.run.train", stopped)
    out = tmp_path / "out"
    assert main(["study", str(file), "--scale", "one", "--out", str(out), "--device", "cpu"]) == 130
    assert "1 of 3 stages are finished" in capsys.readouterr().err
    assert main(["study", str(file), "--scale", "one", "--out", str(out), "--status"]) == 0
    said = capsys.readouterr().out
    assert "2 of 3 stages" in said
    assert "left to do" in said
    assert "0 of 2 SAEs" in said


def test_a_study_that_was_never_begun_has_no_status(file, tmp_path):
    with pytest.raises(UsageError, match=r"there is no study in .*study.json is missing"):
        main(["study", str(file), "--status", "--out", str(tmp_path / "out"), "--debug"])


def test_estimates_of_another_machine_stand_where_a_model_cannot_be_had(file, monkeypatch):
    study = read_study(file)
    (text,) = study.sizes.texts
    missing = text.model_copy(update={"model": str(file.parent / "nowhere")})
    for estimate in ("", "two hours"):
        sizes = study.sizes.model_copy(update={"texts": (missing,), "estimate": estimate})
        plan = plan_study(study.model_copy(update={"scales": {"small": sizes}}), device="cpu")
        if not estimate:
            with pytest.raises(TcsaeError, match="nowhere"):
                estimate_study(plan)
        else:
            found = estimate_study(plan)
            assert all(each.seconds is None and "nowhere" in each.from_what for each in found)
            assert "what is unknown" in total(found)["time"]


def test_without_weights_the_forward_passes_are_not_guessed(file, monkeypatch):
    assert weights_in(Path(read_study(file).sizes.texts[0].model))
    monkeypatch.setattr("tcsae.study.estimate.weights_in", lambda folder: [])
    stages = estimate_study(plan_study(read_study(file, "one"), device="cpu"))
    assert [each.seconds is None for each in stages] == [True, False, True]


# --- files that say what cannot be ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ('scale = "small"', 'scale = "huge"', "scale 'huge' is not among small, one"),
        ('name = "tiny"', 'name = "Tiny Study"', "name: String should match pattern"),
        ("steps = 20", "steps = 0", "scales.small.steps: Input should be greater than 0"),
        ("seeds = [0, 1]", "seeds = []", "scales.small.seeds: Tuple should have at least 1 item"),
        ("seeds = [0, 1]", "seeds = [0, 1", "is no TOML file"),
        ("layers = [1, 2]", "layers = [1, 1]", "must be different numbers"),
        ("layers = [1, 2]", "layers = [1, 7]", "has 4 layers, numbered 0 to 3; you asked for layer 7"),
        ("context = 16", "contxt = 16", "extract has no option 'contxt': did you mean context?"),
        ("context = 16", "tokens = 16", "gives the option 'tokens', which the study decides"),
        ('treatment = "next"', 'treatment = "best"', "names variant 'best', which the file does not have"),
        (
            "[rule]",
            '[cost_alone]\nvariants = ["best"]\n\n[rule]',
            "cost_alone names variant 'best', which the file does not",
        ),
        ("margin = 0.01", "", "a margin belongs to every fidelity outcome"),
        ('"temporal.weight" = 0.1 }}', '"temporal.wieght" = 0.1 }}', "variant next: temporal.wieght"),
        ('"temporal.form" = "none"', '"temporal.form" = "nun"', "variant none: temporal.form"),
        ('"temporal.form" = "none"', '"run.seed" = 3', "variant none gives run.seed, which the study decides"),
        ('"temporal.form" = "none"', '"form" = "none"', "variant none gives 'form', which is no field of the training"),
        (
            '"same_token"',
            '"same_tokens"',
            "outcome 'same_tokens' is no metric of an evaluation: did you mean same_token?",
        ),
        ('name = "shuffled"', 'name = "next"', "two variants have one name"),
        ('name = "shuffled"', 'name = "shuffled"\npreset = "old"', "has the preset 'old': choose one of modern"),
    ],
)
def test_a_file_that_asks_for_what_cannot_be_is_one_sentence(tmp_path, tiny_gemma2, text, capsys, old, new, sentence):
    old, new = old.replace("}}", "}"), new.replace("}}", "}")
    path = write_study(tmp_path / "tiny.toml", tiny_gemma2, text, **{old: new})
    assert main(["study", str(path), "--out", str(tmp_path / "out"), "--device", "cpu"]) in (1, 2)
    said = capsys.readouterr().err
    assert sentence in said
    assert "Traceback" not in said
    assert not list(tmp_path.glob("out/stores/*/*.zarr"))


def test_no_file_is_one_sentence(tmp_path, capsys):
    assert main(["study", str(tmp_path / "none.toml")]) == 1
    assert "name a study file, such as studies/verdict.toml" in capsys.readouterr().err


def test_the_hash_knows_what_bears_on_a_number_and_nothing_else(file):
    study = read_study(file)
    assert read_study(file, "one").fingerprint() != study.fingerprint()
    other = study.scales | {"one": study.scales["one"].model_copy(update={"steps": 99})}
    assert study.model_copy(update={"scales": other}).fingerprint() == study.fingerprint()
    rule = study.rule.model_copy(update={"alpha": 0.01})
    assert study.model_copy(update={"rule": rule}).fingerprint() != study.fingerprint()


def test_an_outcome_that_needs_a_missing_package_is_said_before_anything_runs(file, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: None if name == "sklearn" else find(name, *rest)
    )
    file.write_text(file.read_text().replace('"same_token"', '"probe_token_class_k5"'))
    with pytest.raises(MissingPackageError, match=r"the outcome probe_token_class_k5 .* pip install 'tcsae\[study\]'"):
        tcsae.study(file, out=tmp_path / "out", device="cpu")
