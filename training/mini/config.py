"""What cosyq-mini is: the sizes of its networks, its speakers, and where the stages leave their files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cosyq.model.config import FlowConfig, LLMConfig, ModelConfig, SamplingConfig, VocoderConfig

SAMPLE_RATE = 24_000
MEL_HOP = 480  # 50 frames a second
SAMPLES_PER_TOKEN = 960  # 25 tokens a second
MEL_BINS = 80
SPEECH_CODES = 6561  # 8 dimensions of 3 levels
SPEAKER_DIM = 192
TIME_WIDTH = 256
BPE_ENTRIES = 768  # before the special tokens

# Speakers are the teacher's one voice played faster or slower, its tempo put right beforehand:
# (name, playback factor, share of the data). The factor moves pitch and formants together.
SPEAKERS = (
    ("clara", 1.0, 0.40),
    ("magnus", 0.78, 0.22),
    ("nora", 0.89, 0.14),
    ("iris", 1.12, 0.12),
    ("pip", 1.25, 0.12),
)

MINI = ModelConfig(
    llm=LLMConfig(
        hidden_size=256,
        intermediate_size=512,
        num_layers=6,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        rope_theta=1e6,
        rms_norm_eps=1e-6,
        text_rows=1088,
        speech_vocab=SPEECH_CODES,
        speech_rows=SPEECH_CODES + 200,
        silent_tokens=(),  # this tokenizer has no codes of its own for silence
    ),
    # The repetition guard is looser than the published one: these codes repeat through every pause. The nucleus is
    # smaller: on sentences kept from training, 15 % of the words are wrong at the published 0.8, 12 % at 0.5.
    sampling=SamplingConfig(top_p=0.5, top_k=25, win_size=10, tau_r=1.0),
    flow=FlowConfig(
        vocab=SPEECH_CODES,
        token_dim=MEL_BINS,
        mel_dim=MEL_BINS,
        speaker_dim=SPEAKER_DIM,
        token_mel_ratio=2,
        lookahead=3,
        lookahead_channels=192,
        dim=192,
        depth=7,
        heads=3,
        head_dim=64,
        ff_dim=384,
        conv_kernel=31,
        conv_groups=16,
        chunk_frames=50,
        guidance=0.7,
    ),
    vocoder=VocoderConfig(
        mel_dim=MEL_BINS,
        base_channels=128,
        harmonics=8,
        sample_rate=SAMPLE_RATE,
        sine_amp=0.1,
        noise_std=0.003,
        voiced_threshold=10.0,
        upsample_rates=(8, 5, 3),
        upsample_kernels=(16, 11, 7),
        n_fft=16,
        hop=4,
        resblock_kernels=(3, 7, 11),
        resblock_dilations=((1, 3, 5), (1, 3, 5), (1, 3, 5)),
        source_kernels=(7, 7, 11),
        source_dilations=((1, 3, 5), (1, 3, 5), (1, 3, 5)),
        lrelu_slope=0.1,
        audio_limit=0.99,
        lookahead=4,
        f0_channels=128,
        f0_kernels=(4, 3, 3, 3, 3),
    ),
)


@dataclass(frozen=True)
class Folders:
    """work: data, made anew on every machine. checkpoints: what is carried from slice to slice."""

    work: Path
    checkpoints: Path

    @property
    def waves(self) -> Path:
        return self.work / "waves.i16"

    @property
    def index(self) -> Path:
        return self.work / "index.npz"

    @property
    def mels(self) -> Path:
        return self.work / "mels.f16"

    @property
    def encoded(self) -> Path:
        return self.work / "encoded.npz"

    @property
    def text_tokenizer(self) -> Path:
        """Trained with the first data and kept: the language model knows its ids."""
        return self.checkpoints / "CosyVoice-BlankEN"

    def checkpoint(self, stage: str) -> Path:
        return self.checkpoints / f"{stage}.safetensors"
