"""Many utterances in flight over one language model: rows that are joined and left between steps.

A step has one of few shapes and never waits for the host, so it can be one CUDA graph. What it drew is read a few steps
later, in one small copy for all rows; what a row draws beyond its end is never shown. It knows embeddings and ids; not
text, voices or audio.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cosyq.errors import DeviceError
from cosyq.model.config import SamplingConfig
from cosyq.runtime.batch_sampling import sample_rows
from cosyq.runtime.decode import Embed, Finish, Part
from cosyq.runtime.forward import Forward, Prompt
from cosyq.runtime.sampling import draws, not_finite
from cosyq.runtime.transfer import Fetched, sent

SPAN = 256  # attention runs over a multiple of so many positions
LAG = 4  # ids that a GPU may be asked for before the first of them is done
IDLE = -2  # in place of an id: the row drew none


@dataclass
class News:
    """What a row drew since it was last asked, and how it ended, if it did."""

    tokens: list[int] = field(default_factory=list)
    finish: Finish | None = None
    error: DeviceError | None = None


@dataclass(frozen=True)
class _Shown:
    """What a row is to run before it goes on; uniform [room, 2] of a newcomer."""

    prompt: Prompt
    count: int
    minimum: int
    maximum: int
    uniform: Tensor | None


@dataclass
class _Row:
    """What the host knows of a row that is taken.

    since: number of the first step that counts.
    past: positions whose ids and embeddings the cache holds, by the steps that were read.
    reach: positions that it has at most, by the steps that were begun.
    """

    since: int
    past: int
    reach: int
    maximum: int
    count: int = 0
    ended: bool = False


class BatchDecoder:
    """As many utterances as `forward` has rows, each of at most `longest` speech ids.

    The host learns of `burst` ids at once; what a row draws beyond its end is nothing.
    """

    def __init__(self, forward: Forward, sampling: SamplingConfig, *, longest: int, burst: int = 1):
        rows, device = forward.rows, forward.device
        self.forward, self.sampling, self.longest, self.burst = forward, sampling, longest, burst
        self.every = torch.arange(rows, device=device)
        self._counts = torch.zeros(4, rows, dtype=torch.int64, device=device)
        self.positions, self.drawn_count, self.minimum, self.maximum = self._counts
        self.finished = torch.ones(rows, dtype=torch.bool, device=device)
        self.logits = torch.zeros(rows, forward.config.speech_rows, device=device)
        self.recent = torch.full((rows, sampling.win_size), -1, device=device)
        self.uniform = torch.zeros(rows, longest, 2, device=device)
        self.drawn = torch.full((burst, rows), IDLE, device=device)  # in the last step
        self.free = set(range(rows))
        self._shown: dict[int, _Shown] = {}  # and not run yet
        self._rows: dict[int, _Row] = {}
        self._steps = 0  # begun
        self._unread: deque[Fetched] = deque()  # ids

    def fits(self, positions: int, maximum: int) -> bool:
        """Whether a row can hold so many positions of a prompt and so many speech ids after them."""
        return 0 < maximum <= self.longest and positions + maximum <= self.forward.capacity

    def aside(self) -> AbstractContextManager[None]:
        """Inputs made within need not wait for what the caller's stream is about."""
        return self.forward.aside()

    def join(
        self, embeddings: Tensor, *, minimum: int, maximum: int, generator: torch.Generator, room: int | None = None
    ) -> int:
        """Begin an utterance with its prompt, embeddings [1, t, hidden]; returns its row.

        The prompt is run with the next step, beside those of others that came meanwhile.

        Args:
            minimum, maximum: of speech ids; the first `minimum` may not be its end.
            generator: the only source of randomness, on the host.
            room: of speech ids with all that `extend` may add; `maximum` unless it is given.

        Raises:
            ValueError: there is no free row, or it may grow beyond what a row holds.
            torch.OutOfMemoryError: the device has no room for it; the others can go on.
        """
        room = maximum if room is None else room
        if not self.free:
            raise ValueError("every row is taken")
        if not self.fits(embeddings.shape[1], room):
            raise ValueError(f"{embeddings.shape[1]} positions and {room} ids do not fit a row")
        row, state = min(self.free), _Row(self._steps, 0, 0, 0)
        self._go_on(row, state, embeddings, minimum, maximum, draws(room, generator))
        self._rows[row] = state
        self.free.remove(row)
        return row

    def extend(self, row: int, embeddings: Tensor, *, minimum: int, maximum: int) -> None:
        """Go on with an utterance that has come to its maximum, after [1, t, hidden], which begin with its last id.

        Args:
            minimum, maximum: of speech ids from the begin of the utterance on.

        Raises:
            ValueError: it goes on still, or may grow beyond what a row holds.
            torch.OutOfMemoryError: the device has no room for it; the others can go on.
        """
        state = self._rows[row]
        if not state.ended:
            raise ValueError("the row has not come to its end")
        if maximum > self.longest or state.past + embeddings.shape[1] + maximum - state.count > self.forward.capacity:
            raise ValueError(f"{maximum} ids do not fit a row")
        self._go_on(row, state, embeddings, minimum, maximum, None)
        state.since, state.ended = self._steps, False

    def _go_on(
        self, row: int, state: _Row, embeddings: Tensor, minimum: int, maximum: int, uniform: Tensor | None
    ) -> None:
        past = state.past + embeddings.shape[1]
        with self.aside():
            self.forward.reserve(row, past)
        prompt = Prompt(row, self.forward.taken(embeddings), state.past)
        self._shown[row] = _Shown(prompt, state.count, minimum, maximum, uniform)
        state.past = state.reach = past
        state.maximum = maximum

    def leave(self, row: int) -> None:
        """The row is free for another utterance, whether this one has ended or not."""
        with self.aside():
            self.finished[row] = True
            self.forward.release(row)
        self._shown.pop(row, None)
        del self._rows[row]
        self.free.add(row)

    @torch.inference_mode()
    def prefill(self) -> None:
        """Run what was shown and not run yet: `logits` follow it. A step does so by itself."""
        shown, self._shown = list(self._shown.values()), {}
        if shown:
            with self.aside():
                self._run_shown(shown)

    def _run_shown(self, shown: list[_Shown]) -> None:
        """In few copies, however many they are."""
        device, prompts = self.logits.device, [s.prompt for s in shown]
        past = [prompt.past + prompt.embeddings.shape[1] for prompt in prompts]
        rows = sent([prompt.row for prompt in prompts], device)
        counts = [past, [s.count for s in shown], [s.minimum for s in shown], [s.maximum for s in shown]]
        self._counts.index_copy_(1, rows, sent(counts, device))
        new = [s.prompt.row for s in shown if s.uniform is not None]
        if new:
            uniform = torch.zeros(len(new), self.longest, 2)
            for place, drawn in zip(uniform, (s.uniform for s in shown if s.uniform is not None), strict=True):
                place[: len(drawn)] = drawn
            newcomers = sent(new, device)
            self.uniform.index_copy_(0, newcomers, sent(uniform, device))
            self.recent.index_fill_(0, newcomers, -1)
        self.finished.index_fill_(0, rows, False)
        self.logits.index_copy_(0, rows, self.forward.prefill(prompts))

    @property
    def unread(self) -> int:
        """Steps that were begun and not told of in `news`."""
        return len(self._unread)

    @property
    def has_news(self) -> bool:
        """Whether one of them is done."""
        return bool(self._unread) and self._unread[0].ready

    def step(self) -> None:
        """Draw `burst` ids in every row that goes on, and compute what follows them."""
        self.prefill()
        with self.aside():
            self._step()

    def _step(self) -> None:
        for row, state in self._rows.items():
            if not state.ended:
                self.forward.reserve(row, state.reach + self.burst)
                state.reach += self.burst
        taken = max(self._rows, default=0) + 1
        reach = max((state.reach for state in self._rows.values()), default=1)
        rows = min(1 << (taken - 1).bit_length(), self.forward.rows)
        self.advance(rows, min(-(-reach // SPAN) * SPAN, self.forward.capacity))
        self._steps += 1
        self._unread.append(Fetched(self.drawn[:, :rows]))

    @torch.inference_mode()
    def advance(self, rows: int, span: int) -> None:
        """What a step does on the device for the first `rows`, in place: a CUDA graph can hold it."""
        for turn in range(self.burst):
            self._draw_and_go_on(rows, span, turn)

    def _draw_and_go_on(self, rows: int, span: int, turn_of_burst: int) -> None:
        vocabulary, every = self.forward.config.speech_vocab, self.every[:rows]
        live, count, recent = ~self.finished[:rows], self.drawn_count[:rows], self.recent[:rows]
        at = count.clamp(max=self.longest - 1)
        ids = sample_rows(
            self.logits[:rows],
            recent,
            self.uniform[every, at],
            self.sampling,
            forbidden=count < self.minimum[:rows],
            forbid_from=vocabulary,
        )
        self.drawn[turn_of_burst, :rows] = torch.where(live, ids, IDLE)
        turn = at % self.sampling.win_size
        recent[every, turn] = torch.where(live, ids, recent[every, turn])
        count += live
        ended = (ids < 0) | (ids >= vocabulary) | (count >= self.maximum[:rows])
        self.finished[:rows] |= ended
        self.logits[:rows] = self.forward(ids.clamp(0, vocabulary - 1), self.positions[:rows], span)
        self.positions[:rows] += live & ~ended

    def news(self, lag: int | None = None) -> dict[int, News]:
        """What each row drew since the last call, for those that drew anything.

        Waits for the device until all but the last `lag` steps are done; what is done beyond that is told too.
        """
        lag = max(LAG // self.burst, 1) if lag is None else lag
        found: dict[int, News] = {}
        while self._unread and (len(self._unread) > lag or self._unread[0].ready):
            ids = self._unread[0].tensor()
            number = self._steps - len(self._unread)
            self._unread.popleft()
            for row, tokens in enumerate(ids.T.tolist()):
                state = self._rows.get(row)
                for token in tokens:
                    if token != IDLE and state is not None and number >= state.since:
                        self._read(state, token, found.setdefault(row, News()))
        return found

    def _read(self, state: _Row, token: int, news: News) -> None:
        state.count += 1
        state.ended = True
        if token < 0:
            news.error = not_finite()
        elif token >= self.forward.config.speech_vocab:
            news.finish = "stop"
        else:
            news.tokens.append(token)
            state.ended = state.count >= state.maximum
            news.finish = "length" if state.ended else None
            state.past += not state.ended


def follow_alone(
    decoder: BatchDecoder, embed: Embed, parts: Iterable[Part], *, room: int, generator: torch.Generator
) -> Iterator[int]:
    """`decode.follow` over a row of a decoder that nobody else uses: the same ids."""
    row: int | None = None
    count, waiting = 0, []
    try:
        for part in parts:
            waiting += [embed(text, speech) for text, speech in part.shown]
            if part.maximum <= count:
                continue
            shown, bounds = torch.cat(waiting).unsqueeze(0), {"minimum": part.minimum, "maximum": part.maximum}
            if row is None:
                row = decoder.join(shown, **bounds, generator=generator, room=room)
            else:
                decoder.extend(row, shown, **bounds)
            finish = None
            while finish is None:
                decoder.step()
                news = decoder.news().get(row, News())
                if news.error:
                    raise news.error
                yield from news.tokens
                count, finish = count + len(news.tokens), news.finish
                waiting = [embed([], news.tokens[-1:])] if news.tokens else waiting
            if finish == "stop":
                return "stop"  # type: ignore[return-value]
    finally:
        if row is not None:
            decoder.leave(row)
    return "length"  # type: ignore[return-value]
