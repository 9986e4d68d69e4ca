"""What stands in the way of a model, said before its weights are read."""

from __future__ import annotations

import pytest
import transformers
from tcsae.errors import ModelError
from tcsae.extract.config import ModelSource
from tcsae.extract.model import load
from tcsae.extract.model.load import check_context, outline_model


@pytest.mark.parametrize("field", ["max_position_embeddings", "max_seq_len", "n_positions"])
def test_a_context_larger_than_the_model_reads_is_a_sentence(field):
    config = transformers.PretrainedConfig(**{field: 64})
    check_context(config, "tiny", 64)
    with pytest.raises(ModelError, match="tiny reads at most 64 tokens at a time; you asked for --context 65"):
        check_context(config, "tiny", 65)


@pytest.mark.parametrize("unknown", [-1, 0, None])
def test_a_length_that_nobody_knows_allows_any_context(unknown):
    check_context(transformers.PretrainedConfig(max_position_embeddings=unknown), "tiny", 4096)


@pytest.mark.parametrize("package", ["sentencepiece", "tiktoken", "protobuf"])
def test_a_tokenizer_without_its_library_names_the_package(tiny_llama, monkeypatch, package):
    def refuse(*args, **options):
        raise ImportError(f"This tokenizer requires the {package} library but it was not found in your environment.")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", refuse)
    monkeypatch.setattr(load, "find_spec", lambda module: None)
    with pytest.raises(ModelError, match=f"has a tokenizer that needs {package}, .*: pip install {package}"):
        outline_model(ModelSource(str(tiny_llama)))
