"""cosyq doctor: what is missing here, and how to get it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from cosyq.cli.console import Json, emit, note, print_table

MISSING, NO_HUB = 4, 5


def doctor(
    ask_hub: Annotated[bool, typer.Option("--hub", help="Ask the Hub, too.")] = False,
    as_json: Json = False,
) -> None:
    """Say what cosyq has here and what is missing, with what to do about it."""
    from cosyq.doctor import examine

    checks = list(examine(ask_hub=ask_hub))
    missing = {check.name for check in checks if check.status == "missing"}
    if as_json:
        emit({"ok": not missing, "checks": [asdict(check) for check in checks]})
    else:
        rows = [[check.status, check.name, check.found, check.remedy] for check in checks]
        print_table("doctor", ["", "what", "found", "what to do"], rows)
        note(f"missing: {', '.join(sorted(missing))}" if missing else "nothing is missing")
    if missing:
        raise typer.Exit(NO_HUB if missing == {"hub"} else MISSING)
