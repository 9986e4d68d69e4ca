"""Tokens as readers see them, and the class of a token: what kind of text it is, told from its characters alone."""

from __future__ import annotations

from typing import Any

import numpy as np

TOKEN_CLASSES = ("word start", "word part", "number", "punctuation", "line break", "white space", "mixed")
"""Letters behind a space; letters without one (the rest of a word, or a word behind a line break or a bracket);
digits; marks and symbols; white space with a line break in it; other white space; everything else."""


def token_text(tokenizer: Any, token: int) -> str:
    """A token as readers see it, its leading space kept."""
    piece = tokenizer.convert_ids_to_tokens(int(token))
    text = tokenizer.decode([int(token)], clean_up_tokenization_spaces=False)
    # Some tokenizers drop the space that begins a sequence; the piece itself knows of it.
    return " " + text if isinstance(piece, str) and piece[:1] in "▁Ġ" and not text.startswith(" ") else text


def token_class(text: str) -> int:
    """Index into :data:`TOKEN_CLASSES` of a token with this text."""
    inside = text.strip()
    if not inside:
        return TOKEN_CLASSES.index("line break" if "\n" in text else "white space")
    if inside.isalpha():
        return TOKEN_CLASSES.index("word start" if text[0] == " " else "word part")
    if inside.isdigit():
        return TOKEN_CLASSES.index("number")
    return TOKEN_CLASSES.index("mixed" if any(letter.isalnum() for letter in inside) else "punctuation")


def token_classes(tokenizer: Any, tokens: np.ndarray) -> np.ndarray:
    """The class of every token: int64, of the same shape."""
    different, at = np.unique(tokens, return_inverse=True)
    classes = np.array([token_class(token_text(tokenizer, token)) for token in different.tolist()], dtype=np.int64)
    return classes[at].reshape(tokens.shape)
