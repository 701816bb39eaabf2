"""What an artifact can be asked for: text, a voice and options in; ids and bounds out, before any network runs."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TypedDict

import torch

from cosyq.artifact.reader import Artifact
from cosyq.errors import UsageError
from cosyq.model.config import FlowConfig
from cosyq.runtime.decode import Part
from cosyq.runtime.interleave import Frame, interleaved, whole
from cosyq.runtime.speed import FASTEST, SLOWEST
from cosyq.text import arriving
from cosyq.text.prompt import compose, compose_prompt
from cosyq.voices.voice import Voice, load_voice

MIN_SPEECH_PER_TEXT, MAX_SPEECH_PER_TEXT = 2, 20  # speech tokens per text token, the original's bounds
MAX_SEED = 2**63 - 1
PARAGRAPH_PAUSE = 0.4  # seconds
VOICES_KEPT = 64  # in memory, a tenth of a megabyte each
NEUTRAL = "neutral"  # the voice of an artifact without voices: no speaker vector, the flow's average


@dataclass(frozen=True)
class Manner:
    """How a request is to be spoken: its options, checked."""

    voice: Voice
    transcript: str
    instruction: str
    normalized: bool
    steps: int
    speed: float
    seed: int

    def generator(self, utterance: int) -> torch.Generator:
        """The source of randomness of the request's utterance of that number."""
        return torch.Generator().manual_seed((self.seed + utterance) % (MAX_SEED + 1))


@dataclass(frozen=True)
class Utterance:
    """One utterance of a text that is there.

    words: text ids of what is said, without what stands before it.
    pause: samples of silence after it.
    """

    said: str
    part: Part
    words: int
    pause: int


class Options(TypedDict, total=False):
    """How to speak.

    voice: a name, a path to a voice file, or a value; see `find_voice`.
    seed: fixes the audio; None draws one, which the result names.
    steps: Euler steps of the flow, one of those the artifact was built for.
    speed: 0.5 to 2.
    instruct: how to say it ("speak slowly"); the voice's transcript is then left out.
    cross_lingual: leave the transcript out, for a voice that speaks another language than the text.
    normalize: read numbers, symbols and abbreviations (`text.normalize`), the default; False says the text as it is.
    """

    voice: str | Voice | None
    seed: int | None
    steps: int | None
    speed: float
    instruct: str | None
    cross_lingual: bool
    normalize: bool


def voice_names(artifact: Artifact) -> list[str]:
    return list(artifact.voice_files()) or [NEUTRAL]


def find_voice(artifact: Artifact, name: str | None = None) -> Voice:
    """A voice of the artifact by name, or from a .safetensors file by path; None is `default` or the first one.

    Raises:
        UsageError: there is no such voice.
        ArtifactError: its file is damaged or does not fit.
    """
    config, files = artifact.manifest.model.flow, artifact.voice_files()
    if name is None:
        name = "default" if "default" in files else next(iter(files), NEUTRAL)
    if name in files:
        return _read(files[name], config)
    if name == NEUTRAL:
        return Voice.from_speaker(NEUTRAL, torch.zeros(config.speaker_dim), config.mel_dim)
    if name.endswith(".safetensors"):
        return _read(Path(name), config)
    raise UsageError("unknown voice", where=name, remedy=f"the artifact has: {', '.join(voice_names(artifact))}")


def _read(path: Path, config: FlowConfig) -> Voice:
    """A file's voice, as it is now; what a server's requests have in common is read once."""
    try:
        about = path.stat()
    except OSError:
        return load_voice(path, config)  # which says what is wrong
    return _read_once(path, config, (about.st_ino, about.st_mtime_ns, about.st_size))


@lru_cache(VOICES_KEPT)
def _read_once(path: Path, config: FlowConfig, _: tuple[int, int, int]) -> Voice:
    return load_voice(path, config)


class Requests:
    """Of one artifact."""

    def __init__(self, artifact: Artifact):
        self.artifact, self._model, self._tokenizer = artifact, artifact.manifest.model, artifact.tokenizer()
        self.pause = round(PARAGRAPH_PAUSE * self._model.vocoder.sample_rate)  # samples

    def manner(self, options: Options) -> Manner:
        """Options, checked.

        Raises:
            UsageError: one is not usable.
            ArtifactError: the voice is damaged, or of another model.
        """
        if unknown := options.keys() - Options.__annotations__.keys():
            raise TypeError(f"unknown options: {', '.join(sorted(unknown))}")
        steps, voice = self._steps(options.get("steps")), self._voice(options.get("voice"))
        seed, speed = options.get("seed"), options.get("speed", 1.0)
        if seed is None:
            seed = secrets.randbelow(1 << 31)
        if not 0 <= seed <= MAX_SEED:
            raise UsageError("a seed is a number from 0 to 2^63 - 1", where=str(seed))
        if not SLOWEST <= speed <= FASTEST:
            raise UsageError(f"a speed is a number from {SLOWEST} to {FASTEST}", where=str(speed))
        transcript = "" if options.get("cross_lingual") else voice.transcript
        instruction, normalized = options.get("instruct") or "", options.get("normalize", True)
        return Manner(voice, transcript, instruction, normalized, steps, speed, seed)

    def utterances(self, text: str, manner: Manner) -> list[Utterance]:
        """Of a text that is there; each speaks with the generator of its number.

        Raises:
            UsageError: the text is empty, too long, or brings a marker.
        """
        prompted = compose(
            text,
            manner.transcript,
            self._tokenizer,
            instruction=manner.instruction,
            normalized=manner.normalized,
            one_sentence=self.artifact.manifest.one_sentence,
        )
        room, c = self.room(manner.voice), self._model.llm
        return [
            Utterance(
                said=item.text,
                part=whole(
                    item.prompt + item.words,
                    manner.voice.prompt_tokens.tolist() if item.with_speech else [],
                    minimum=min(MIN_SPEECH_PER_TEXT * len(item.words), room),
                    maximum=min(MAX_SPEECH_PER_TEXT * len(item.words), room),
                    sos=c.sos,
                    task_id=c.task_id,
                ),
                words=len(item.words),
                pause=self.pause if item.ends_paragraph and item is not prompted[-1] else 0,
            )
            for item in prompted
        ]

    def arriving(self, pieces: Iterable[str], manner: Manner) -> Iterator[arriving.Utterance]:
        """The utterances of a text that is still being written; each is to be read to its end before the next.

        Raises:
            UsageError: as soon as the text turns out not to be usable.
        """
        return arriving.utterances(pieces, self._tokenizer.encode, normalized=manner.normalized)

    def frame(self, manner: Manner) -> Frame:
        """What the utterances of a text that is still being written go on from."""
        head, transcript = compose_prompt(manner.transcript, self._tokenizer, instruction=manner.instruction)
        longest, room = arriving.LONGEST_ARRIVING, self.room(manner.voice)
        frame = Frame(
            head=head,
            transcript=transcript,
            prompt=manner.voice.prompt_tokens.tolist() if transcript else [],
            longest=longest,
            least=MIN_SPEECH_PER_TEXT,
            most=MAX_SPEECH_PER_TEXT,
            room=min(room, MAX_SPEECH_PER_TEXT * longest),
        )
        if not frame.fits():  # the rest of the transcript would be spoken
            frame = replace(frame, transcript=[], prompt=[])
        return frame

    def parts(self, frame: Frame, text: Iterator[int]) -> Iterator[Part]:
        """What the language model is shown of one of those utterances."""
        c = self._model.llm
        return interleaved(frame, text, sos=c.sos, task_id=c.task_id)

    def _steps(self, steps: int | None) -> int:
        tables = self.artifact.manifest.flow_steps
        if steps is None:
            return tables[0]
        if steps not in tables:
            remedy = f"it has: {', '.join(map(str, tables))}"
            raise UsageError("the artifact has no table for so many flow steps", where=str(steps), remedy=remedy)
        return steps

    def _voice(self, voice: str | Voice | None) -> Voice:
        chosen = voice if isinstance(voice, Voice) else find_voice(self.artifact, voice)
        chosen.check(self._model.flow, chosen.name)
        return chosen

    def room(self, voice: Voice) -> int:
        """Speech tokens that fit beside a voice's prompt under the flow's fixed noise."""
        flow = self._model.flow
        return flow.noise_frames // flow.token_mel_ratio - voice.prompt_tokens.numel()
