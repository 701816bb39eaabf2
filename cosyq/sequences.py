"""Utterances that a full-precision model spoke, made once: what quantization is measured and calibrated on.

They need no data from outside, and a model judged on what it says itself is judged where it will be used.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cosyq.artifact.reader import Artifact
from cosyq.errors import ArtifactError, UsageError
from cosyq.files import whole_file
from cosyq.runtime.decode import Part, Silence
from cosyq.runtime.request import Manner, Requests, find_voice, voice_names
from cosyq.runtime.synthesizer import Synthesizer
from cosyq.text.prompt import placed_for_you
from cosyq.text.tokenizer import END_OF_PROMPT
from cosyq.voices.voice import Voice

MAX_BYTES = 64 << 20
Progress = Callable[[str, int, int], None]  # what is being done, done, in all


@dataclass(frozen=True)
class Spoken:
    """One utterance: what was said, by whom (the name of a voice), with which seed, and the speech ids drawn.

    finish: "stop", or "length" where it ran to its bound and has no true end.
    """

    text: str
    voice: str
    seed: int
    tokens: tuple[int, ...]
    finish: str


@dataclass(frozen=True)
class Heard:
    """An utterance with all that the networks are shown of it.

    audible: the ids that the flow is shown, in which long silences are shortened.
    """

    spoken: Spoken
    manner: Manner
    part: Part
    audible: tuple[int, ...]

    @property
    def voice(self) -> Voice:
        return self.manner.voice


def artifact_voices(artifact: Artifact, most: int | None = None) -> list[Voice]:
    """The artifact's first `most` voices, or all, by the names of their files, which no two share."""
    return [replace(find_voice(artifact, name), name=name) for name in voice_names(artifact)[:most]]


def speak(
    reference: Synthesizer, texts: Sequence[str], voices: Sequence[Voice], *, seed: int, progress: Progress
) -> list[Spoken]:
    """Draw the speech ids of `texts`, the voices taking turns; a text of several utterances gives several.

    Raises:
        UsageError: a text is empty, too long or brings a marker.
    """
    found: list[Spoken] = []
    for index, text in enumerate(texts):
        progress("speaking", index, len(texts))
        if END_OF_PROMPT in text:
            raise placed_for_you("text")
        voice = voices[index % len(voices)]
        manner = reference.requests.manner({"voice": voice, "seed": seed + index})
        for number, utterance in enumerate(reference.requests.utterances(text, manner)):
            part = utterance.part
            drawn = reference.engine.speech_tokens(
                [part], positions=part.positions, room=part.maximum, generator=manner.generator(number)
            )
            tokens, finish = _drain(drawn)
            found.append(Spoken(utterance.said, voice.name, seed + index, tokens, finish))
    return found


def _drain(drawn: Any) -> tuple[tuple[int, ...], str]:
    tokens: list[int] = []
    while True:
        try:
            tokens.append(next(drawn))
        except StopIteration as end:
            return tuple(tokens), end.value


def shown(
    requests: Requests, spoken: Iterable[Spoken], voices: Sequence[Voice], *, steps: int | None = None
) -> list[Heard]:
    """What the networks are shown of each utterance, for an artifact with the same tokenizer and dimensions.

    Args:
        steps: Euler steps of the flow; None is the artifact's own choice.

    Raises:
        UsageError: a voice is not among `voices`, a text is not one utterance there, or there is no table for `steps`.
        ArtifactError: the ids are none that the artifact could have spoken.
    """
    by_name = {voice.name: voice for voice in voices}
    config = requests.artifact.manifest.model.llm
    heard = []
    for item in spoken:
        if item.voice not in by_name:
            raise UsageError("the artifact lacks a voice that the reference spoke with", where=item.voice)
        manner = requests.manner({"voice": by_name[item.voice], "seed": item.seed, "steps": steps, "normalize": False})
        utterances = requests.utterances(item.text, manner)  # numbers and symbols are words in it already
        if len(utterances) != 1:
            raise UsageError("one utterance of the reference is several here", where=f"{item.text:.40}")
        part = utterances[0].part
        least = part.minimum if item.finish == "stop" else 1
        if not least <= len(item.tokens) <= part.maximum or max(item.tokens) >= config.speech_vocab:
            raise ArtifactError("not ids that this model could have spoken", where=f"{item.text:.40}")
        audible = tuple(filter(Silence(config.silent_tokens).lets_through, item.tokens))
        heard.append(Heard(item, manner, part, audible))
    return heard


def write_spoken(path: Path, origin: str, spoken: Sequence[Spoken]) -> None:
    """Keep utterances, with a word on what spoke them, which `read_spoken` asks for again."""
    body = {"origin": origin, "spoken": [asdict(item) for item in spoken]}
    with whole_file(path) as partial:
        partial.write_text(json.dumps(body, ensure_ascii=False) + "\n", "utf-8")


def read_spoken(path: Path, origin: str) -> list[Spoken]:
    """The utterances that were kept.

    Raises:
        ArtifactError: the file is missing, damaged, or of another origin.
    """
    remedy = "remove it, and they are spoken again"
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES} bytes")
        data = json.loads(path.read_text("utf-8"))
        if data["origin"] != origin:
            raise ArtifactError("holds what another model or another list of texts said", where=path, remedy=remedy)
        return [_spoken(item) for item in data["spoken"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(f"not kept utterances ({error})", where=path, remedy=remedy) from None


def _spoken(item: dict[str, Any]) -> Spoken:
    text, voice, seed, tokens, finish = (item[key] for key in ("text", "voice", "seed", "tokens", "finish"))
    sound = isinstance(text, str) and isinstance(voice, str) and type(seed) is int and finish in ("stop", "length")
    if not sound or not all(type(token) is int and 0 <= token < 1 << 20 for token in tokens):
        raise ValueError(f"not an utterance: {item!r:.80}")
    return Spoken(text, voice, seed, tuple(tokens), finish)
