"""A document tokenised in pieces has the tokens of the whole, whatever the tokenizer, or a sentence says that it cannot
be cut.
"""

from __future__ import annotations

import contextlib
import random
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tcsae.errors import TextError
from tcsae.extract.text.documents import LargeText
from tcsae.extract.text.large_documents import in_pieces
from tiny import tiny_text
from tiny_tokenizers import KINDS, tokenizer_of

SMALL = {"piece": 400, "overlap": 50, "agree": 8}


def options(tokenizer):
    return partial(tokenizer, add_special_tokens=False, split_special_tokens=True, verbose=False)


def whole(tokenizer, text):
    return options(tokenizer)(text)["input_ids"]


def pieced(tokenizer, text, read=97, **sizes):
    """Tokens in pieces; the text arrives in parts of ``read`` characters."""

    def encode(piece):
        encoded = options(tokenizer)(piece, return_offsets_mapping=True)
        return encoded["input_ids"], encoded["offset_mapping"]

    large = LargeText("the text", lambda: (text[at : at + read] for at in range(0, len(text), read)))
    return np.concatenate(list(in_pieces(large, encode, **(SMALL | sizes)))).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_ordinary_text_has_the_tokens_of_the_whole(kind):
    tokenizer = tokenizer_of(kind)
    text = "\n\n".join(tiny_text(seed, 150) for seed in range(30))
    assert len(text) > 60 * SMALL["piece"]
    assert pieced(tokenizer, text) == whole(tokenizer, text)


PARTS = [
    *("The old king ", "remembers", "the ", "aaaa", "a", "ab", "1", " 1234567", "(x)", ".", ", ", "’"),
    *("\n", "\n\n\n", "\r\n", "  ", "\t", " ", "<|endoftext|>", "<bos>"),
    *("café", "e\u0301", "\u0301", "北京大学", "😀", "👩\u200d👩\u200d👧", "İ", "ß"),
]
STRETCHES = st.lists(st.tuples(st.sampled_from(PARTS), st.integers(1, 60)), min_size=3, max_size=14)


@pytest.mark.parametrize("kind", KINDS)
@given(stretches=STRETCHES, seed=st.integers(0, 1000), read=st.integers(1, 500))
@settings(max_examples=60)
def test_any_text_has_the_tokens_of_the_whole_or_a_sentence(kind, stretches, seed, read):
    """Stretches of repeated parts are the hard case: pieces could agree on them by chance, at the wrong place."""
    draw = random.Random(seed)
    words = [part * times for part, times in stretches]
    words += [tiny_text(draw.randrange(1000), 30) for _ in range(4)]
    draw.shuffle(words)
    text = "".join(words)
    tokenizer = tokenizer_of(kind)
    with contextlib.suppress(TextError):
        assert pieced(tokenizer, text, read) == whole(tokenizer, text)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("unit", ["a", "ab", "1", "12 ", " ", "\n", "é", "北京", "aaa ", "the "])
@pytest.mark.parametrize("length", [1999, 2000, 2001, 2002])
def test_a_text_that_only_repeats_is_never_told_wrong(kind, unit, length):
    tokenizer = tokenizer_of(kind)
    text = (unit * length)[:length]
    with contextlib.suppress(TextError):
        assert pieced(tokenizer, text, agree=4) == whole(tokenizer, text)


def test_digits_grouped_from_a_right_end_that_no_piece_has_seen_are_refused():
    """Both pieces would agree, and both be wrong: 400 and 350 are both one more than a multiple of three."""
    text = "Pi is 3." + "1415926535" * 500 + " and so on. " + tiny_text(1)
    with pytest.raises(TextError, match="they may all be digits"):
        pieced(tokenizer_of("digits from the right"), text)


def test_a_seam_needs_the_whole_run_of_agreement():
    tokenizer = tokenizer_of("gpt2")
    text = "\n\n".join(tiny_text(seed, 150) for seed in range(5))
    with pytest.raises(TextError, match="break them into lines, or split the file into several"):
        pieced(tokenizer, text, agree=400)
