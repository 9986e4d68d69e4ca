"""Tiny language models and text for tests: real architectures, random weights, a small trained tokenizer, a few
kilobytes each.

The weights are drawn large (and the norms' gains perturbed) so that softcaps, local attention, layer order and the
final norm all show in the numbers: a mistake in any of them changes activations and logits by far more than rounding.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

KINDS = ("gemma2", "gemma3", "llama", "gpt2", "gpt_neox")
VOCABULARY = 400
# Gemma 2's local layers see 6 tokens, less than any context used in tests; both softcaps are low enough to bite.
_IDS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
_GEMMA = {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8, **_IDS}
_SHAPES: dict[str, dict[str, Any]] = {
    "gemma2": {**_GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 10.0},
    "gemma3": _GEMMA,
    "llama": _IDS,
    "gpt2": {"bos_token_id": 0, "eos_token_id": 0},
    "gpt_neox": {"bos_token_id": 0, "eos_token_id": 0},
}
_CLASSES = {"gemma2": "Gemma2", "gemma3": "Gemma3", "llama": "Llama", "gpt2": "GPT2", "gpt_neox": "GPTNeoX"}


def tiny_model(kind: str, folder: Path | str, *, n_layers: int = 4, d_model: int = 24, seed: int = 0) -> Path:
    """Save a random model of ``kind`` with its tokenizer in ``folder`` and return the folder."""
    folder = Path(folder)
    torch.manual_seed(seed)
    config = _config(kind, n_layers, d_model)
    prefix = _CLASSES[kind]
    name = "GPT2LMHeadModel" if kind == "gpt2" else f"{prefix}ForCausalLM"
    model = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tiny_tokenizer(kind).save_pretrained(folder)
    return folder


def _config(kind: str, n_layers: int, d_model: int) -> Any:
    shape = dict(_SHAPES[kind], vocab_size=VOCABULARY, initializer_range=0.25)
    if kind == "gpt2":
        return transformers.GPT2Config(n_embd=d_model, n_layer=n_layers, n_head=3, n_positions=256, **shape)
    shape |= {"hidden_size": d_model, "num_hidden_layers": n_layers, "intermediate_size": 48, "num_attention_heads": 3}
    shape["max_position_embeddings"] = 256
    if kind == "gpt_neox":
        return transformers.GPTNeoXConfig(**shape)
    shape["num_key_value_heads"] = 1
    if kind == "gemma3":
        shape["layer_types"] = [("full_attention" if i % 2 else "sliding_attention") for i in range(n_layers)]
        return transformers.Gemma3TextConfig(**shape)
    return {"gemma2": transformers.Gemma2Config, "llama": transformers.LlamaConfig}[kind](**shape)


def tiny_tokenizer(kind: str) -> Any:
    """A trained BPE tokenizer in the manner of ``kind``: Gemma's with byte fallback, GPT-2's with one special token."""
    text = [tiny_text(seed) for seed in range(40)]
    if kind in ("gpt2", "gpt_neox"):
        tokenizer = _byte_level(["<|endoftext|>"], text)
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>"
        )
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    tokenizer = _byte_level(special, text) if kind == "llama" else _byte_fallback(special, text)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", 2)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )


def _byte_level(special: list[str], text: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(text, trainer)
    return tokenizer


def _byte_fallback(special: list[str], text: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    reserved = special + [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=reserved, show_progress=False)
    tokenizer.train_from_iterator(text, trainer)
    return tokenizer


def tiny_corpus(folder: Path | str, *, documents: int = 40, words: int = 120, seed: int = 0) -> Path:
    """Write ``documents`` text files of about ``words`` words each (they vary fivefold) into ``folder``
    and return it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(documents):
        text = tiny_text(seed * 100_003 + number, words)
        (folder / f"{number:04d}.txt").write_text(text, encoding="utf-8")
    return folder


_WORDS = {
    "who": "the old king/a small river/my sister/every captain/the quiet town/this report/our house/a distant storm",
    "does": "remembers/carries/follows/builds/questions/leaves/answers/crosses/keeps/measures",
    "what": "the northern road/seven letters/a broken wheel/the harvest/its own history/an empty room/silver and salt",
    "how": "in winter/before dawn/without a word/for many years/near the café/against all advice/once more/",
}
_WHO, _DOES, _WHAT, _HOW = (choices.split("/") for choices in _WORDS.values())


def tiny_text(seed: int, words: int = 120) -> str:
    """One document of pseudo-English with a subject of its own, so that neighbouring tokens share something."""
    draw = random.Random(seed)
    favourite = draw.choice(_WHO)
    goal = words * (0.4 + 1.6 * draw.random())
    sentences: list[str] = []
    while sum(len(sentence.split()) for sentence in sentences) < goal:
        subject = favourite if draw.random() < 0.6 else draw.choice(_WHO)
        sentence = f"{subject} {draw.choice(_DOES)} {draw.choice(_WHAT)} {draw.choice(_HOW)}".strip()
        sentences.append(sentence[0].upper() + sentence[1:] + draw.choice(".?!."))
    return " ".join(sentences) + f"\nNo. {seed}.\n"
