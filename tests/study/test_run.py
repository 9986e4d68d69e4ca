"""A study from its file to its verdict: killed in every phase and resumed, reused, refused, with members that fail."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import house
import pytest
import tcsae
from tcsae.errors import RunError, UsageError
from tcsae.evaluate.features.catalogue import codes_of
from tcsae.evaluate.results import read_results
from tcsae.pipeline import main
from tcsae.study import run as study_run
from tcsae.study.document import document
from tcsae.study.estimate import estimate_study
from tcsae.study.file import CostAlone, read_study
from tcsae.study.plan import plan_study
from tcsae.study.state import check_free, read_state
from tcsae.study.status import study_status
from tcsae.train.run_folder.record import load_run
from tiny import tiny_corpus
from tiny_study import without_figures, write_study

MEMBERS = [
    f"l{layer}-{variant}-s{seed}" for layer in (1, 2) for variant in ("none", "next", "shuffled") for seed in (0, 1)
]


@pytest.fixture(autouse=True)
def _quickly(monkeypatch):
    without_figures(monkeypatch)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return tiny_corpus(tmp_path_factory.mktemp("study") / "text", documents=60, words=60)


@pytest.fixture(scope="module")
def file(tmp_path_factory, tiny_gemma2, text):
    return write_study(tmp_path_factory.mktemp("file") / "tiny.toml", tiny_gemma2, text)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, file):
    """An uninterrupted study."""
    out = tmp_path_factory.mktemp("whole") / "out"
    with pytest.MonkeyPatch.context() as patch:
        without_figures(patch)
        return tcsae.study(file, out=out, device="cpu")


def numbers(folder: Path) -> dict[str, object]:
    """Everything that was measured, and the weights it was measured of."""
    (report,) = (read_results(path.parent) for path in (folder / "reports").glob("*/results.json"))
    found: dict[str, object] = {
        f"{record.name} {record.location}": {
            k: (m.value, m.low, m.high) for k, m in record.metrics.items() if "training" not in k
        }
        for record in report.records
    }
    for path in sorted(folder.glob("runs/*/*/sae_weights.safetensors")):
        found[str(path.relative_to(folder))] = path.read_bytes()
    return found


def test_a_study_runs_from_its_file_to_its_verdict(whole):
    assert (whole.members, whole.failures) == (12, {})
    assert (whole.analysis.finished, whole.analysis.failures) == (12, [])
    assert whole.analysis.fingerprint == read_state(whole.folder).fingerprint
    assert {one.name for one in whole.analysis.references if one.name.startswith("untrained:")} == {"untrained:topk"}
    assert whole.analysis.headline in whole.page.read_text()
    state = read_state(whole.folder)
    assert state is not None
    assert state.finished
    assert all(stage.done and stage.seconds > 0 for stage in state.stages.values())
    assert sorted(path.name for path in whole.folder.glob("runs/*/*")) == sorted(MEMBERS)


def test_members_of_one_store_train_on_one_stream(whole):
    records = [load_run(path) for path in whole.folder.glob("runs/*/l1-*")]
    assert len({record.config["data"]["siblings"] for record in records}) == 1  # also of those with neighbours alone
    assert {record.cost["members"] for record in records} == {6}


def test_a_finished_study_is_only_judged_again(whole, file, monkeypatch):
    for name in ("extract", "train", "evaluate"):
        monkeypatch.setattr(study_run, name, lambda *_, **__: pytest.fail("it is finished"))
    again = tcsae.study(file, out=whole.folder, device="cpu")
    assert again.analysis == whole.analysis


def test_codes_are_kept_where_the_file_says_so_and_no_number_changes(whole, tiny_gemma2, text, tmp_path, monkeypatch):
    file = write_study(tmp_path / "t.toml", tiny_gemma2, text, **{'scale = "small"': 'scale = "small"\ncodes = true'})
    shutil.copytree(whole.folder, tmp_path / "out")
    for name in ("extract", "train"):
        monkeypatch.setattr(study_run, name, lambda *_, **__: pytest.fail("it is finished"))
    done = tcsae.study(file, out=tmp_path / "out", device="cpu")
    assert done.fingerprint == whole.fingerprint  # it may be asked for afterwards
    assert numbers(done.folder) == numbers(whole.folder)
    (folder,) = (path.parent for path in done.folder.glob("reports/*/results.json"))
    report = read_results(folder)
    saes = [record for record in report.records if record.kind == "sae"]
    assert len(saes) == 12
    for record in saes:
        assert codes_of(record.sae.path, report=str(folder)).n_rows == report.n_rows
    monkeypatch.setattr(study_run, "evaluate", lambda *_, **__: pytest.fail("it is finished"))
    tcsae.study(file, out=done.folder, device="cpu")


KILLS = {
    "extract": ("tcsae.extract.run.StoreSetRun._deliver", 5),
    "train": ("tcsae.train.loop.trainer.Pass._train_batch", 33),  # in the second layer
    "evaluate": ("tcsae.evaluate.run.RowCache.put", 4),
}
KILLER = """
import os, pydoc, signal
import tcsae, tcsae.evaluate.run, tcsae.extract.run, tcsae.train.loop.trainer
where, calls, file, out = arguments[0], int(arguments[1]), arguments[2], arguments[3]
owner, name = where.rsplit(".", 1)
owner = pydoc.locate(owner)
real, seen = getattr(owner, name), []
def killed(*a, **k):
    seen.append(1)
    if len(seen) == calls:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*a, **k)
setattr(owner, name, killed)
tcsae.study(file, out=out, device="cpu")
"""


@pytest.mark.parametrize("phase", KILLS)
def test_killed_in_any_phase_and_resumed_it_has_the_numbers_of_an_uninterrupted_one(
    whole, file, tmp_path, phase, forks
):
    where, calls = KILLS[phase]
    out = tmp_path / "out"
    process = forks.start(KILLER, where, calls, file, out)
    assert process.wait() == -9, process.said
    state = read_state(out)
    assert state is not None
    assert not state.finished
    tcsae.study(file, out=out, device="cpu")
    assert numbers(out) == numbers(whole.folder)


def test_a_member_that_fails_is_a_row_with_its_sentence_and_the_rest_is_as_without_it(
    whole, tiny_gemma2, text, tmp_path
):
    """The learning rate of one variant is absurd: its training ends, that of the others does not notice."""
    partner = '"temporal.partner" = "shuffled"'
    absurd = {f'"temporal.weight" = 0.1, {partner}': f'{partner}, "optimiser.lr" = 1e30'}
    file = write_study(tmp_path / "tiny.toml", tiny_gemma2, text, **absurd)
    out = tmp_path / "out"
    done = tcsae.study(file, out=out, device="cpu")
    failed = [f"l{layer}-shuffled-s{seed}" for layer in (1, 2) for seed in (0, 1)]
    assert [name.split()[-1] for name in done.failures] == failed
    assert len(done.analysis.failures) == 4
    assert all("is not finite at step" in sentence for sentence in done.failures.values())
    kept = numbers(whole.folder)
    assert {
        key: value for key, value in numbers(out).items() if not key.startswith("untrained")
    }.items() <= kept.items()
    again = tcsae.study(file, out=out, device="cpu")  # a failure is not tried again, and is still said
    assert again.failures == done.failures


def test_a_damaged_run_is_said_and_the_other_layer_is_judged(whole, file, tmp_path):
    shutil.copytree(whole.folder, tmp_path / "out")
    record = next((tmp_path / "out/runs").glob("*/l1-next-s0")) / "train.json"
    record.write_text(record.read_text().replace('"steps": 20', '"steps": 21'))
    done = tcsae.study(file, out=tmp_path / "out", device="cpu")
    assert (done.analysis.finished, len(done.failures)) == (6, 6)
    assert all("train.json is damaged or was changed" in sentence for sentence in done.failures.values())


def test_all_members_failing_is_one_sentence(tiny_gemma2, text, tmp_path):
    file = write_study(tmp_path / "t.toml", tiny_gemma2, text, **{'"sae.k" = 4': '"sae.k" = 4\n"optimiser.lr" = 1e30'})
    with pytest.raises(RunError, match=r"no SAE of the study has a result: .*not finite at step"):
        tcsae.study(file, scale="one", out=tmp_path / "out", device="cpu")


def test_a_text_that_cannot_be_had_leaves_the_other_alone(file, tmp_path):
    study = read_study(file, "one")
    (there,) = study.sizes.texts
    missing = there.model_copy(update={"dataset": str(tmp_path / "nowhere.txt")})
    sizes = study.sizes.model_copy(update={"texts": (missing, there)})
    study = study.model_copy(update={"scales": {"one": sizes}})
    done = tcsae.study(study, out=tmp_path / "out", device="cpu")
    assert (done.analysis.finished, len(done.failures)) == (2, 2)
    assert all("nowhere.txt" in sentence for sentence in done.failures.values())


def test_a_changed_file_is_refused(whole, tiny_gemma2, text, tmp_path):
    changed = write_study(tmp_path / "tiny.toml", tiny_gemma2, text, **{"margin = 0.01": "margin = 0.02"})
    with pytest.raises(
        UsageError, match=r"was begun with the file of hash .*, this file has hash .*give another --out"
    ):
        tcsae.study(changed, out=whole.folder, device="cpu")
    with pytest.raises(UsageError, match="holds the study tiny at scale small, you asked for tiny at scale one"):
        tcsae.study(changed, scale="one", out=whole.folder, device="cpu")


def test_stores_and_runs_that_were_taken_along_are_used_and_only_what_is_new_is_measured(
    whole, tiny_gemma2, text, tmp_path, monkeypatch, capsys
):
    table = '[cost_alone]\nvariants = ["none", "next"]\nsteps = 3\nrepeats = 1\n\n[rule]'
    changed = write_study(
        tmp_path / "tiny.toml", tiny_gemma2, text, **{"margin = 0.01": "margin = 0.02", "[rule]": table}
    )
    for part in ("stores", "runs", "reports"):
        shutil.copytree(whole.folder / part, tmp_path / "out" / part)
    monkeypatch.setattr("tcsae.extract.run.StoreSetRun.run", lambda *_: pytest.fail("the store is there"))
    monkeypatch.setattr("tcsae.train.loop.trainer.Pass.run", lambda *_: pytest.fail("the runs are there"))
    monkeypatch.setattr("tcsae.evaluate.one_pass.Measurement.run", lambda *_: pytest.fail("the rows are there"))
    asked = []

    def trained(each):
        asked.append(each.name)
        if len(asked) == 3:
            raise RunError("no process can be started: try again")
        return {
            "steps": 3,
            "tokens": 180,
            "seconds": 1.0,
            "held_bytes": 10**8,
            "peak_bytes": 10**8 + 10**6 * len(asked),
        }

    monkeypatch.setattr("tcsae.study.alone._train_in_a_process", trained)
    done = tcsae.study(changed, out=tmp_path / "out", device="cpu")
    assert (done.analysis.finished, done.failures, done.analysis.alone) == (12, {}, [])
    (name,) = (stage for stage in plan_study(read_study(changed)).stages if stage.startswith("cost "))
    plan = plan_study(read_study(changed), tmp_path / "out")
    (line,) = (line for line in study_status(plan).stages if line.stage == name)
    assert (line.state, line.progress) == ("failed", "2 of 4 SAEs: no process can be started: try again")
    (left,) = (each for each in estimate_study(plan, [each for each in plan.stages if each != name]))
    assert (left.stage, left.what) == (name, "4 SAEs, 3 steps, each in a process of its own")
    assert left.seconds > 0
    done = tcsae.study(changed, out=tmp_path / "out", device="cpu")
    assert asked == ["l1-none-s0", "l1-next-s0", "l1-none-s1", "l1-none-s1", "l1-next-s1"], "seed by seed, each once"
    assert [one.memory_bytes for one in done.analysis.alone] == [1e6, 2e6, 4e6, 5e6]
    assert {row.variant: row.alone_memory_bytes for row in done.analysis.costs} == {
        "none": 2.5e6, "next": 3.5e6, "shuffled": None
    }  # fmt: skip
    page = done.page.read_text()
    assert "for this alone: each SAE in a process of its own. Memory " in page
    assert "<td>2.5 MB</td>" in page
    assert "| variant, trained alone |" in document([done.analysis])
    assert "| variant, trained alone |" not in document([whole.analysis])


def test_a_changed_file_may_begin_anew(tiny_gemma2, text, tmp_path):
    out = tmp_path / "out"
    for margin in ("0.01", "0.02"):
        file = write_study(tmp_path / "t.toml", tiny_gemma2, text, **{"margin = 0.01": f"margin = {margin}"})
        done = tcsae.study(file, scale="one", out=out, device="cpu", fresh=True)
    state = read_state(out)
    assert state is not None
    assert state.fingerprint == read_study(file, "one").fingerprint() == done.analysis.fingerprint


def test_what_a_killed_start_leaves_is_no_foreign_file(tmp_path):
    (tmp_path / "study.json.0a1b2c3d.partial").write_text("killed before its first file was there")
    check_free(tmp_path)


def test_a_foreign_folder_is_refused(file, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"is no folder of a study and holds other files \(notes.txt\)"):
        tcsae.study(file, out=tmp_path, device="cpu", fresh=True)
    assert (tmp_path / "notes.txt").exists()


def test_a_configuration_that_cannot_be_is_said_before_anything_runs(tiny_gemma2, text, tmp_path):
    file = write_study(tmp_path / "t.toml", tiny_gemma2, text, **{'"sae.k" = 4': '"sae.k" = 64'})
    with pytest.raises(UsageError, match="k is 64, the dictionary has 32 features"):
        tcsae.study(file, out=tmp_path / "out", device="cpu")
    assert not list((tmp_path / "out").iterdir())  # so that the corrected file may have the folder


def test_ctrl_c_says_how_far_it_is(file, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(study_run, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt, match=r"2 of 3 stages are finished .*; the same command goes on from there"):
        tcsae.study(file, scale="one", out=tmp_path / "out", device="cpu")


def test_documents_are_written_of_all_studies_side_by_side(whole, file, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("docs").mkdir()
    assert main(["study", str(file), "--scale", "one", "--out", "out/one", "--device", "cpu", "--write-docs"]) == 0
    assert "Does it run?" in Path("docs/RESULTS.md").read_text()
    assert "out/one/index.html" in capsys.readouterr().out


def test_a_file_without_cost_alone_has_the_hash_it_had(file):
    """Of studies that were run before there was such a table: docs/RESULTS.md says their hashes."""
    said = (house.ROOT / "docs/RESULTS.md").read_text()
    for name in ("verdict", "rivals"):
        assert f"hash {read_study(house.ROOT / f'studies/{name}.toml', 'small').fingerprint()}" in said
    study = read_study(file)
    asked = study.model_copy(update={"cost_alone": CostAlone(variants=("none",), steps=3)})
    assert asked.fingerprint() != study.fingerprint()


def test_a_scale_that_does_not_run_a_variant_does_not_measure_it(file):
    study = read_study(file, "one").model_copy(update={"cost_alone": CostAlone(variants=("shuffled", "next"), steps=3)})
    (text,) = plan_study(study).texts
    assert [each.name for each in text.alone.members] == ["l1-next-s0"]
    assert text.stages == (
        f"extract {text.name}",
        f"train {text.name} l1",
        f"cost {text.name} l1",
        f"evaluate {text.name}",
    )
    config = text.alone.members[0].config
    assert (config.run.steps, config.run.checkpoint_every, config.run.checkpoint_minutes) == (3, 3, 0), "no checkpoint"
    assert plan_study(study.model_copy(update={"cost_alone": CostAlone(variants=("shuffled",))})).texts[0].alone is None


def test_plans_name_every_member_once(file):
    plan = plan_study(read_study(file))
    assert [each.name for each in plan.members] == MEMBERS
    assert str(plan.out) == "studies/out/tiny-small"


def test_a_variant_and_an_outcome_of_a_plugin_are_judged_like_any_other(tiny_gemma2, text, tmp_path):
    written = (house.ROOT / "docs/EXTENDING.md").read_text()
    plugins = []
    for name in ("second_difference", "same_strongest"):
        (code,) = (part for part in re.findall(r"```python\n(.*?)```", written, re.S) if f"def {name}(" in part)
        plugins.append(str(tmp_path / f"{name}.py"))
        Path(plugins[-1]).write_text(code)
    changes = {
        '"sae.k" = 4': f'"sae.k" = 4\n"run.plugins" = {json.dumps(plugins)}',
        'train = { "temporal.weight" = 0.1 }': 'train = { "temporal.form" = "second_difference" }',
        "same_token": "same_strongest",
    }
    done = tcsae.study(
        write_study(tmp_path / "t.toml", tiny_gemma2, text, **changes), scale="one", out=tmp_path / "out", device="cpu"
    )
    assert done.failures == {}
    (comparison,) = done.analysis.comparisons
    assert "same_strongest" in comparison.model_dump_json()
    assert set(load_run(next(done.folder.glob("runs/*/l1-next-s0"))).plugins) == {Path(each).name for each in plugins}
