"""An engine: the three networks on a device, behind the calls that synthesis makes.

`reference` runs plain torch on any device and unpacks weights on the fly: slow, and what faster engines are
tested against. `unpacked` is the same with the weights unpacked at load, to the same bits, in the memory that a model
without quantization needs. `bnb` has bitsandbytes' own products, for comparison.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from cosyq.artifact.reader import Artifact, load_stage, text_rows
from cosyq.errors import DeviceError
from cosyq.model.config import ModelConfig
from cosyq.model.flow import Flow, start_noise
from cosyq.model.llm import KVCache, LanguageModel
from cosyq.model.vocoder import StreamState, Vocoder
from cosyq.quantize.linear import Matmul
from cosyq.runtime.decode import Sampler, decode
from cosyq.runtime.interleave import Frame, interleave
from cosyq.runtime.sampling import sample
from cosyq.voices.voice import Voice

EngineName = Literal["reference", "unpacked", "bnb"]
EngineChoice = Literal["auto", "reference", "unpacked", "bnb"]
MATMULS: dict[EngineName, Matmul] = {"reference": "dequantize", "unpacked": "unpacked", "bnb": "bitsandbytes"}
VOCODER_FRAMES = 100  # rendered at a time, so that memory does not grow with the utterance


class Engine(Protocol):
    """What a synthesizer needs of an engine. Everything in and out is on the host."""

    name: str
    config: ModelConfig
    device: torch.device

    def speech_tokens(
        self, text: list[int], prompt: list[int], *, minimum: int, maximum: int, generator: torch.Generator
    ) -> Iterator[int]:
        """Speech ids after text ids and prompt speech ids; returns how it ended ("stop" or "length")."""

    def interleaved_tokens(self, frame: Frame, text: Iterator[int], *, generator: torch.Generator) -> Iterator[int]:
        """Speech ids while `text` arrives; see `interleave`. Returns how it ended."""

    def mel(self, tokens: list[int], voice: Voice, *, streaming: bool, final: bool, steps: int) -> Tensor:
        """Frames of all `tokens` after the voice's prompt, [mel, frames] float32, on the engine's device."""

    def samples(self, mel: Tensor, state: StreamState, *, final: bool) -> Tensor:
        """The next samples of an utterance for its next frames [mel, t]: [n] float32."""


class TorchEngine:
    """The engines `reference`, `unpacked` and `bnb`.

    Raises:
        DeviceError: the device is missing or too small.
    """

    def __init__(self, artifact: Artifact, name: EngineName, device: torch.device, dtype: torch.dtype):
        matmul = MATMULS[name]
        self.name: str = name
        self.device, self.dtype = device, dtype
        self.config = artifact.manifest.model
        self._text_rows: Callable[[list[int]], Tensor] = text_rows(artifact)
        self.llm: LanguageModel = load_stage(artifact, "llm", device=device, dtype=dtype, matmul=matmul)  # type: ignore[assignment]
        self.flow: Flow = load_stage(artifact, "flow", device=device, dtype=dtype, matmul=matmul)  # type: ignore[assignment]
        self.vocoder: Vocoder = load_stage(artifact, "vocoder", device=device, dtype=torch.float32, matmul=matmul)  # type: ignore[assignment]
        self._noise = start_noise(self.config.flow).to(device)

    def prompt_embeddings(self, text: list[int], prompt: list[int]) -> Tensor:
        """[sos] text [task_id] prompt speech, [1, t, hidden] float32 on the device."""
        c = self.config.llm
        speech = self.llm.embed_speech(torch.tensor([c.sos, c.task_id, *prompt], device=self.device))
        return torch.cat([speech[:1], self._embed_text(text), speech[1:]]).unsqueeze(0)

    def _embed_text(self, ids: list[int]) -> Tensor:
        return self._text_rows(ids).to(self.device)

    def _cache(self, capacity: int) -> KVCache:
        return KVCache.empty(self.config.llm, capacity, device=self.device, dtype=self.dtype)

    def _sampler(self, generator: torch.Generator) -> Sampler:
        def sampler(logits: Tensor, history: Sequence[int], may_stop: bool) -> int:
            forbidden = None if may_stop else self.config.llm.speech_vocab
            return sample(logits, history, self.config.sampling, generator, forbid_from=forbidden)

        return sampler

    @torch.inference_mode()
    def speech_tokens(
        self, text: list[int], prompt: list[int], *, minimum: int, maximum: int, generator: torch.Generator
    ) -> Iterator[int]:
        embeddings = self.prompt_embeddings(text, prompt)
        cache = self._cache(embeddings.shape[1] + maximum)
        sampler = self._sampler(generator)
        return (yield from decode(self.llm, embeddings, cache, sampler, minimum=minimum, maximum=maximum))

    def interleaved_tokens(self, frame: Frame, text: Iterator[int], *, generator: torch.Generator) -> Iterator[int]:
        cache = self._cache(frame.capacity)
        return (yield from interleave(self.llm, self._embed_text, frame, text, cache, self._sampler(generator)))

    @torch.inference_mode()
    def mel(self, tokens: list[int], voice: Voice, *, streaming: bool, final: bool, steps: int) -> Tensor:
        ids = torch.cat([voice.prompt_tokens.long(), torch.tensor(tokens, dtype=torch.int64)]).to(self.device)
        mel = self.flow(
            ids,
            voice.speaker.to(self.device),
            voice.prompt_mel.to(self.device),
            self._noise,
            streaming=streaming,
            final=final,
            steps=steps,
        )
        if not torch.isfinite(mel).all():
            raise DeviceError("the flow's mel is not finite", remedy="use bf16 or fp32 arithmetic")
        return mel

    @torch.inference_mode()
    def samples(self, mel: Tensor, state: StreamState, *, final: bool) -> Tensor:
        parts = list(mel.unsqueeze(0).split(VOCODER_FRAMES, dim=-1))
        rendered = [
            self.vocoder.render(part, state, final=final and index == len(parts) - 1)
            for index, part in enumerate(parts)
        ]
        wav = torch.cat(rendered, dim=-1)[0].cpu()
        if not torch.isfinite(wav).all():
            raise DeviceError("the vocoder's samples are not finite", remedy="use fp32 for the vocoder")
        return wav


def pick_device(name: str) -> torch.device:
    """auto, cpu, cuda or cuda:N.

    Raises:
        DeviceError: it is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DeviceError("no such kind of device", where=name, remedy="use auto, cuda or cpu") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            reason = "this torch was built without CUDA" if not torch.backends.cuda.is_built() else "no GPU was found"
            raise DeviceError(f"CUDA is not available: {reason}", where=name, remedy="use --device cpu")
        if (device.index or 0) >= torch.cuda.device_count():
            raise DeviceError(f"there are {torch.cuda.device_count()} GPUs", where=name)
    elif device.type != "cpu":
        raise DeviceError("not supported", where=name, remedy="use auto, cuda or cpu")
    return device


def pick_engine(name: EngineChoice, device: torch.device) -> EngineName:
    """auto is `unpacked` on a CPU, where unpacking at every step takes most of the time, and `reference` elsewhere."""
    if name == "auto":
        return "unpacked" if device.type == "cpu" else "reference"
    return name


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """auto, bf16, fp16 or fp32; auto is bf16 on a GPU, and fp32 on a CPU, where 16 bits are slower."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]
