"""Warm starts: a run begins with what another SAE computes, whatever its format and units, and so does its twin."""

import json
import shutil

import numpy as np
import pytest
import torch
from stores import make_store
from tcsae.cache.store import ActivationStore
from tcsae.errors import RunError, UsageError
from tcsae.pipeline import main
from tcsae.train.config import TrainConfig
from tcsae.train.formats.export import export
from tcsae.train.formats.locate import read_sae
from tcsae.train.loop import warm_start
from tcsae.train.loop.member import Member
from tcsae.train.loop.warm_start import for_training
from tcsae.train.presets import changed
from tcsae.train.run import train
from tcsae.train.run_folder.record import load_run
from tcsae.train.sae.activation import Activation
from tcsae.train.sae.gated import GatedSAE
from tcsae.train.sae.temporal_sae import TemporalSAE

D, F = 8, 24
SMALL = {"batch_size": 60, "steps": 3, "width": F, "k": 4, "device": "cpu", "dtype": "float32"}


def options(**more):
    base = {"data.batch_size": 60, "run.steps": 3, "sae.width": F, "sae.k": 4, "run.device": "cpu"}
    return changed(TrainConfig(), base | {"run.dtype": "float32"} | more)


def random_sae(kind, *, norms=True, subtract=True, seed=0):
    draw = torch.Generator().manual_seed(seed)
    if kind == "gated":
        sae = GatedSAE(D, F, subtract_b_dec=subtract)
    else:
        sae = TemporalSAE(D, F, Activation(kind, k=4 if "topk" in kind else None), subtract_b_dec=subtract)
    with torch.no_grad():
        for value in sae.parameters():
            value.copy_(0.5 * torch.randn(value.shape, generator=draw))
        if kind == "jumprelu":
            sae.threshold.abs_()
        if kind == "batchtopk":
            sae.threshold.fill_(0.7)
        if norms is False:
            sae.W_dec.copy_(3.0 * torch.nn.functional.normalize(sae.W_dec, dim=-1))
    return sae.eval()


@pytest.mark.parametrize("scale", [1.0, 0.03, 20.0])
@pytest.mark.parametrize("decoder", ["unit", "free"])
@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize(("kind", "norms"), [
    ("relu", True), ("jumprelu", True), ("gated", True), ("topk", False), ("batchtopk", False), ("relu", False)
])  # fmt: skip
def test_the_reconstruction_is_the_source_s(kind, norms, subtract, decoder, scale):
    if kind == "gated" and not subtract:
        pytest.skip("a gated member subtracts, and its gate cannot be moved: see the refusal below")
    source = random_sae(kind, norms=norms, subtract=subtract)
    config = options(**{"sae.decoder": decoder, "sae.activation": "relu" if kind == "gated" else kind})
    sae = for_training(source, config, scale)
    x = torch.randn(50, D, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        one, other = source(x), sae(scale * x)
    assert torch.allclose(other.reconstruction / scale, one.reconstruction, atol=1e-4)
    assert torch.equal(other.features > 0, one.features > 0)
    assert getattr(sae, "subtract_b_dec", True)
    if decoder == "unit":
        assert torch.allclose(sae.W_dec.norm(dim=-1), torch.ones(F), atol=1e-3)


def test_top_k_with_rows_of_several_norms_needs_a_free_decoder():
    with pytest.raises(UsageError, match=r"topk would choose other features: set sae.decoder = 'free'"):
        for_training(random_sae("topk"), options(), 1.0)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A store, and a finished run on it."""
    folder = tmp_path_factory.mktemp("warm")
    store = make_store(folder / "cache", rows=24, d_model=D)
    config = options(**{"data.store": str(store), "run.out": f"{folder}/runs", "run.name": "source"})
    train(changed(config, {"run.baseline": False}))
    return folder, store, config


def first_weights(monkeypatch):
    """What members hold before their first step, by name."""
    seen = {}
    real = warm_start.begin_from_source

    def begin(member, scale):
        facts = real(member, scale)
        seen[member.plan.name] = ({k: v.clone() for k, v in member.sae.state_dict().items()}, scale)
        return facts

    monkeypatch.setattr("tcsae.train.passes.begin_from_source", begin)
    return seen


@pytest.mark.parametrize("kind", ["run", "saelens", "dictionary-learning"])
def test_a_run_and_its_twin_begin_where_the_source_ended(place, monkeypatch, tmp_path, kind):
    folder, store, config = place
    path = folder / "runs/source"
    if kind != "run":
        path = export(str(path), kind, str(tmp_path / kind))
    seen = first_weights(monkeypatch)
    more = {"run.out": str(tmp_path), "run.name": "warm", "run.init_from": str(path)}
    train(changed(config, more))
    assert set(seen) == {"warm", "warm-twin"}
    assert all(torch.equal(a, seen["warm-twin"][0][name]) for name, a in seen["warm"][0].items())
    source = read_sae(path)[1]
    x = ActivationStore.open(store).rows(0, 4).float()
    for name, (weights, scale) in seen.items():
        begun = TemporalSAE(D, F, Activation("topk", k=4))
        begun.load_state_dict(weights)
        with torch.no_grad():
            assert torch.allclose(begun(scale * x).reconstruction / scale, source(x).reconstruction, atol=1e-4)
        record = load_run(tmp_path / name)
        assert record.finished
        assert (record.origin["path"], record.config["run"]["init_from"]) == (str(path), str(path))
        assert record.origin["hook_name"] == "blocks.3.hook_resid_post"
        assert len(record.origin["weights"]) == 64


def test_a_warm_start_that_is_stopped_goes_on_bit_for_bit(place, tmp_path, monkeypatch):
    """Stopped after its second checkpoint; the source is gone by then."""
    folder, _, config = place
    source = shutil.copytree(folder / "runs/source", tmp_path / "source")
    more = {"run.init_from": str(source), "run.name": "warm", "run.checkpoint_every": 1, "run.steps": 6}
    config = changed(config, more)
    train(changed(config, {"run.out": f"{tmp_path}/whole"}))
    stopping = changed(config, {"run.out": f"{tmp_path}/part"})
    real, steps = Member.after_step, []

    def after_step(self, *args):
        steps.append(self.plan.name)
        if len(steps) == 6:
            raise KeyboardInterrupt
        return real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Member, "after_step", after_step)
        with pytest.raises(KeyboardInterrupt):
            train(stopping)
    shutil.rmtree(source)
    train(stopping)
    for name in ("warm", "warm-twin"):
        one, other = (TemporalSAE.load(f"{tmp_path}/{part}/{name}").state_dict() for part in ("whole", "part"))
        assert all(torch.equal(one[key], other[key]) for key in one)
        assert load_run(f"{tmp_path}/part/{name}").origin["path"] == str(source)


@pytest.mark.parametrize(("changes", "sentence"), [
    ({"sae.width": 32}, "has width 24, asked for is width 32: say --width 24"),
    ({"sae.activation": "relu"}, "has activation topk, asked for is activation relu: say --activation topk"),
    ({"sae.k": 3}, "has k 4, asked for is k 3: say --k 4"),
    ({"sae.architecture": "gated"}, "is of architecture sae: say --architecture sae"),
    ({"sae.groups": (0.5, 1.0)}, "has nested groups of"),
])  # fmt: skip
def test_what_does_not_fit_is_one_sentence(place, tmp_path, changes, sentence):
    folder, _, config = place
    more = {"run.out": str(tmp_path), "run.init_from": f"{folder}/runs/source"}
    with pytest.raises(UsageError, match=sentence):
        train(changed(config, more | changes))
    assert not list(tmp_path.iterdir())


def test_another_width_of_the_model_and_nothing_at_all(place, tmp_path):
    folder, _, config = place
    wide = make_store(tmp_path / "cache", rows=24, d_model=16)
    more = {"run.out": f"{tmp_path}/runs", "run.init_from": f"{folder}/runs/source", "data.store": str(wide)}
    with pytest.raises(UsageError, match="is of width 8, the store of width 16"):
        train(changed(config, more))
    with pytest.raises(RunError, match="there is no SAE at"):
        train(changed(config, more | {"run.init_from": "./nothing"}))


def test_another_source_is_another_run(place, tmp_path):
    folder, store, _ = place
    words = ["train", "--store", str(store), "--out", str(tmp_path), "--name", "warm", "--no-baseline"]
    words += [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    assert main([*words, "--init-from", f"{folder}/runs/source"]) == 0
    assert main(words) == 1
    record = json.loads((tmp_path / "warm/train.json").read_text())
    assert record["origin"]["format"] == "saelens"
    assert np.isfinite(record["metrics"]["explained_variance"])
