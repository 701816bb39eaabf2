"""An evaluation from its two artifacts on: what the reference says, both at work on it, and what was found.

The sequences are spoken once for a reference, its voices and texts, and kept.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

import cosyq
from cosyq.artifact.manifest import STAGE_FILES, TOKENIZER_FILE
from cosyq.artifact.reader import Artifact
from cosyq.errors import ArtifactError, UsageError
from cosyq.eval.evaluation import Compared, Evaluation
from cosyq.eval.metric import Series, judge
from cosyq.eval.spoken import Aloud, speak_both
from cosyq.eval.stages import Arithmetic, compare
from cosyq.files import cache_folder
from cosyq.runtime.request import Requests
from cosyq.runtime.synthesizer import Synthesizer, load
from cosyq.sequences import Heard, Progress, Spoken, read_spoken, shown, speak, write_spoken
from cosyq.voices.voice import Voice


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
    aloud: Aloud | None = None,
) -> Evaluation:
    """Measure `artifact` against `reference`, which has the same dimensions and tokenizer.

    Args:
        texts: what the reference says and both are shown, the voices taking turns; none leaves that out.
        voices: of the artifact; see `sequences.artifact_voices`.
        sequences: the file that the reference's utterances are kept in; None is one in the user's cache.
        aloud: what both say by themselves, too.

    Raises:
        UsageError: the two cannot be compared, or a text cannot be said.
        ArtifactError: one of them is damaged, or the sequences' file is another's or cannot be written.
        DeviceError: the device ran out of memory or of finite numbers.
    """
    _check_pair(artifact, reference)
    if aloud is not None:
        aloud.judges.check(aloud.texts)
    series: list[Series] = []
    about: list[str] = []
    shown_both: tuple[Compared, ...] = ()
    said_both: tuple[Compared, ...] = ()
    if texts:
        heard = listen(
            artifact, reference, texts, voices, seed=seed, arithmetic=arithmetic, file=sequences, progress=progress
        )
        series, shown_both = compare(artifact, reference, heard, arithmetic, progress)
        ids, who = sum(len(item.spoken.tokens) for item in heard), _counted(len(voices), "voice")
        said = f"{_counted(len(heard), 'utterance')} of {ids} speech ids that the reference spoke"
        about.append(f"{said} (seed {seed}, {who})")
    if aloud is not None:
        mine, other = (partial(_synthesizer, side, arithmetic) for side in (artifact, reference))
        found, said_both = speak_both(mine, other, aloud, seed=seed, progress=progress)
        series += found
        who = _counted(len(aloud.voices), "voice")
        about.append(f"{_counted(len(aloud.texts), 'text')} that both spoke (seed {seed}, {who})")
    manifest = artifact.manifest
    return Evaluation(
        artifact=manifest.name,
        against=reference.manifest.name,
        about=_about(" and ".join(about), arithmetic),
        sample_rate=manifest.model.vocoder.sample_rate,
        findings=tuple(judge(item) for item in series),
        modules=tuple((m.name, str(m.format), m.bytes, m.rms_error) for m in manifest.modules),
        exact=shown_both,
        spoken=said_both,
        extra=aloud.judges.names if aloud is not None else {},
        files={name: manifest.files[name].sha256 for name in STAGE_FILES.values()},
    )


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
    steps = artifact.manifest.flow_steps[0]
    requests = Requests(reference)
    requests.manner({"voice": voices[0], "steps": steps, "seed": seed})  # both can, or it is said here
    origin = _origin(reference, texts, voices, seed)
    place = file or cache_folder("sequences") / f"{origin}.json"
    if place.exists():
        spoken = read_spoken(place, origin)
    else:
        prepare_folder(place.parent, "name a file for the sequences, or set XDG_CACHE_HOME")
        spoken = _speak(reference, texts, voices, seed, arithmetic, progress)
        write_spoken(place, origin, spoken)
    return shown(requests, spoken, voices, steps=steps)


def _check_pair(artifact: Artifact, reference: Artifact) -> None:
    mine, other = artifact.manifest, reference.manifest
    if mine.model != other.model or mine.files[TOKENIZER_FILE].sha256 != other.files[TOKENIZER_FILE].sha256:
        raise UsageError(f"{mine.name} and {other.name} are of models with other dimensions or another tokenizer")


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


def prepare_folder(folder: Path, remedy: str) -> None:
    """Before minutes go into what could then not be kept.

    Raises:
        ArtifactError: it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        why = None if os.access(folder, os.W_OK) else "no permission"
    except (OSError, RuntimeError) as error:
        why = str(error)
    if why is not None:
        raise ArtifactError(f"cannot be written ({why})", where=folder, remedy=remedy)


def _about(what: str, arithmetic: Arithmetic) -> str:
    device = arithmetic.device
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return (
        f"{what}; {str(arithmetic.dtype).removeprefix('torch.')} on {place}, "
        f"cosyq {cosyq.__version__}, torch {torch.__version__}, {datetime.date.today().isoformat()}. "
        "Intervals: 95 %, utterances redrawn."
    )


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
