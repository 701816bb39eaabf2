"""From a recording to a voice: speech tokens, speaker vector and mel, once.

onnxruntime and the two ONNX networks of the checkpoint (1 GB for the real model) are needed here and nowhere else.
"""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cosyq.audio.features import MEL_RATE, SPEECH_RATE, flow_mel, kaldi_fbank, whisper_log_mel
from cosyq.audio.recording import Recording
from cosyq.errors import CheckpointError, UsageError
from cosyq.model.config import FlowConfig
from cosyq.voices.voice import MAX_TRANSCRIPT, NAME, Voice

SPEECH_TOKENIZER, SPEAKER_ENCODER = "speech_tokenizer_v3.onnx", "campplus.onnx"
ENCODER_FILES = (SPEECH_TOKENIZER, SPEAKER_ENCODER)
# What people say in a second, in letters and digits of a transcript: outside of it the transcript is of something else.
# Reading aloud is about 14 in English and 5 in Chinese, where one is a syllable: there a character counts as three.
LETTERS_PER_SECOND = (0.5, 30.0)
LETTERS_PER_SYLLABLE = 3


def encoder_files(folder: Path) -> dict[str, Path]:
    """The encoders of a checkpoint, by published name.

    Raises:
        CheckpointError: one is missing.
    """
    return {name: _present(folder / name) for name in ENCODER_FILES}


class SpeakerEncoder:
    """The checkpoint's speaker encoder alone: 28 MB, where the speech tokenizer is a gigabyte.

    Raises:
        CheckpointError: it is missing, or is not what its name says.
    """

    def __init__(self, folder: Path):
        self._session = _session(_present(folder / SPEAKER_ENCODER), inputs=1)

    def __call__(self, samples: Tensor) -> Tensor:
        """samples [n] float32 at 16 kHz -> speaker vector [speaker_dim] float32."""
        vector = _run(self._session, kaldi_fbank(samples)[None].numpy())
        return torch.from_numpy(vector.reshape(-1).astype(np.float32))


class Encoders:
    """The checkpoint's speech tokenizer and `speaker` encoder.

    Raises:
        CheckpointError: they are missing, or are not what their names say.
    """

    def __init__(self, folder: Path):
        files = encoder_files(folder)
        self._tokenizer = _session(files[SPEECH_TOKENIZER], inputs=2)
        self.speaker = SpeakerEncoder(folder)

    def speech_tokens(self, samples: Tensor) -> Tensor:
        """samples [n] float32 at 16 kHz -> ids [about n / 640] int32, 25 a second."""
        mel = whisper_log_mel(samples)
        length = np.array([mel.shape[1]], dtype=np.int32)
        ids = _run(self._tokenizer, mel[None].numpy(), length)
        return torch.from_numpy(ids.reshape(-1).astype(np.int32))


def check_take(name: str, recording: Recording, transcript: str) -> str:
    """What can be seen without the encoders; the transcript comes back with its white space tidied.

    Raises:
        UsageError: the name is no name, or the transcript cannot be of this recording.
    """
    if not NAME.fullmatch(name):
        raise UsageError("a voice's name is letters, digits, dots, dashes and underscores", where=name)
    transcript = " ".join(transcript.split())
    if transcript:
        least, most = (rate * recording.seconds for rate in LETTERS_PER_SECOND)
        if len(transcript) > MAX_TRANSCRIPT or not least <= _letters(transcript) <= most:
            raise UsageError(
                f"{len(transcript)} characters are no transcript of {recording.seconds:.1f} seconds",
                where=name,
                remedy="write what is said in it, no more and no less, or give no transcript",
            )
    return transcript


def enrol(name: str, recording: Recording, transcript: str, encoders: Encoders, config: FlowConfig) -> Voice:
    """Make a voice. Tokens and mel are cut to the same length, `token_mel_ratio` frames a token, as the original does.

    Raises:
        UsageError: see `check_take`.
        ArtifactError: the encoders are of a model of other dimensions.
    """
    transcript = check_take(name, recording, transcript)
    speech = torch.from_numpy(recording.at(SPEECH_RATE))
    mel = flow_mel(torch.from_numpy(recording.at(MEL_RATE)))
    tokens = encoders.speech_tokens(speech)
    count = min(len(tokens), mel.shape[0] // config.token_mel_ratio)
    voice = Voice(
        name=name,
        speaker=encoders.speaker(speech),
        prompt_tokens=tokens[:count].contiguous(),
        prompt_mel=mel[: config.token_mel_ratio * count].contiguous(),
        transcript=transcript,
    )
    voice.check(config, name)
    return voice


def _present(path: Path) -> Path:
    if not path.is_file():
        raise CheckpointError("missing; a voice cannot be made of a recording without it", where=path)
    return path


def _letters(text: str) -> int:
    wide = LETTERS_PER_SYLLABLE
    return sum(wide if unicodedata.east_asian_width(c) == "W" else 1 for c in text if c.isalnum())


def _session(path: Path, inputs: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises types of its own for each way a file can be broken
        first = str(error).splitlines()[0][:160]
        raise CheckpointError(f"not a usable ONNX file ({first})", where=path) from None
    if len(session.get_inputs()) != inputs:
        raise CheckpointError(f"takes {len(session.get_inputs())} inputs, expected {inputs}", where=path)
    return session


def _run(session: Any, *values: np.ndarray) -> np.ndarray:
    feeds = {slot.name: value for slot, value in zip(session.get_inputs(), values, strict=True)}
    return np.asarray(session.run(None, feeds)[0])
