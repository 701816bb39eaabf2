"""The command line: one file a command, and the only place that prints.

Nothing here imports torch before a command needs it, so that `--help` answers at once.
"""

from __future__ import annotations

from cosyq.cli.main import main

__all__ = ["main"]
