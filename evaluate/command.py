"""The commands of stage three."""

from __future__ import annotations

COMMANDS = []
