"""A sentence is one line of printable text, whatever it quotes."""

import pytest
from tcsae import errors
from tcsae.errors import TcsaeError, printable

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, TcsaeError)]


@pytest.mark.parametrize(
    ("quoted", "said"),
    [
        ("a\nb\x1b[2J", r"a\x0ab\x1b[2J"),  # would clear the terminal
        ("blocks.3.hook\x7fresid_post", r"blocks.3.hook\x7fresid_post"),
        ("\ud800", r"\xd800"),  # half a letter, which no file takes
        ("\u202egnp.exe", r"\x202egnp.exe"),  # would turn what follows around
        ("Größe λ2 → 0,03", "Größe λ2 → 0,03"),
    ],
)
def test_what_cannot_be_printed_is_written_out(quoted, said):
    assert printable(quoted) == said
    for kind in KINDS:
        assert str(kind(f"reads '{quoted}': mend it")) == f"reads '{said}': mend it"
