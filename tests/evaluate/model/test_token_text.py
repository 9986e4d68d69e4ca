"""The class of a token, told from its text."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from tcsae.evaluate.model.token_text import TOKEN_CLASSES, token_class, token_classes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" the", "word start"),
        (" Ünder", "word start"),
        ("ing", "word part"),
        ("42", "number"),
        (" 7", "number"),
        (",", "punctuation"),
        (" —", "punctuation"),
        ("\n", "line break"),
        ("\n\n  ", "line break"),
        ("   ", "white space"),
        ("", "white space"),
        ("x86", "mixed"),
        ("'s", "mixed"),
    ],
)
def test_the_class_of_a_token(text, expected):
    assert TOKEN_CLASSES[token_class(text)] == expected


def test_classes_of_a_text_use_the_tokenizers_knowledge_of_spaces():
    pieces = ["▁word", "part", "<0x0A>", "."]
    decoded = ["word", "part", "\n", "."]
    tokenizer = SimpleNamespace(
        convert_ids_to_tokens=lambda token: pieces[token], decode=lambda ids, **_: decoded[ids[0]]
    )
    found = token_classes(tokenizer, np.array([[0, 1, 2], [3, 0, 0]]))
    names = [[TOKEN_CLASSES[one] for one in row] for row in found.tolist()]
    assert names == [["word start", "word part", "line break"], ["punctuation", "word start", "word start"]]
