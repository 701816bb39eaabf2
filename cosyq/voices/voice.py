"""A voice: a speaker vector, and the prompt recording as tokens, mel and transcript where there was one.

Kept as one flat safetensors file with its metadata in the header, a few hundred kB.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from cosyq.errors import ArtifactError
from cosyq.model.config import FlowConfig

SCHEMA = 1
METADATA_KEY = "cosyq_voice"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
MAX_BYTES = 16 << 20
MAX_PROMPT_TOKENS = 30 * 25  # the speech tokenizer hears thirty seconds at most
MAX_TRANSCRIPT = 4096
DTYPES = {"speaker": torch.float32, "prompt_tokens": torch.int32, "prompt_mel": torch.float32}


@dataclass(frozen=True)
class Voice:
    """Everything on the host.

    name: how it is asked for.
    speaker: speaker vector, [speaker_dim] float32; only its direction counts.
    prompt_tokens: speech ids of the prompt recording, [n] int32, possibly none.
    prompt_mel: its log-mel, [token_mel_ratio * n, mel] float32.
    transcript: what is said in it; without one the language model is not shown the prompt.
    """

    name: str
    speaker: Tensor
    prompt_tokens: Tensor
    prompt_mel: Tensor
    transcript: str = ""

    @classmethod
    def from_speaker(cls, name: str, speaker: Tensor, mel_dim: int = 80) -> Voice:
        """A voice that is a speaker vector and nothing more."""
        return cls(name, speaker.float(), torch.empty(0, dtype=torch.int32), torch.empty(0, mel_dim))

    @cached_property
    def digest(self) -> bytes:
        """Of what a flow is told; equal for equal voices of any name."""
        told = blake2b(digest_size=16)
        for tensor in (self.speaker, self.prompt_tokens, self.prompt_mel):
            told.update(tensor.contiguous().numpy().tobytes())
        return told.digest()

    def ending(self, tokens: int) -> Voice:
        """The same voice with the last `tokens` of its prompt, for a flow; its transcript says more than they do."""
        left_out = self.prompt_tokens.numel() - tokens
        if left_out <= 0:
            return self
        ratio = self.prompt_mel.shape[0] // self.prompt_tokens.numel()
        return replace(
            self, prompt_tokens=self.prompt_tokens[left_out:], prompt_mel=self.prompt_mel[ratio * left_out :]
        )

    def check(self, config: FlowConfig, where: str | Path) -> None:
        """Raises ArtifactError when the voice does not fit a model of these dimensions."""
        n = self.prompt_tokens.numel()
        expected = {
            "speaker": (config.speaker_dim,),
            "prompt_tokens": (n,),
            "prompt_mel": (n * config.token_mel_ratio, config.mel_dim),
        }
        for field, shape in expected.items():
            tensor = getattr(self, field)
            if tuple(tensor.shape) != shape or tensor.dtype != DTYPES[field]:
                raise ArtifactError(
                    f"{field} is {tensor.dtype} {list(tensor.shape)}, expected {DTYPES[field]} {list(shape)}",
                    where=where,
                    remedy="it was made for another model; make it again from its recording",
                )
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise ArtifactError(f"{field} is not finite", where=where)
        if n > MAX_PROMPT_TOKENS or len(self.transcript) > MAX_TRANSCRIPT:
            raise ArtifactError(f"a prompt of {n} tokens or its transcript is too long", where=where)
        if n and not 0 <= int(self.prompt_tokens.min()) <= int(self.prompt_tokens.max()) < config.vocab:
            raise ArtifactError(f"prompt_tokens are outside 0..{config.vocab - 1}", where=where)

    def to_bytes(self) -> bytes:
        """The safetensors file; equal voices give equal bytes."""
        tensors = {field: getattr(self, field).contiguous() for field in DTYPES}
        about = {"schema": SCHEMA, "name": self.name, "transcript": self.transcript}
        # One key only: the library does not promise an order among several.
        return save(tensors, {METADATA_KEY: json.dumps(about, ensure_ascii=False, sort_keys=True)})


def load_voice(path: Path, config: FlowConfig) -> Voice:
    """Read and check a voice file.

    Raises:
        ArtifactError: it is missing, damaged, or made for another model.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ArtifactError("too large for a voice", where=path)
        with safe_open(path, framework="pt") as handle:
            about = _metadata(handle.metadata() or {}, path)
            if set(handle.keys()) != set(DTYPES):
                raise ArtifactError(f"expected the tensors {', '.join(DTYPES)}", where=path)
            fields = {field: handle.get_tensor(field).clone() for field in DTYPES}
    except FileNotFoundError:
        raise ArtifactError("no such voice file", where=path) from None
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"not a readable voice ({error})", where=path) from None
    voice = Voice(name=about["name"], transcript=about["transcript"], **fields)
    voice.check(config, path)
    return voice


def _metadata(header: dict[str, str], path: Path) -> dict[str, str]:
    try:
        about = json.loads(header[METADATA_KEY])
        if about["schema"] == SCHEMA and NAME.fullmatch(about["name"]) and isinstance(about["transcript"], str):
            return about
    except (KeyError, TypeError, ValueError):
        pass
    raise ArtifactError(f"not a voice of schema {SCHEMA}", where=path)
