"""The engines `fused` and `fused8`: our own kernels on a CUDA GPU, over the packed weights as they are stored."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from cosyq.artifact.reader import Artifact
from cosyq.kernels.start import begin_kernels
from cosyq.model.flow import nothing
from cosyq.model.vocoder import StreamState
from cosyq.runtime.batch import follow_alone
from cosyq.runtime.decode import Part
from cosyq.runtime.engine import Chunk, EngineName, TorchEngine
from cosyq.runtime.flow_past import Pasts, Segment, numbers, total, whole_blocks
from cosyq.runtime.flow_room import SEGMENTS
from cosyq.runtime.fused_flow import FusedFlow, Utterance
from cosyq.runtime.fused_llm import BURST, FusedDecoder, FusedForward, FusedLM
from cosyq.runtime.fused_vocoder import FusedVocoder
from cosyq.runtime.schedule import Growth
from cosyq.runtime.sound import Sound

ALONE = 2048  # positions that the decoder of a single utterance is made for, unless one needs more


class FusedEngine(TorchEngine):
    """Weights are read once, by the reference's own reader; what the kernels do not need of it goes again.

    Raises:
        DeviceError: the device is missing or too small.
    """

    flow_frames = 1024  # more fill the GPU each by itself
    growth = Growth(4, 16)

    def __init__(self, artifact: Artifact, name: EngineName, device: torch.device, dtype: torch.dtype):
        begun = begin_kernels(device, dtype)
        super().__init__(artifact, name, device, dtype)
        self._lm = FusedLM(self.llm, dtype)
        self._solver = FusedFlow(self.flow, coded=name == "fused8")
        begun.join()
        self.vocoder = FusedVocoder(self.vocoder)  # type: ignore[assignment]
        self._alone: FusedDecoder | None = None
        self._pasts = Pasts()

    def prepare(self, room: int) -> None:
        self._pasts.room = room - self._solver.unpack(room // 4)
        self._solver.prepare(self.flow_frames, self._noise)

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
        """Launched and not waited for, so there is nothing between its steps."""
        utterances = [self._utterance(chunk) for chunk in chunks]
        mels = self._solver.solve(utterances, self._noise, steps=chunks[0].steps)
        for chunk, u in zip(chunks, utterances, strict=True):
            if u.into is not None:
                chunk.state.segments = (*u.past, u.into)
        return mels

    def _utterance(self, chunk: Chunk) -> Utterance:
        c, voice = self.config.flow, chunk.voice
        prompt = self._prompt(chunk) if chunk.streaming else None  # asked for each time, so that it stays
        past = chunk.state.segments or ((prompt,) if prompt is not None else ())
        end = c.token_mel_ratio * (len(voice.prompt_tokens) + len(chunk.tokens) - c.lookahead)
        frames, whole = end - total(past), chunk.streaming and not chunk.final and end % c.chunk_frames == 0
        into = None
        if whole and frames >= c.conv_kernel and len(past) < SEGMENTS:
            into = self._pasts.segment(self._size(frames, chunk), lambda: self._solver.segment(frames, chunk.steps))
        return Utterance(
            chunk.ids, voice.speaker, voice.prompt_mel, chunk.streaming, chunk.final, past, into, chunk.sent
        )

    @torch.inference_mode()
    def sound(self, mel: Tensor, state: StreamState, *, final: bool, between: Callable[[], None] = nothing) -> Sound:
        return Sound(self.vocoder.render(mel[None], state, final=final)[0], mel)

    def frames(self, chunk: Chunk) -> int:
        prompt = self._pasts.find(_key(chunk)) if chunk.streaming else None
        return super().frames(chunk) - (chunk.state.frames or (prompt.frames if prompt is not None else 0))

    def _prompt(self, chunk: Chunk) -> Segment | None:
        """What is kept of the voice's prompt; from its second chunk on, if there is room for it."""
        c, voice = self.config.flow, chunk.voice
        frames = whole_blocks(c, len(voice.prompt_mel))
        if not (chunk.streaming and frames and self._pasts.room):
            return None

        def make() -> Segment:
            ids = voice.prompt_tokens[: frames // c.token_mel_ratio + c.lookahead]
            return self._solver.keep(ids, voice.speaker, voice.prompt_mel[:frames], self._noise, steps=chunk.steps)

        return self._pasts.get(_key(chunk), self._size(frames, chunk), make)

    def _size(self, frames: int, chunk: Chunk) -> int:
        """Bytes of a segment."""
        return chunk.steps * numbers(self.config.flow, frames) * self.dtype.itemsize


def _key(chunk: Chunk) -> Hashable:
    return chunk.voice.digest, chunk.steps
