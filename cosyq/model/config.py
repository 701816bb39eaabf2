"""The dimensions of the three networks, as values.

They are read from a checkpoint's files at build time and from an artifact's manifest at run time;
nothing else in the code knows a size of Fun-CosyVoice3.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LLMConfig:
    """Qwen2 backbone with a speech vocabulary: text ids in, speech ids out at 25 Hz."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    rms_norm_eps: float
    text_rows: int  # rows of the text embedding, a few more than the tokenizer has entries
    speech_vocab: int  # FSQ codes; every id from here up ends the speech
    speech_rows: int  # FSQ codes and the special ids above them
    silent_tokens: tuple[int, ...]  # pauses and breaths among the codes; runs of them are shortened

    @property
    def sos(self) -> int:
        return self.speech_vocab

    @property
    def task_id(self) -> int:
        return self.speech_vocab + 2


@dataclass(frozen=True)
class SamplingConfig:
    """Repetition-aware sampling (VALL-E 2, arXiv 2406.05370) as the checkpoint asks for it."""

    top_p: float
    top_k: int
    win_size: int
    tau_r: float


@dataclass(frozen=True)
class FlowConfig:
    """Speech tokens at 25 Hz to log-mel frames at 50 Hz: a DiT solved by Euler steps."""

    vocab: int
    token_dim: int
    mel_dim: int
    speaker_dim: int
    token_mel_ratio: int
    lookahead: int  # tokens that the encoder must see ahead
    lookahead_channels: int
    dim: int
    depth: int
    heads: int
    head_dim: int
    ff_dim: int
    conv_kernel: int
    conv_groups: int
    chunk_frames: int  # block of the block-causal attention mask
    guidance: float
    noise_frames: int = 15000  # the original draws (80, 15000) normals once, from seed 0
    noise_seed: int = 0

    @property
    def modulation_width(self) -> int:
        """Numbers that one timestep contributes: six vectors a block, two for the last norm."""
        return (6 * self.depth + 2) * self.dim


@dataclass(frozen=True)
class VocoderConfig:
    """Causal HiFT: log-mel frames to 24 kHz samples."""

    mel_dim: int
    base_channels: int
    harmonics: int  # overtones above the fundamental
    sample_rate: int
    sine_amp: float
    noise_std: float
    voiced_threshold: float
    upsample_rates: tuple[int, ...]
    upsample_kernels: tuple[int, ...]
    n_fft: int
    hop: int
    resblock_kernels: tuple[int, ...]
    resblock_dilations: tuple[tuple[int, ...], ...]
    source_kernels: tuple[int, ...]
    source_dilations: tuple[tuple[int, ...], ...]
    lrelu_slope: float
    audio_limit: float
    lookahead: int  # frames that the first convolution sees ahead
    f0_channels: int
    f0_kernels: tuple[int, ...]

    @property
    def stft_per_frame(self) -> int:
        """STFT frames of the source per mel frame."""
        product = 1
        for rate in self.upsample_rates:
            product *= rate
        return product

    @property
    def samples_per_frame(self) -> int:
        return self.stft_per_frame * self.hop


@dataclass(frozen=True)
class ModelConfig:
    llm: LLMConfig
    sampling: SamplingConfig
    flow: FlowConfig
    vocoder: VocoderConfig

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Any) -> ModelConfig:
        """Strict inverse of `to_dict`.

        Raises:
            ValueError: a key is missing, unknown or of the wrong type, or a size is not positive.
        """
        return _decode(cls, data, "model")


MAX_DIMENSION = 1 << 24  # no size in a real model comes near; a forged one must not allocate


def _decode(kind: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ValueError(f"{where}: expected a mapping, found {type(value).__name__}")
        hints = typing.get_type_hints(kind)
        unknown, missing = sorted(value.keys() - hints.keys()), sorted(hints.keys() - value.keys())
        if unknown or missing:
            raise ValueError(f"{where}: unknown keys {unknown}, missing keys {missing}")
        return typing.cast(Any, kind)(**{k: _decode(hints[k], value[k], f"{where}.{k}") for k in hints})
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{where}: expected a list, found {type(value).__name__}")
        inner = typing.get_args(kind)[0]
        return tuple(_decode(inner, item, f"{where}[{i}]") for i, item in enumerate(value))
    if isinstance(kind, types.GenericAlias) or kind not in (int, float):
        raise TypeError(f"{where}: no decoder for {kind}")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or (kind is int and not isinstance(value, int)):
        raise ValueError(f"{where}: expected {kind.__name__}, found {value!r}")
    if not -1 <= value <= MAX_DIMENSION or (kind is int and value < 0):
        raise ValueError(f"{where}: {value!r} is out of range")
    return kind(value)
