"""The commands of stage two."""

from __future__ import annotations

COMMANDS = []
