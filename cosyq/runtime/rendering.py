"""One utterance's speech ids on their way to samples, chunk by chunk, as a stream renders them.

Where chunks end is known before the first id, so the samples do not depend on how fast the ids came.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cosyq.model.flow import nothing
from cosyq.model.vocoder import StreamState
from cosyq.runtime.decode import Silence
from cosyq.runtime.engine import Chunk, Engine
from cosyq.runtime.flow_past import FlowState
from cosyq.runtime.schedule import chunk_ends, shown_prompt
from cosyq.runtime.sound import Sound
from cosyq.runtime.speed import Pace
from cosyq.voices.voice import Voice


class Rendering:
    """Chunks together equal one block-causal pass over the utterance."""

    def __init__(self, engine: Engine, voice: Voice, *, steps: int, speed: float):
        flow = engine.config.flow
        block, prompt = flow.chunk_frames // flow.token_mel_ratio, voice.prompt_tokens.numel()
        self._engine, self.steps = engine, steps
        self._voice = voice.ending(shown_prompt(prompt, block))
        self._ends = chunk_ends(self._voice.prompt_tokens.numel(), block, engine.growth)
        self._end, self._lookahead = next(self._ends), flow.lookahead
        self._silence = Silence(engine.config.llm.silent_tokens)
        self._state, self._pace, self._flow = StreamState(), Pace(speed), FlowState()
        self._tokens: list[int] = []
        self._sent = 0  # frames of the flow that were passed on
        self._ended = False
        self.over = False  # all of it is rendered

    def add(self, tokens: Iterable[int]) -> None:
        """More speech ids, as they were drawn: long silences are shortened here."""
        self._tokens += filter(self._silence.lets_through, tokens)

    def end(self) -> None:
        """No id will follow."""
        self._ended = True

    @property
    def due(self) -> int | None:
        """How many of the ids the next chunk is rendered of; None while that takes more of them."""
        if len(self._tokens) >= self._end + self._lookahead:
            return self._end + self._lookahead
        return len(self._tokens) if self._ended and not self.over else None

    @property
    def chunk(self) -> Chunk:
        """What the flow makes of the ids that are due."""
        count = self.due
        assert count is not None
        final = count < self._end + self._lookahead
        return Chunk(self._tokens[:count], self._voice, True, final, self.steps, self._sent, self._flow)

    @property
    def frames(self) -> int:
        """How many frames that takes of the flow."""
        return self._engine.frames(self.chunk)

    def next(self) -> NDArray[np.float32]:
        """Render the chunk that is due: samples [n] float32, possibly none."""
        (mel,) = self._engine.mels([self.chunk])
        return self.take(mel).samples().numpy()

    def take(self, mel: Tensor, between: Callable[[], None] = nothing) -> Sound:
        """What becomes of the chunk that is due, by the flow's new frames; the next one may be asked for at once.

        `between` is called between the steps of the work, and may end it by an exception.
        """
        final = self.chunk.final
        sound = self._engine.sound(self._pace.frames(mel), self._state, final=final, between=between)
        self._sent, self.over = self._sent + mel.shape[1], final
        if final:
            self.forget()
        else:
            self._end = next(self._ends)
        return sound

    def forget(self) -> None:
        """Nothing more is rendered: what the flow keeps of it is given back, whoever else knows this object."""
        self._flow.segments = ()
