"""``python -m tcsae``: the command line where its script is not on the path."""

from __future__ import annotations

from .pipeline import command

command()
