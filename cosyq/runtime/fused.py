"""The engine `fused`: our own kernels on a CUDA GPU, over the packed weights as they are stored."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from cosyq.artifact.reader import Artifact
from cosyq.kernels.start import begin_products, hash_compiler
from cosyq.model.flow import nothing
from cosyq.runtime.batch import follow_alone
from cosyq.runtime.decode import Part
from cosyq.runtime.engine import Chunk, TorchEngine, finite
from cosyq.runtime.flow_past import Past, Pasts, numbers, whole_blocks
from cosyq.runtime.fused_flow import FusedFlow, Utterance
from cosyq.runtime.fused_llm import BURST, FusedDecoder, FusedForward, FusedLM
from cosyq.runtime.fused_vocoder import FusedVocoder
from cosyq.runtime.schedule import Growth

ALONE = 2048  # positions that the decoder of a single utterance is made for, unless one needs more
# cuBLAS takes 32 MiB for every stream on Hopper; a quarter of it does for products of this size.
WORKSPACE = ":4096:2:16:8"


class FusedEngine(TorchEngine):
    """Weights are read once, by the reference's own reader; what the kernels do not need of it goes again.

    Raises:
        DeviceError: the device is missing or too small.
    """

    flow_frames = 1024  # more fill the GPU each by itself
    growth = Growth(4, 16)

    def __init__(self, artifact: Artifact, device: torch.device, dtype: torch.dtype):
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", WORKSPACE)  # read with the first product
        os.environ.setdefault("TRITON_STORE_BINARY_ONLY", "1")  # it would read all that led to a kernel, too
        hash_compiler()
        products = begin_products(device, dtype)
        super().__init__(artifact, "fused", device, dtype)
        self._lm = FusedLM(self.llm, dtype)
        self._solver = FusedFlow(self.flow)
        self.vocoder = FusedVocoder(self.vocoder)  # type: ignore[assignment]
        self._alone: FusedDecoder | None = None
        self._pasts = Pasts()
        products.join()

    def prepare(self, room: int) -> None:
        self._pasts.room = room - self._solver.unpack(room // 2)
        self._solver.prepare(self.flow_frames)

    def speech_tokens(
        self, parts: Iterable[Part], *, positions: int, room: int, generator: torch.Generator
    ) -> Iterator[int]:
        alone = self._alone
        if alone is None or not alone.free or not alone.fits(positions, room):
            alone = self._alone = self.decoder(1, positions=max(positions, ALONE - room), room=max(room, ALONE))
        return (yield from follow_alone(alone, self.embed, parts, room=room, generator=generator))

    def decoder(self, rows: int, *, positions: int, room: int) -> FusedDecoder:
        forward = FusedForward(self._lm, rows=rows, capacity=positions + room)
        return FusedDecoder(forward, self.config.sampling, longest=room, burst=BURST)

    @torch.inference_mode()
    def mels(self, chunks: Sequence[Chunk], *, between: Callable[[], None] = nothing) -> list[Tensor]:
        utterances = [
            Utterance(
                c.ids.to(self.device),
                c.voice.speaker.to(self.device),
                c.voice.prompt_mel.to(self.device),
                c.streaming,
                c.final,
                self._past(c),
            )
            for c in chunks
        ]
        mels = self._solver.solve(utterances, self._noise, steps=chunks[0].steps, between=between)
        return [finite(mel) for mel in mels]

    def frames(self, chunk: Chunk) -> int:
        past = self._pasts.find(_key(chunk)) if chunk.streaming else None
        return super().frames(chunk) - (past.frames if past is not None else 0)

    def _past(self, chunk: Chunk) -> Past | None:
        """What is kept of the voice's prompt; from its second chunk on, if there is room for it."""
        c, voice = self.config.flow, chunk.voice
        frames = whole_blocks(c, len(voice.prompt_mel))
        if not (chunk.streaming and frames and self._pasts.room):
            return None
        size = chunk.steps * numbers(c, frames) * self.dtype.itemsize

        def make() -> Past:
            ids = voice.prompt_tokens[: frames // c.token_mel_ratio + c.lookahead].long().to(self.device)
            mel, speaker = voice.prompt_mel[:frames].to(self.device), voice.speaker.to(self.device)
            return self._solver.keep(ids, speaker, mel, self._noise, steps=chunk.steps)

        return self._pasts.get(_key(chunk), size, make)


def _key(chunk: Chunk) -> Hashable:
    return chunk.voice.digest, chunk.steps
