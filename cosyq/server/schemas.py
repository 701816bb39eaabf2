"""What clients send and what they get, in OpenAI's terms."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from cosyq.server.encoders import Format
from cosyq.server.failures import refused

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


class Manner(BaseModel):
    """How to say something: OpenAI's fields, then ours. Unknown ones are ignored; null is as good as nothing."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    model: Name
    voice: Name | VoiceId
    instructions: Annotated[str, Field(max_length=4096)] = ""
    response_format: Format = "mp3"
    speed: Annotated[float, Field(ge=0.25, le=4.0)] = 1.0
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    language: Annotated[str, Field(pattern=r"^[A-Za-z]{2,3}(-[A-Za-z0-9]{2,8})*$")] | None = None
    normalize: bool = True
    timestamps: bool = False

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        return {key: value for key, value in data.items() if value is not None} if isinstance(data, dict) else data

    @property
    def voice_name(self) -> str:
        return self.voice if isinstance(self.voice, str) else self.voice.id


class SpeechBody(Manner):
    """POST /v1/audio/speech."""

    input: Annotated[str, Field(min_length=1)]
    stream_format: Literal["audio", "sse"] = "audio"


class Create(Manner):
    """The first message of a conversation, in which text comes and audio goes."""

    type: Literal["speech.create"]
    response_format: Format = "pcm"


class Append(BaseModel):
    """More of the text."""

    type: Literal["input_text.append"]
    text: str


class Done(BaseModel):
    """No more text comes."""

    type: Literal["input_text.done"]


Kind = TypeAdapter  # of a message
START: Kind[Create] = TypeAdapter(Create)
MORE: Kind[Append | Done] = TypeAdapter(Annotated[Append | Done, Field(discriminator="type")])
M = TypeVar("M")


def read_message(kind: Kind[M], text: str) -> M:
    """A message of a conversation.

    Raises:
        RefusedError: it is none of this kind.
    """
    try:
        return kind.validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise refused(400, f"{place or 'message'}: {first['msg']}", param=place or None, code=first["type"]) from None


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every answer that is no success."""

    error: ErrorDetail
