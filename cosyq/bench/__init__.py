"""How fast an artifact speaks on a machine, part by part, beside what the machine could do at best."""

from typing import Literal

Part = Literal["llm", "flow", "vocoder", "speech", "streams", "serve", "cold"]
PARTS: tuple[Part, ...] = ("llm", "flow", "vocoder", "speech", "streams", "serve", "cold")
