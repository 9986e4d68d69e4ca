"""Small tokenizers of every kind that language models have, trained on the spot."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import transformers
from tiny import tiny_text, tiny_tokenizer
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

TEXT = [tiny_text(seed) for seed in range(40)] + [
    "1789 1,234,567 café naïve 北京大学 \n\n\t\tdef f(x):\n    return x\n"
] * 5


def _trained(model: Any, trainer: Any, normalizer: Any = None, split: Any = None) -> Tokenizer:
    tokenizer = Tokenizer(model)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if split is not None:
        tokenizer.pre_tokenizer = split
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def _byte_bpe(split: Any) -> Tokenizer:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    return _trained(models.BPE(), trainer, split=split)


def _regex_bpe(pattern: str) -> Tokenizer:
    """As Llama 3, Qwen 2 and others: a regular expression, then bytes."""
    return _byte_bpe(
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    )


def _unsplit_bpe() -> Tokenizer:
    """As Gemma and Llama 2: the whole text is one word."""
    reserved = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=reserved, show_progress=False)
    model = models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = _trained(model, trainer, split=pre_tokenizers.Metaspace())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([])
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.add_tokens([AddedToken("\n" * n, normalized=False) for n in (2, 3, 4)])  # as Gemma has them
    return tokenizer


def _unigram(*, split: bool) -> Tokenizer:
    """As T5, ALBERT and XLNet; ``split=False``: the whole text is one word."""
    normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    trainer = trainers.UnigramTrainer(vocab_size=400, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False)
    tokenizer = _trained(models.Unigram(), trainer, normalizer, pre_tokenizers.Metaspace())
    if not split:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return tokenizer


def _wordpiece() -> Tokenizer:
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=["[UNK]"], show_progress=False)
    model = models.WordPiece(unk_token="[UNK]", max_input_chars_per_word=10)  # less than pieces share, as in real ones
    return _trained(model, trainer, normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer())


_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_FROM_THE_RIGHT = r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
MAKERS = {
    "gpt2": lambda: _byte_bpe(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "smollm2": lambda: _byte_bpe(
        pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    ),
    "llama3": lambda: _regex_bpe(_LLAMA_3),
    "digits from the right": lambda: _regex_bpe(_FROM_THE_RIGHT),
    "unsplit bpe": _unsplit_bpe,
    "unigram": lambda: _unigram(split=True),
    "unsplit unigram": lambda: _unigram(split=False),
    "wordpiece": _wordpiece,
}
TINY = ("gemma2", "llama")
KINDS = (*MAKERS, *TINY)


@lru_cache
def tokenizer_of(kind: str) -> Any:
    """A tokenizer of one of ``KINDS``, as transformers has it."""
    if kind in TINY:
        return tiny_tokenizer(kind)
    tokenizer = MAKERS[kind]()
    if kind == "unigram":
        tokenizer.decoder = decoders.Metaspace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
