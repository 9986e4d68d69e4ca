"""An evaluation on a text that was evaluated on before does not run the untouched model again, and says the same."""

from __future__ import annotations

import shutil

import pytest
from tcsae.console import speaking
from tcsae.errors import UsageError
from tcsae.evaluate.config import REFERENCES_FOLDER, EvaluateConfig
from tcsae.evaluate.model.splice import SplicedModel
from tcsae.evaluate.run import evaluate
from tcsae.on_disk import entries
from tcsae.sites import Location
from tcsae.train.sae.activation import Activation
from tiny import tiny_corpus, tiny_model
from tiny_runs import make_manifest, make_run, random_sae

ROWS = 4
SMALL = {"batches": 3, "batch_rows": ROWS, "device": "cpu", "dtype": "float32", "quick": True, "references": ("mean",)}


pytestmark = pytest.mark.usefixtures("no_figures")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("untouched")
    model, text = tiny_model("llama", folder / "model"), tiny_corpus(folder / "text", documents=60, words=40)
    for seed, (name, site) in enumerate((("one", "resid_post"), ("two", "resid_post"), ("deeper", "mlp_out"))):
        manifest = make_manifest(model, text, 1).model_copy(update={"hook_name": Location(1, site).hook_name})
        sae = random_sae(manifest.d_model, 24, Activation("relu"), seed)
        make_run(folder / "runs", name, manifest, seed=seed, sae=sae)
    return folder


@pytest.fixture
def passes(monkeypatch):
    """How many rows every pass of the untouched model had, without those in which the splice is tried."""
    found: list[int] = []
    real = SplicedModel.clean

    def count(self, tokens_BT, locations):
        found.append(len(tokens_BT))
        return real(self, tokens_BT, locations)

    monkeypatch.setattr(SplicedModel, "clean", count)
    return found


def report_of(place, out, run, **more):
    config = EvaluateConfig(runs=(str(place / "runs" / run),), out=str(out), name=run, **(SMALL | more))
    return evaluate(config)[0].report


@pytest.mark.parametrize(
    "more", [{}, {"splice_rows": 5}, {"dtype": "bfloat16"}, {"only": ("temporal",)}, {"only": ("fidelity",)}]
)
def test_the_same_is_said_and_the_model_runs_once(place, tmp_path, passes, more):
    apart = report_of(place, tmp_path / "apart", "two", keep_states=0.0, **more)
    passes.clear()
    report_of(place, tmp_path, "one", **({} if more.get("only") == ("temporal",) else more))
    assert passes[:2] == [2, 1], "the two trials of the splice"
    assert sum(passes[2:]) == 12, "the look at the text is the pass itself"
    passes.clear()
    again = report_of(place, tmp_path, "two", **more)
    assert passes == [2, 1]
    for name in ("two", "mean") if more.get("only") != ("temporal",) else ("two",):
        assert again.record(name, 1).metrics == apart.record(name, 1).metrics
        assert again.record(name, 1).curves == apart.record(name, 1).curves


def test_a_place_inside_a_block_is_kept_with_what_comes_before_it(place, tmp_path, passes):
    apart = report_of(place, tmp_path / "apart", "deeper", keep_states=0.0)
    report_of(place, tmp_path, "one")
    for out in (tmp_path, tmp_path / "other reports"):  # another place of a text that is known, and nothing known
        report_of(place, out, "deeper")
        kept = {path.name for path in (out / REFERENCES_FOLDER).rglob("*.safetensors")}
        assert {"0000000-l1.mlp_out.safetensors", "0000000-before-1.safetensors", "0000000-final.safetensors"} <= kept
        (out / REFERENCES_FOLDER).rename(out / "states alone")
        for rows in (out / "states alone").rglob("*.npz"):
            rows.unlink()
        (out / "states alone").rename(out / REFERENCES_FOLDER)
        shutil.rmtree(out / "deeper")
        passes.clear()
        again = report_of(place, out, "deeper")
        assert passes == [2, 1]
        assert [one.metrics for one in again.records] == [one.metrics for one in apart.records]


def test_fresh_runs_it_and_damage_too(place, tmp_path, passes, capsys):
    first = report_of(place, tmp_path, "one")
    passes.clear()
    report_of(place, tmp_path, "one", fresh=True)
    assert passes.count(ROWS) == 3
    file = next((tmp_path / REFERENCES_FOLDER).rglob("0000004-final.safetensors"))
    file.write_bytes(file.read_bytes()[:-5])
    passes.clear()
    report_of(place, tmp_path, "two")
    assert passes.count(ROWS) == 1
    assert "0000004-final.safetensors cannot be used" in capsys.readouterr().err.replace("\n", "")
    assert report_of(place, tmp_path, "one").record("one", 1) == first.record("one", 1)


def test_how_much_is_kept_is_chosen(place, tmp_path, capsys):
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(UsageError, match=r"--keep-states .* is no number of GB: use 0 for none, or more"):
            EvaluateConfig(keep_states=bad)
    with speaking(True):
        report_of(place, tmp_path, "one", keep_states=1e-6)
    assert "more than the" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.safetensors"))
    report_of(place, tmp_path, "two")
    (entry,) = [entry for entry in entries([tmp_path]) if entry.kind == "references"]
    kept = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    assert entry.n_bytes > kept > 0
    assert "states of the model" in entry.state
