"""The commands that look at what is on disk: inspect and verify."""

from __future__ import annotations

COMMANDS = []
