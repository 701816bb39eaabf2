"""From what a client asks for to what a speaker is asked: checked, and refused with the field that will not do."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

from cosyq.errors import CosyqError
from cosyq.server.failures import RefusedError, failure_of, refused
from cosyq.server.schemas import MODEL_ALIASES, Manner
from cosyq.server.service import Service
from cosyq.server.speaker import FASTEST, SLOWEST, SpeechRequest
from cosyq.text.prompt import END_OF_PROMPT, speakable

NORMALIZED = ("en", "zh")  # languages whose numbers are read


def speech_request(body: Manner, text: str | Iterator[str], service: Service) -> tuple[SpeechRequest, float]:
    """What is asked of the speaker, and how its audio is stretched behind it.

    Raises:
        RefusedError: a field cannot be used.
        UnavailableError: there is no speaker yet.
    """
    name = service.speaker.about()["artifact"]
    if body.model not in (name, *MODEL_ALIASES):
        known = ", ".join((name, *MODEL_ALIASES))
        raise refused(
            404, f"there is no model {body.model!r}; there are: {known}", param="model", code="model_not_found"
        )
    if isinstance(text, str):
        check_length(len(text), service)
    voice = service.find_voice(body.voice_name)
    if voice is None:
        known = ", ".join(service.speaker.voices())
        message = f"there is no voice {body.voice_name!r}; there are: {known}"
        raise refused(400, message, param="voice", code="voice_not_found")
    if isinstance(text, str):
        _check_speakable(text, "input")
    if body.instructions:
        _check_speakable(body.instructions, "instructions")
        if END_OF_PROMPT in body.instructions or (isinstance(text, str) and END_OF_PROMPT in text):
            message = f"{END_OF_PROMPT} is placed for you: leave it out"
            raise refused(400, message, param="instructions", code="invalid_value")
    # A language whose numbers nobody here can read is better spoken as it stands than read as English.
    known_language = body.language is None or body.language.partition("-")[0].lower() in NORMALIZED
    speed = min(max(body.speed, SLOWEST), FASTEST)
    wanted = SpeechRequest(
        text=text,
        voice=voice,
        seed=secrets.randbelow(1 << 31) if body.seed is None else body.seed,
        speed=speed,
        instruct=body.instructions or None,
        normalize=body.normalize and known_language,
    )
    return wanted, body.speed / speed


def check_length(characters: int, service: Service) -> None:
    """Raises RefusedError if a text has more characters than are allowed."""
    if characters > (most := service.settings.max_characters):
        message = f"{characters} characters are more than {most}"
        raise refused(400, message, param="input", code="string_above_max_length")


def _check_speakable(text: str, field: str) -> None:
    try:
        speakable(text)
    except CosyqError as error:
        raise RefusedError(failure_of(error, param=field)) from None
