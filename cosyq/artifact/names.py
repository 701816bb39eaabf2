"""Names in an artifact, for those who come before torch."""

from __future__ import annotations

STAGE_FILES = {"llm": "llm.safetensors", "flow": "flow.safetensors", "vocoder": "vocoder.safetensors"}
HOST_TENSOR = {"llm": "text_embedding.weight"}  # its rows are looked up on the host
