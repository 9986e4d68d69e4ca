"""What a first user runs into with models and the command line: one sentence each, and the exit status that goes with
it.
"""

import json
import shlex
import shutil
import time

import pytest
from tcsae.errors import ModelError, TcsaeError
from tcsae.extract.config import ExtractConfig, ModelSource, TextSource, command_line, model_source, text_source
from tcsae.extract.model.load import identify_model, load_language_model, outline_model
from tcsae.pipeline import main


def refused(kind):
    from huggingface_hub import errors

    error = getattr(errors, kind)
    return error.__new__(error, "401 Client Error")


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("GatedRepoError", r"is gated .*: accept its licence at .*/google/gemma-2-2b, "
         r"then .*`hf auth login` or set HF_TOKEN"),
        ("RepositoryNotFoundError", r"there is no model 'google/gemma-2-2b': no such folder or file here"),
        ("RevisionNotFoundError", r"exists on the hub but not in that revision"),
        ("LocalEntryNotFoundError",
        r"the hub cannot be reached and model google/gemma-2-2b is not complete .* pass a folder"),
    ],
)  # fmt: skip
def test_hub_refusals(monkeypatch, kind, sentence):
    import huggingface_hub

    def snapshot_download(*_, **__):
        raise refused(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ModelError, match=sentence):
        outline_model(ModelSource())


def test_without_a_network_nothing_hangs(tmp_path, monkeypatch):
    """The real client, offline as every test: an answer at once, and it names the local way."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    began = time.perf_counter()
    with pytest.raises(ModelError, match=r"hub cannot be reached .* pass a folder on this machine instead"):
        outline_model(ModelSource())
    assert time.perf_counter() - began < 30


def test_weights_come_from_the_hub_at_one_commit(monkeypatch, tmp_path, tiny_llama):
    """First the configuration and tokenizer, then, from the same commit, the weights."""
    import huggingface_hub

    commit = "b" * 40
    snapshot, asked = tmp_path / commit, []

    def snapshot_download(name, *, revision, allow_patterns):
        asked.append((name, revision))
        snapshot.mkdir(exist_ok=True)
        for pattern in allow_patterns:
            for path in tiny_llama.glob(pattern):
                shutil.copy(path, snapshot)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    outline = outline_model(ModelSource("someone/llama", revision="main"))
    assert not list(snapshot.glob("*.safetensors"))
    lm = load_language_model(outline, deepest_layer=1)
    assert asked == [("someone/llama", "main"), ("someone/llama", commit)]
    assert (lm.identity.id, lm.identity.revision) == ("someone/llama", commit)
    assert lm.identity.fingerprint == identify_model(outline_model(ModelSource(str(tiny_llama)))).fingerprint
    assert model_source(lm.identity) == ModelSource("someone/llama", commit, None, "auto", lm.identity.dtype)


def test_folders_that_hold_no_model(tmp_path, tiny_llama):
    (tmp_path / "empty").mkdir()
    half = shutil.copytree(tiny_llama, tmp_path / "half")
    (half / "model.safetensors").unlink()
    (tmp_path / "ggufs").mkdir()
    (tmp_path / "ggufs" / "m.Q4.gguf").write_bytes(b"GGUF")
    (tmp_path / "file.bin").write_bytes(b"")
    for source, sentence in [
        (ModelSource(str(tmp_path / "gone")), "there is no model at .*gone: give a folder"),
        (ModelSource(str(tmp_path / "gone.gguf")), "there is no model at .*gone.gguf"),
        (ModelSource(str(tmp_path / "empty")), "holds no config.json: save the model there"),
        (ModelSource(str(tmp_path / "ggufs")), "holds no config.json: say --gguf-file with one of m.Q4.gguf"),
        (
            ModelSource(str(tmp_path / "ggufs"), gguf_file="x.gguf"),
            "holds no file x.gguf: its .gguf files are m.Q4.gguf",
        ),
        (
            ModelSource(str(tmp_path / "ggufs" / "m.Q4.gguf")),
            r"\(m.Q4.gguf\) cannot be opened as a causal language model",
        ),
        (ModelSource(str(tmp_path / "file.bin")), "is a file but not a .gguf file"),
        (ModelSource(str(half)), "holds a configuration but no weights"),
    ]:
        with pytest.raises(ModelError, match=sentence):
            load_language_model(source)


def test_missing_tensors_are_not_made_up(tmp_path, tiny_llama):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny_llama, tmp_path / "torn")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lack 1 tensors, such as model.layers.2.mlp.up_proj.weight"):
        load_language_model(ModelSource(str(folder)))


def test_fingerprint_is_of_weights_and_configuration_not_of_names_or_versions(tmp_path, tiny_llama):
    same = shutil.copytree(tiny_llama, tmp_path / "same")
    config = json.loads((same / "config.json").read_text())
    (same / "config.json").write_text(json.dumps(config | {"transformers_version": "4.57.0"}))
    other = shutil.copytree(tiny_llama, tmp_path / "other")
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    first, second, third = (identify_model(outline_model(ModelSource(str(f)))) for f in (tiny_llama, same, other))
    assert first.fingerprint == second.fingerprint != third.fingerprint
    assert first.tokenizer_fingerprint == third.tokenizer_fingerprint


@pytest.fixture
def words(tiny_gpt2, corpus, tmp_path):
    return [
        "extract",
        "--model",
        str(tiny_gpt2),
        "--dataset",
        str(corpus),
        "--context",
        "16",
        "--out",
        str(tmp_path / "out"),
    ]


@pytest.mark.parametrize(
    ("extra", "status", "sentence"),
    [
        (["--layers", "4", "--tokens", "1k"], 1, "has 4 layers, numbered 0 to 3; you asked for layer 4"),
        (["--layers", "1", "--tokens", "many"], 2, "'many' is not a count"),
        (["--layers", "1", "1"], 2, "--layers 1 1 must be different numbers from 0 up"),
        (["--layers", "1", "--batch-size", "big"], 2, "--batch-size big must be a number, or auto"),
        (["--layers", "1", "--context", "300"], 1, "reads at most 256 tokens at a time; you asked for --context 300"),
        (["--layers", "1", "--dtype", "int8"], 2, "--dtype int8 is unknown"),
        (["--layers", "1", "--workers", "2", "--scheduler", "tcp://x"], 2, "give only one of them"),
        (["--layers", "1", "--compression", "rar"], 2, "compression 'rar' is unknown"),
    ],
)
def test_command_line_failures(words, extra, status, sentence, capsys, tmp_path):
    assert main([*words, *extra]) == status
    said = capsys.readouterr().err
    assert sentence in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layers", [["--layers", "1", "3"], ["--layers=1,3"], ["--layers", "1", "--layers", "3"]])
def test_the_command_in_json(words, layers, capsys, tmp_path):
    assert main([*words, *layers, "--tokens", "0.4k", "--json", "--batch-size", "5"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["rows"] == 25
    assert facts["stores"] == [str(tmp_path / "out" / f"l{layer}.zarr") for layer in (1, 3)]
    assert facts["tokens_per_second"] > 0
    assert main([*words, *layers, "--tokens", "0.4k"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("already complete")
    assert "plan: 25 rows of 16 tokens (400)" in said.err


def test_dry_run_command(words, capsys, tmp_path):
    assert main([*words, "--layers", "1", "--tokens", "400", "--dry-run", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["rows"] == 25
    assert facts["seconds"] > 0
    assert not (tmp_path / "out").exists()


def test_command_line_of_a_config_makes_the_config_again(monkeypatch):
    config = ExtractConfig(
        (3, 1),
        ModelSource("a b/c", "v1", None, "cpu", "float32"),
        TextSource("x:y", "r", "test", "body", "topic", "concat", 64, 7, 0.05),
        tokens=12345,
        batch_size=3,
        out="s3://bucket/x",
        compression="lz4",
        shard_bytes=10**6,
        fresh=True,
        workers=2,
    )
    seen = []
    monkeypatch.setattr(
        "tcsae.extract.run.extract", lambda config: seen.append(config) or (_ for _ in ()).throw(TcsaeError("done"))
    )

    assert main(shlex.split(command_line(config))[1:]) == 1
    [made] = seen
    assert made == ExtractConfig(**{**vars(config), "fresh": False})


def test_sources_come_back_from_a_manifest(tiny_gemma2, corpus):
    from tcsae.extract.text.open import resolve_text

    text = TextSource(str(corpus), context=16, packing="concat", seed=3, held_out=0.25)
    identity = resolve_text(text, outline_model(ModelSource(str(tiny_gemma2))))
    assert text_source(identity) == text
