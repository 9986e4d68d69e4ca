"""The examples of docs/EXTENDING.md, each as the plug-in it is."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from saes import random_sae
from stores import make_store
from tcsae import SparseAutoencoder
from tcsae.cache.store import ActivationStore
from tcsae.errors import RunError
from tcsae.evaluate.results import read_results
from tcsae.extract.config import ModelSource
from tcsae.extract.model.load import load_language_model
from tcsae.pipeline import main
from tcsae.plugins import forget_plugin, load_plugins
from tcsae.train.formats.locate import load_external
from tcsae.train.formats.registry import FORMATS, writable_format
from tcsae.train.run_folder.record import load_run
from tiny import tiny_corpus, tiny_model

PAGE = Path(__file__).parents[1] / "docs" / "EXTENDING.md"


@pytest.fixture
def example(tmp_path):
    """Write the Python file of a section and load it as a plug-in; what it registered is forgotten afterwards."""
    written = []

    def load(heading: str) -> Path:
        section = PAGE.read_text(encoding="utf-8").split(f"## {heading}\n")[1].split("\n## ")[0]
        source = re.findall(r"^```python\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL)[0]
        assert 10 <= len(source.splitlines()) <= 35
        file = tmp_path / "example.py"
        file.write_text(source, encoding="utf-8")
        written.append(file)
        load_plugins([file])
        return file

    yield load
    for file in written:
        forget_plugin(file)


def command(tmp_path, plugin, *more):
    """Exit status of a small training."""
    folder = tmp_path / "stores"
    store = next(folder.glob("*.zarr"), None) or make_store(folder, layer=3)
    small = ["--steps", "6", "--batch-size", "60", "--width", "16", "--k", "3", "--out", str(tmp_path / "runs")]
    return main(["train", "--store", str(store), *small, "--plugin", str(plugin), *more])


def train(tmp_path, plugin, *more):
    """The run folders of one that works, by name."""
    assert command(tmp_path, plugin, *more) == 0
    return {path.name: path for path in (tmp_path / "runs").iterdir()}


def weights_of(path):
    return (path / "sae_weights.safetensors").read_bytes()


def test_a_temporal_term(example, tmp_path):
    plugin = example("A temporal term")
    runs = train(tmp_path, plugin, "--temporal", "second_difference", "--temporal-weight", "0.5")
    assert sorted(runs) == ["l3-topk3-none-s0", "l3-topk3-second_difference0.5-w5-s0"]
    record = load_run(runs["l3-topk3-second_difference0.5-w5-s0"])
    assert (record.step, list(record.plugins)) == ("autograd", ["example.py"])
    assert load_run(runs["l3-topk3-none-s0"]).step == "fast"
    assert record.metrics["temporal"] > 0
    assert weights_of(runs["l3-topk3-none-s0"]) != weights_of(runs["l3-topk3-second_difference0.5-w5-s0"])


def test_a_temporal_term_in_a_sweep_is_what_it_is_alone(example, tmp_path):
    plugin = example("A temporal term")
    swept = train(tmp_path, plugin, "--temporal", "second_difference", "--sweep", "temporal-weight=0.1,0.5")
    alone = train(tmp_path / "alone", plugin, "--temporal", "second_difference", "--temporal-weight", "0.5")
    name = "l3-topk3-second_difference0.5-w5-s0"
    assert weights_of(swept[name]) == weights_of(alone[name])


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        ("--step", "fast", "no hand-written step for temporal term 'second_difference'"),
        ("--temporal-partner", "shuffled", "compares the tokens of a window among themselves"),
        ("--window", "2", "needs windows of at least 3 tokens"),
    ],
)
def test_what_a_temporal_term_cannot_do_is_said(example, tmp_path, capsys, kind, more, message):
    plugin = example("A temporal term")
    assert command(tmp_path, plugin, "--temporal", "second_difference", kind, more) == 2
    assert message in capsys.readouterr().err


def test_a_partner(example, tmp_path):
    runs = train(tmp_path, example("A partner"), "--temporal-partner", "mirror", "--temporal-weight", "0.5")
    record = load_run(runs["l3-topk3-pairwise0.5-mirror-w5-s0"])
    assert (record.step, record.metrics["temporal"] > 0) == ("fast", True)


def test_an_architecture(example, tmp_path):
    runs = train(tmp_path, example("An architecture"), "--architecture", "two_step")
    path = runs["l3-two_step3-pairwise0.03-w5-s0"]
    sae = SparseAutoencoder.load(path)
    x = torch.randn(5, sae.d_model)
    first = sae.activate(sae.pre_activations(x))
    pre = sae.pre_activations(x) + (x - sae.decode(first)) @ sae.W_enc
    torch.testing.assert_close(sae.encode(x), sae.activate(pre))
    assert (sae.architecture, sae.activation.k, load_run(path).step) == ("two_step", 3, "autograd")


def test_an_architecture_needs_its_plugin_to_be_read(example, tmp_path):
    plugin = example("An architecture")
    path = train(tmp_path, plugin, "--architecture", "two_step")["l3-two_step3-pairwise0.03-w5-s0"]
    forget_plugin(plugin)
    with pytest.raises(RunError, match="of architecture 'two_step', which a plug-in registers: give --plugin"):
        SparseAutoencoder.load(path)


def test_an_activation(example, tmp_path):
    path = train(tmp_path, example("An activation"), "--activation", "squared_relu")["l3-squared_relu0.5-none-s0"]
    sae = SparseAutoencoder.load(path)
    x = torch.randn(5, sae.d_model)
    torch.testing.assert_close(sae.encode(x), torch.relu(sae.pre_activations(x)).pow(2))


@pytest.mark.parametrize("change", ["changed", "left out"])
def test_an_unfinished_run_does_not_go_on_with_another_plugin(example, tmp_path, capsys, monkeypatch, change):
    plugin = example("A temporal term")
    asked = ["--temporal", "second_difference", "--no-baseline", "--name", "begun"]
    monkeypatch.setattr("tcsae.train.passes.finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert command(tmp_path, plugin, *asked) == 130
    monkeypatch.undo()
    if change == "changed":
        plugin.write_text(plugin.read_text() + "# another idea\n")
        message = "the plug-in example.py has changed since it was begun"
    else:
        elsewhere = tmp_path / "other.py"
        elsewhere.write_text(plugin.read_text())
        forget_plugin(plugin)
        plugin, message = elsewhere, "the plug-in example.py, which was not given"
    capsys.readouterr()
    assert command(tmp_path, plugin, *asked) == 1
    assert message in capsys.readouterr().err
    forget_plugin(plugin)


def test_an_sae_format(example, tmp_path):
    example("An SAE format")
    sae = random_sae().eval()
    FORMATS.get(writable_format("lab_npz")).write(sae, tmp_path / "sae")
    found = load_external(str(tmp_path / "sae"))
    assert (found.source, found.layer, found.name) == ("lab-npz", 3, "sae")
    x = torch.randn(4, 6)
    assert torch.equal(found.sae.encode(x), sae.encode(x))


def test_what_an_example_registered_is_forgotten_afterwards(tmp_path):
    (tmp_path / "lab.npz").write_bytes(b"")
    with pytest.raises(RunError, match="holds no SAE of a known format"):
        load_external(str(tmp_path), 0)


def test_a_plugin_may_be_the_first_to_use_a_built_in(tmp_path):
    """In a process of its own: here every built-in module was imported long ago."""
    plugin = tmp_path / "plugin.py"
    plugin.write_text("from tcsae.train.formats.saelens import SAELens\n")
    code = (
        "import sys; from tcsae.plugins import load_plugins; from tcsae.train.formats.registry import FORMATS; "
        "load_plugins(sys.argv[1:]); assert FORMATS.owner('saelens') is None; assert FORMATS.get('saelens')"
    )
    done = subprocess.run([sys.executable, "-c", code, str(plugin)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_hook_point(example, tmp_path):
    plugin = example("A hook point")
    model, text = tiny_model("llama", tmp_path / "model"), tiny_corpus(tmp_path / "text", words=40)
    what = ["--model", str(model), "--dataset", str(text), "--context", "16", "--held-out", "0.5", "--tokens", "1k"]
    what += ["--out", str(tmp_path / "cache"), "--device", "cpu", "--dtype", "float32", "--plugin", str(plugin)]
    assert main(["extract", "--layers", "1", "--site", "resid_mid", "mlp_in", *what]) == 0
    middle, given = (ActivationStore.open(tmp_path / "cache" / f"l1.{site}.zarr") for site in ("resid_mid", "mlp_in"))
    assert given.manifest.hook_name == "blocks.1.ln2.hook_normalized"
    assert given.manifest.plugins == load_plugins([plugin])
    lm = load_language_model(ModelSource(str(model), device="cpu", dtype="float32"))
    read = lm.blocks[1].post_attention_layernorm(middle.rows(0, 20).float())
    assert torch.allclose(given.rows(0, 20).float(), read, atol=0.05, rtol=0.02)  # both were rounded to bfloat16
    (run,) = train_on(given, tmp_path)
    assert (
        main(["evaluate", "--run", str(run), "--plugin", str(plugin), "--out", str(tmp_path / "reports"), *QUICK]) == 0
    )
    report = read_results(tmp_path / "reports" / "model")
    assert {(record.layer, record.site) for record in report.records} == {(1, "mlp_in")}
    assert report.record("identity_bf16", 1, "mlp_in").metrics["kl"].value < 1e-3
    plugin.write_text(plugin.read_text() + "# another version\n")
    assert main(["extract", "--layers", "1", "--site", "mlp_in", *what, "--tokens", "2k"]) == 1


QUICK = ["--quick", "--batches", "2", "--batch-size", "4", "--device", "cpu", "--dtype", "float32"]


def train_on(store, tmp_path):
    small = ["--steps", "5", "--batch-size", "60", "--width", "16", "--k", "3", "--no-baseline", "--temporal", "none"]
    assert main(["train", "--store", store.path, *small, "--out", str(tmp_path / "runs")]) == 0
    return (tmp_path / "runs").iterdir()
