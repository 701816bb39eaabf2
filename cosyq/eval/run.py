"""An evaluation from its two artifacts on: what the reference says, both at work on it, and what was found.

The sequences are spoken once for a reference, its voices and texts, and kept.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

import cosyq
from cosyq.artifact.manifest import STAGE_FILES, TOKENIZER_FILE
from cosyq.artifact.reader import Artifact
from cosyq.errors import ArtifactError, UsageError
from cosyq.eval.evaluation import Compared, Evaluation
from cosyq.eval.metric import Series, judge
from cosyq.eval.stages import Arithmetic, compare
from cosyq.runtime.request import Requests, find_voice, voice_names
from cosyq.runtime.synthesizer import Synthesizer, load
from cosyq.sequences import Heard, Progress, Spoken, read_spoken, shown, speak, write_spoken
from cosyq.voices.voice import Voice

# Both sides speaking with ids of their own: the artifact, the reference -> series, utterances.
SpokenHalf = Callable[[Synthesizer, Synthesizer], tuple[list[Series], tuple[Compared, ...]]]


def evaluate(
    artifact: Artifact,
    reference: Artifact,
    texts: Sequence[str],
    voices: Sequence[Voice],
    *,
    seed: int,
    arithmetic: Arithmetic,
    progress: Progress,
    sequences: Path | None = None,
    spoken: SpokenHalf | None = None,
) -> Evaluation:
    """Measure `artifact` against `reference`, which has the same dimensions and tokenizer.

    Args:
        texts: what is said, the voices taking turns.
        voices: of the artifact; see `artifact_voices`.
        sequences: the file that the reference's utterances are kept in; None is one in the user's cache.
        spoken: adds what both say with ids of their own.

    Raises:
        UsageError: the two cannot be compared, or a text cannot be said.
        ArtifactError: one of them is damaged, or the sequences' file is another's or cannot be written.
        DeviceError: the device ran out of memory or of finite numbers.
    """
    heard = listen(
        artifact, reference, texts, voices, seed=seed, arithmetic=arithmetic, file=sequences, progress=progress
    )
    series, exact = compare(artifact, reference, heard, arithmetic, progress)
    more: tuple[Compared, ...] = ()
    if spoken is not None:
        further, more = spoken(*(_synthesizer(side, arithmetic) for side in (artifact, reference)))
        series = [*series, *further]
    manifest = artifact.manifest
    return Evaluation(
        artifact=manifest.name,
        against=reference.manifest.name,
        about=_about(heard, voices, seed, arithmetic),
        sample_rate=manifest.model.vocoder.sample_rate,
        findings=tuple(judge(item) for item in series),
        modules=tuple((m.name, str(m.format), m.bytes, m.rms_error) for m in manifest.modules),
        exact=exact,
        spoken=more,
        files={name: manifest.files[name].sha256 for name in STAGE_FILES.values()},
    )


def artifact_voices(artifact: Artifact, most: int) -> list[Voice]:
    """The artifact's first `most` voices, by the names of their files, which no two share."""
    return [replace(find_voice(artifact, name), name=name) for name in voice_names(artifact)[:most]]


def listen(
    artifact: Artifact,
    reference: Artifact,
    texts: Sequence[str],
    voices: Sequence[Voice],
    *,
    seed: int,
    arithmetic: Arithmetic,
    progress: Progress,
    file: Path | None = None,
) -> list[Heard]:
    """The utterances that both are shown: spoken by the reference, or read from where they were kept.

    Raises: as `evaluate`.
    """
    mine, other = artifact.manifest, reference.manifest
    if mine.model != other.model or mine.files[TOKENIZER_FILE].sha256 != other.files[TOKENIZER_FILE].sha256:
        raise UsageError(f"{mine.name} and {other.name} are of models with other dimensions or another tokenizer")
    requests = Requests(reference)
    requests.manner({"voice": voices[0], "steps": mine.flow_steps[0], "seed": seed})  # both can, or it is said here
    origin = _origin(reference, texts, voices, seed)
    place = file or _cache_folder() / f"{origin}.json"
    if place.exists():
        spoken = read_spoken(place, origin)
    else:
        _prepare(place.parent)
        spoken = _speak(reference, texts, voices, seed, arithmetic, progress)
        write_spoken(place, origin, spoken)
    return shown(requests, spoken, voices, steps=mine.flow_steps[0])


def _speak(
    reference: Artifact,
    texts: Sequence[str],
    voices: Sequence[Voice],
    seed: int,
    arithmetic: Arithmetic,
    progress: Progress,
) -> list[Spoken]:
    progress("speaking", 0, len(texts))
    return speak(_synthesizer(reference, arithmetic), texts, voices, seed=seed, progress=progress)


def _synthesizer(artifact: Artifact, arithmetic: Arithmetic) -> Synthesizer:
    """As it speaks on that device; what it says is then measured as `arithmetic` has it."""
    return load(artifact, device=str(arithmetic.device))


def _origin(reference: Artifact, texts: Sequence[str], voices: Sequence[Voice], seed: int) -> str:
    """sha256 of all that decides what is said, but for the machine."""
    made_of = {
        "reference": reference.manifest.digest,
        "texts": list(texts),
        "voices": [hashlib.sha256(voice.to_bytes()).hexdigest() for voice in voices],
        "seed": seed,
    }
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()


def _cache_folder() -> Path:
    """Where the XDG Base Directory Specification has a program keep what it can make again."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(named) if os.path.isabs(named) else Path("~/.cache").expanduser()
    return base / "cosyq" / "sequences"


def _prepare(folder: Path) -> None:
    """Before minutes go into what could then not be kept."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except (OSError, RuntimeError) as error:
        raise _unwritable(folder, str(error)) from None
    if not writable:
        raise _unwritable(folder, "no permission")


def _unwritable(folder: Path, why: str) -> ArtifactError:
    return ArtifactError(
        f"cannot be written ({why})", where=folder, remedy="name a file for the sequences, or set XDG_CACHE_HOME"
    )


def _about(heard: Sequence[Heard], voices: Sequence[Voice], seed: int, arithmetic: Arithmetic) -> str:
    ids, device = sum(len(item.spoken.tokens) for item in heard), arithmetic.device
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return (
        f"{_counted(len(heard), 'utterance')} of {ids} speech ids that the reference spoke (seed {seed}, "
        f"{_counted(len(voices), 'voice')}); {str(arithmetic.dtype).removeprefix('torch.')} on {place}, "
        f"cosyq {cosyq.__version__}, torch {torch.__version__}, {datetime.date.today().isoformat()}. "
        "Intervals: 95 %, utterances redrawn."
    )


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
