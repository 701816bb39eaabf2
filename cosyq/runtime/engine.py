"""An engine: the three networks on a device, behind the calls that synthesis makes.

`fused` has kernels of our own for CUDA GPUs and is in `runtime.fused`; `fused8` is the same, but rounds inputs of the
flow's products with int8 weights to eight bits where that is faster. `cpu` multiplies by rows of int8 as they are
stored and is in `runtime.cpu`. `reference` runs plain torch on any device and unpacks weights on the fly: slow, and
what faster engines are tested against. `unpacked` is the same with the weights unpacked at load, to the same bits, in
the memory that a model without quantization needs. `bnb` has bitsandbytes' own products, for comparison.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Literal, Protocol

import torch
from torch import Tensor

from cosyq.artifact.reader import Artifact, load_stage, text_rows
from cosyq.errors import DeviceError
from cosyq.model.config import ModelConfig
from cosyq.model.flow import Flow, nothing, start_noise
from cosyq.model.llm import KVCache, LanguageModel
from cosyq.model.vocoder import StreamState, Vocoder
from cosyq.quantize.linear import Matmul, multiplies_bfloat16, weight_bytes
from cosyq.runtime.batch import BatchDecoder
from cosyq.runtime.decode import Part, Sampler, follow
from cosyq.runtime.flow_past import FlowState
from cosyq.runtime.forward import TorchForward
from cosyq.runtime.sampling import draws, sample
from cosyq.runtime.schedule import Growth
from cosyq.runtime.sound import Sound, not_finite_mel
from cosyq.runtime.transfer import sent
from cosyq.voices.voice import Voice

EngineName = Literal["fused", "fused8", "cpu", "reference", "unpacked", "bnb"]
EngineChoice = Literal["auto", "fused", "fused8", "cpu", "reference", "unpacked", "bnb"]
# How the language model multiplies, and the other stages. The fused ones begin as the reference and take it apart.
MATMULS: dict[EngineName, tuple[Matmul, Matmul]] = {
    "fused": ("dequantize", "dequantize"),
    "fused8": ("dequantize", "dequantize"),
    "cpu": ("native", "unpacked"),
    "reference": ("dequantize", "dequantize"),
    "unpacked": ("unpacked", "unpacked"),
    "bnb": ("bitsandbytes", "bitsandbytes"),
}
VOCODER_FRAMES = 100  # rendered at a time, so that memory does not grow with the utterance


@dataclass(frozen=True)
class Chunk:
    """All of an utterance's speech ids so far, to be rendered after the prompt of a voice.

    sent: the utterance's frames that are not asked for any more.
    state: what an engine keeps of them, the same for all chunks of an utterance.
    """

    tokens: list[int]
    voice: Voice
    streaming: bool
    final: bool
    steps: int
    sent: int = 0
    state: FlowState = field(default_factory=FlowState)

    @property
    def ids(self) -> Tensor:
        """The prompt's ids and the utterance's, [n] int64 on the host."""
        return torch.tensor([*self.voice.prompt_tokens.tolist(), *self.tokens], dtype=torch.int64)


class Engine(Protocol):
    """What a synthesizer needs of an engine. Everything in and out is on the host.

    weights: bytes of each stage, on the device.
    flow_frames: so many frames of several utterances are worth rendering together; 0 is none.
    growth: of a stream's chunks.
    """

    name: str
    config: ModelConfig
    device: torch.device
    weights: dict[str, int]
    flow_frames: int
    growth: Growth

    def embed(self, text: Sequence[int], speech: Sequence[int]) -> Tensor:
        """Text ids, then speech ids, for the language model: [n, hidden] float32, on the engine's device."""

    def speech_tokens(
        self, parts: Iterable[Part], *, positions: int, room: int, generator: torch.Generator
    ) -> Iterator[int]:
        """Speech ids of an utterance; returns how it ended ("stop" or "length").

        Asks for a part only when the next id needs it. All that is shown has at most `positions` ids, and at most
        `room` are drawn.
        """

    def decoder(self, rows: int, *, positions: int, room: int) -> BatchDecoder:
        """For as many utterances at once, each within these bounds; the same ids as `speech_tokens` gives."""

    def mel(
        self,
        tokens: list[int],
        voice: Voice,
        *,
        streaming: bool,
        final: bool,
        steps: int,
    ) -> Tensor:
        """Frames of all `tokens` after the voice's prompt, [mel, frames] float32, on the engine's device."""

    def mels(self, chunks: Sequence[Chunk], *, between: Callable[[], None] = nothing) -> list[Tensor]:
        """`mel` of several utterances, of the same number of steps, side by side: of each what was not sent.

        `between` is called between the steps of the work, as far as it is waited for, and may end it by an exception.
        A GPU need not be waited for: what is wrong with a mel may show in what `sound` makes of it.
        """

    def frames(self, chunk: Chunk) -> int:
        """How many the flow computes for a chunk: its own, and of those before it what is not kept."""

    def prepare(self, room: int) -> None:
        """Get ready to speak to many, in at most `room` bytes: weights of the flow that are unpacked, what it needs of
        utterances and of the prompts of voices that come again, and what is made once for each length of a chunk."""

    def sound(self, mel: Tensor, state: StreamState, *, final: bool, between: Callable[[], None] = nothing) -> Sound:
        """The next samples of an utterance for its next frames [mel, t], on their way to the host."""

    def samples(self, mel: Tensor, state: StreamState, *, final: bool) -> Tensor:
        """The same, waited for: [n] float32 on the host."""


class TorchEngine:
    """The engines `reference`, `unpacked` and `bnb`, and what the others begin as.

    Raises:
        DeviceError: the device is missing or too small.
    """

    flow_frames = 0
    growth = Growth(2, 4)

    def __init__(self, artifact: Artifact, name: EngineName, device: torch.device, dtype: torch.dtype):
        stepping, matmul = MATMULS[name]
        self.name: str = name
        self.device, self.dtype = device, dtype
        self.config = artifact.manifest.model
        self._text_rows: Callable[[list[int]], Tensor] = text_rows(artifact)
        self.llm: LanguageModel = load_stage(artifact, "llm", device=device, dtype=dtype, matmul=stepping)  # type: ignore[assignment]
        self.flow: Flow = load_stage(artifact, "flow", device=device, dtype=dtype, matmul=matmul)  # type: ignore[assignment]
        self.vocoder: Vocoder = load_stage(artifact, "vocoder", device=device, dtype=torch.float32, matmul=matmul)  # type: ignore[assignment]
        stages = {"llm": self.llm, "flow": self.flow, "vocoder": self.vocoder}
        self.weights = {name: weight_bytes(network) for name, network in stages.items()}
        self._noise = start_noise(self.config.flow).to(device)

    @torch.inference_mode()
    def embed(self, text: Sequence[int], speech: Sequence[int]) -> Tensor:
        ids = torch.tensor(speech, dtype=torch.int64)
        return torch.cat(
            [sent(self._text_rows(list(text)), self.device), self.llm.embed_speech(sent(ids, self.device))]
        )

    def _cache(self, capacity: int) -> KVCache:
        return KVCache.empty(self.config.llm, capacity, device=self.device, dtype=self.dtype)

    def _sampler(self, room: int, generator: torch.Generator) -> Sampler:
        uniform = draws(room, generator)

        def sampler(logits: Tensor, history: Sequence[int], may_stop: bool) -> int:
            forbidden = None if may_stop else self.config.llm.speech_vocab
            return sample(logits, history, self.config.sampling, uniform[len(history)], forbid_from=forbidden)

        return sampler

    def speech_tokens(
        self, parts: Iterable[Part], *, positions: int, room: int, generator: torch.Generator
    ) -> Iterator[int]:
        cache, sampler = self._cache(positions + room), self._sampler(room, generator)
        return (yield from follow(self.llm, self.embed, parts, cache, sampler))

    def decoder(self, rows: int, *, positions: int, room: int) -> BatchDecoder:
        forward = TorchForward(self.llm, rows=rows, capacity=positions + room)
        return BatchDecoder(forward, self.config.sampling, longest=room)

    def mel(
        self,
        tokens: list[int],
        voice: Voice,
        *,
        streaming: bool,
        final: bool,
        steps: int,
    ) -> Tensor:
        return finite(self.mels([Chunk(tokens, voice, streaming, final, steps)])[0])

    def mels(self, chunks: Sequence[Chunk], *, between: Callable[[], None] = nothing) -> list[Tensor]:
        return [solve(self.flow, chunk, self._noise, between=between)[:, chunk.sent :] for chunk in chunks]

    def frames(self, chunk: Chunk) -> int:
        return self.config.flow.token_mel_ratio * (chunk.voice.prompt_tokens.numel() + len(chunk.tokens))

    def prepare(self, room: int) -> None:
        """There is nothing to make ready."""

    def sound(self, mel: Tensor, state: StreamState, *, final: bool, between: Callable[[], None] = nothing) -> Sound:
        return render(self.vocoder, mel, state, final=final, between=between)

    def samples(self, mel: Tensor, state: StreamState, *, final: bool) -> Tensor:
        return self.sound(mel, state, final=final).samples()


@torch.inference_mode()
def solve(flow: Flow, chunk: Chunk, noise: Tensor, *, between: Callable[[], None] = nothing) -> Tensor:
    """The mel of a chunk, [mel, frames] float32, where the flow and the noise are; see `Engine.mel`.

    Raises:
        DeviceError: it is not finite.
    """
    return finite(
        flow(
            chunk.ids.to(noise.device),
            chunk.voice.speaker.to(noise.device),
            chunk.voice.prompt_mel.to(noise.device),
            noise,
            streaming=chunk.streaming,
            final=chunk.final,
            steps=chunk.steps,
            between=between,
        )
    )


@torch.inference_mode()
def render(
    vocoder: Vocoder, mel: Tensor, state: StreamState, *, final: bool, between: Callable[[], None] = nothing
) -> Sound:
    """The next samples of an utterance for its next frames; see `Engine.sound`."""
    parts = list(mel.unsqueeze(0).split(VOCODER_FRAMES, dim=-1))
    rendered = []
    for index, part in enumerate(parts):
        between()
        rendered.append(vocoder.render(part, state, final=final and index == len(parts) - 1))
    return Sound(torch.cat(rendered, dim=-1)[0], mel)


def finite(mel: Tensor) -> Tensor:
    """The mel, if it is.

    Raises:
        DeviceError: it is not.
    """
    if not torch.isfinite(mel).all():
        raise not_finite_mel()
    return mel


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
    """auto is `cpu` on a CPU, and on a GPU `fused` where it runs, `reference` elsewhere.

    Raises:
        DeviceError: the engine does not run there.
    """
    if name == "auto":
        return "cpu" if device.type == "cpu" else "reference" if _obstacle(device) else "fused"
    if name == "cpu" and device.type != "cpu":
        raise DeviceError("the engine cpu runs on a CPU", where=str(device), remedy="use --engine auto")
    if name in ("fused", "fused8") and (obstacle := _obstacle(device)):
        raise DeviceError(f"the engine {name} needs {obstacle}", where=str(device), remedy="use --engine auto")
    return name


def _obstacle(device: torch.device) -> str | None:
    """What `fused` lacks there."""
    if device.type != "cuda" or torch.version.hip is not None:
        return "a CUDA GPU"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "a GPU of compute capability 8.0 or more, for products in bfloat16"
    return None if find_spec("triton") else "the package triton, which torch's CUDA wheels bring"


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """auto, bf16, fp16 or fp32; auto is bf16 on a GPU and on a CPU with units for it, and fp32 on others, where 16 bits
    are slower."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" or multiplies_bfloat16() else torch.float32
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]
