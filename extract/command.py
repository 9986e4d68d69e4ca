"""The commands of stage one."""

from __future__ import annotations

COMMANDS = []
