"""What clients send and what they get, in OpenAI's terms."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from cosyq.server.encoders import Format

MODEL_ALIASES = ("tts-1", "tts-1-hd", "gpt-4o-mini-tts")
VOICE_ALIASES = (
    "alloy", "ash", "ballad", "cedar", "coral", "echo", "fable", "marin", "nova", "onyx", "sage", "shimmer", "verse",
)  # fmt: skip
MAX_SEED = 2**63 - 1
VOICE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")  # of `voices.voice`, which needs torch

Name = Annotated[str, Field(min_length=1, max_length=128)]


class VoiceId(BaseModel):
    """OpenAI's other way to name a voice."""

    id: Name


class SpeechBody(BaseModel):
    """POST /v1/audio/speech: OpenAI's fields, then ours. Unknown ones are ignored; null is as good as nothing."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    model: Name
    input: Annotated[str, Field(min_length=1)]
    voice: Name | VoiceId
    instructions: Annotated[str, Field(max_length=4096)] = ""
    response_format: Format = "mp3"
    speed: Annotated[float, Field(ge=0.25, le=4.0)] = 1.0
    stream_format: Literal["audio", "sse"] = "audio"
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    language: Annotated[str, Field(pattern=r"^[A-Za-z]{2,3}(-[A-Za-z0-9]{2,8})*$")] | None = None
    normalize: bool = True

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        return {key: value for key, value in data.items() if value is not None} if isinstance(data, dict) else data

    @property
    def voice_name(self) -> str:
        return self.voice if isinstance(self.voice, str) else self.voice.id


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every answer that is no success."""

    error: ErrorDetail
