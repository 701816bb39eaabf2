"""Many requests in flight over one engine: they come and go between steps, and each hears what it would hear alone.

One thread owns the engine. It renders the chunks that are due, first chunks first, in order of arrival, then those of
the streams which would run dry first; and where none is due it draws ids, for every request that has a row of the
language model's batch. While something is rendered it draws for those who have no audio in hand, takes in who came and
lets go of who left, so that nobody waits for a render of somebody else's. While a request has no audio yet, a stream
that has some in hand waits for a few steps.

A GPU is given work and not waited for: steps and renders are on their way together, the next of either is launched
before the last is over, and the thread sleeps until one of them is. An engine that computes as it is called has nothing
on its way, and calls back between the steps of a render instead.

It knows text and options, ids and samples; not HTTP, clients, or how long a queue may be.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Unpack

import torch
from torch import Tensor

from cosyq.errors import CosyqError
from cosyq.runtime.batch import News
from cosyq.runtime.clock import Audio
from cosyq.runtime.decode import Finish
from cosyq.runtime.engine import Engine
from cosyq.runtime.failing import explained, is_fatal, lost
from cosyq.runtime.flight import POSITIONS, ROOM, Flight, GoneError, Heard, Line, Listener
from cosyq.runtime.request import Options
from cosyq.runtime.sound import Sound
from cosyq.runtime.synthesizer import Synthesizer
from cosyq.runtime.transfer import Mark
from cosyq.runtime.urgency import IN_HAND, Due, Expected, chosen

MOST_ROWS, ROWS_OF_A_CPU = 32, 4
SHARE = 0.25  # of the memory that is free, for the rows' keys and values
SPARE = 0.2  # of it, for what an engine makes ready and keeps
AHEAD = 2  # steps of the language model that a GPU has been given, so that it never waits for the next
LOOK = 2e-4  # seconds between two looks at what a GPU has done
SHORT = 300  # characters of a text that is read in passing: 64 take half a millisecond
PATIENCE = 5.0  # seconds for the thread to end


class InFlight:
    """Speaks at most `rows` requests at once; the others wait in order.

    Args:
        tts: what speaks. Its engine belongs to this object's thread from here on.
        on_fatal: called from that thread, once, when the device has failed for good.
    """

    def __init__(self, tts: Synthesizer, *, rows: int, on_fatal: Callable[[CosyqError], None] = lambda _: None):
        self.tts, self.rows = tts, rows
        self._on_fatal = on_fatal
        self._decoder = tts.engine.decoder(rows, positions=POSITIONS, room=ROOM)
        self._waiting: deque[Flight] = deque()
        self._active: list[Flight] = []
        self._held = 0  # ids of a row since a render
        self._begun: deque[float] = deque()  # when each of the steps was, that nobody has heard of
        self._told = 0.0  # when the last of them was heard of
        self._flow: Mark | None = None  # behind the last render's, while it is on its way
        self._sounds: deque[_Sounding] = deque()  # on their way, in order
        self._stirred = self._closed = False
        self._changed = threading.Condition()
        self._preparing = ThreadPoolExecutor(1, "preparing")
        self._thread = threading.Thread(target=self._run, name="in-flight", daemon=True)
        self._thread.start()

    # ---- from any thread

    def submit(
        self, text: str | Iterable[str], listener: Listener, *, longest: float | None = None, **options: Unpack[Options]
    ) -> None:
        """Speak a text, or one that is still being written, as `Synthesizer.stream` or `stream_text` would.

        What is wrong with it is told to the listener.

        Args:
            text: its pieces, if they are still to come, are asked for in a thread of their own.
            longest: seconds of audio after which it is cut, with finish "length".

        Raises:
            GoneError: nothing is spoken any more.
        """
        flight = Flight(listener, longest, self.wake)
        with self._changed:
            if self._closed:
                raise GoneError("nothing is spoken here any more")
            self._waiting.append(flight)
        if isinstance(text, str) and len(text) <= SHORT:
            flight.unread = partial(flight.write, self.tts, text, options)
            self.wake()
        elif isinstance(text, str):
            self._preparing.submit(flight.write, self.tts, text, options)
        else:
            reading = (self.tts, text, options)
            threading.Thread(target=flight.write, args=reading, name="reading", daemon=True).start()

    def stream(self, text: str | Iterable[str], **options: Unpack[Options]) -> Iterator[Audio]:
        """The same as an iterator; closing it gives the request up. Whatever is wrong is raised by the iterator."""
        heard = Heard(self.wake)
        self.submit(text, heard, **options)
        return heard.chunks()

    def warm_up(self, text: str) -> None:
        """Say a text to nobody; on a GPU in every size of a batch, so that no request waits for what is made once."""
        sizes = {1}
        if self.tts.engine.device.type == "cuda":
            sizes |= {self.rows, *(1 << n for n in range(self.rows.bit_length()))}
        for size in sorted(sizes):
            for chunks in [self.stream(text, seed=seed) for seed in range(size)]:
                for _ in chunks:
                    pass

    def wake(self) -> None:
        """Have a look: somebody has left."""
        with self._changed:
            self._stirred = True
            self._changed.notify()

    @property
    def waiting(self) -> int:
        with self._changed:
            return sum(not flight.listener.cancelled for flight in self._waiting)

    @property
    def active(self) -> int:
        return len(self._active)

    def close(self) -> None:
        """End everything that is spoken and waits."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._preparing.shutdown(wait=False, cancel_futures=True)
        self._thread.join(PATIENCE)

    # ---- the engine's thread

    def _run(self) -> None:
        if self.tts.engine.device.type == "cuda":
            try:
                self.tts.engine.prepare(int(SPARE * torch.cuda.mem_get_info(self.tts.engine.device)[0]))
            except Exception as error:
                self._explain(error)
        while not self._closed:
            while not self._closed and self._turn():
                pass
            with self._changed:
                while not (self._stirred or self._closed or self._arrived()):
                    self._changed.wait(LOOK if self._on_its_way() else None)
                self._stirred = False
        with self._changed:
            left = [*self._active, *self._waiting]
            self._waiting.clear()
        for flight in left:
            self._end(flight, GoneError("nothing is spoken here any more"))
        for one in self._sounds:
            if one.flight.sounding:
                one.flight.sounding = 0
                one.flight.listener.release()

    def _turn(self) -> bool:
        """A step for every row, and perhaps a render; whether there was anything to do."""
        try:
            worked = self._advance()
            if self._flow is not None:
                return worked
            if flights := self._choose():
                self._held = 0
                self._render(flights)
                return True
            return self._draw() or worked
        except Exception as error:  # nobody may wait for a thread that is dead
            why = self._explain(error)
            for flight in list(self._active):
                self._end(flight, why)
            return True

    def _on_its_way(self) -> bool:
        return bool(self._sounds or self._decoder.unread or self._flow is not None)

    def _arrived(self) -> bool:
        """Whether any of that is there; what has failed is, too."""
        try:
            flow = self._flow is not None and self._flow.passed
            return flow or self._decoder.has_news or bool(self._sounds and self._sounds[0].sound.ready)
        except Exception:  # a turn will meet it
            return True

    def _advance(self) -> bool:
        """Pass on what has come, let go of who left, take in who came, show what is new, and draw for those who cannot
        wait."""
        if self._flow is not None and self._flow.passed:
            self._flow = None
        worked = self._deliver() | self._listen()
        self._sweep()
        for flight in list(self._active):
            worked |= self._attempt(flight, self._show)
        return self._draw(urgent=True) or worked

    def _sweep(self) -> None:
        for flight in [f for f in self._active if f.listener.cancelled]:
            self._end(flight, GoneError("the speech was stopped"))
        self._read()
        with self._changed:
            left = [f for f in self._waiting if f.listener.cancelled]
            for flight in left:
                self._waiting.remove(flight)
            came = [flight for flight in self._waiting if flight.ready][: self.rows - len(self._active)]
            for flight in came:
                self._waiting.remove(flight)
            self._active += came
        for flight in left:
            self._end(flight, GoneError("the speech was stopped"))
        for flight in came:
            flight.listener.begin()

    def _read(self) -> None:
        """Read the short texts of those who can be taken in.

        Another thread would take longer, and this one's time as well: they would contend for Python's lock.
        """
        with self._changed:
            unread = [f for f in self._waiting if f.unread and not f.listener.cancelled]
        for flight in unread[: self.rows - len(self._active)]:
            read, flight.unread = flight.unread, None
            assert read is not None
            read()

    def _show(self, flight: Flight) -> bool:
        """The next part of an utterance, if it is time and there is one. The words run at most one utterance ahead."""
        complete = flight.complete  # before its lines are looked at, and likewise `whole`
        line = next((line for line in flight.lines[:2] if not line.out), None)
        if line is None:
            if complete and not flight.lines and not flight.sounding:
                self._end(flight, flight.error)
                return True
            return False
        if line.drawing:
            return False
        whole, (part, words) = line.whole, line.parts.popleft() if line.parts else (None, 0)
        if part is None:
            if whole:
                self._out(flight, line, "length")
            return whole
        assert flight.clock is not None
        flight.clock.read(words)
        line.shown += part.shown
        if part.maximum <= line.count:
            return True
        embed, bounds = self.tts.engine.embed, {"minimum": part.minimum, "maximum": part.maximum}
        with self._decoder.aside():
            shown = torch.cat([embed(text, speech) for text, speech in line.shown]).unsqueeze(0)
        if flight.row is None:
            flight.row = self._decoder.join(shown, **bounds, generator=line.generator, room=line.room)
        else:
            self._decoder.extend(flight.row, shown, **bounds)
        line.drawing, line.shown = True, []
        return True

    def _draw(self, *, urgent: bool = False) -> bool:
        """A step for every row, if somebody lacks the ids of its next chunk; `urgent`: somebody who cannot wait.

        A step takes as long for one row as for many: those with audio in hand wait until many need one.
        """
        drawing = self._drawing()
        soon = time.monotonic() + IN_HAND if urgent else math.inf
        if not any(f.dry_at < soon and f.lines[0].rendering.due is None for f in drawing.values()):
            return False
        if self._decoder.unread >= AHEAD:
            return False
        try:
            began = time.perf_counter()
            self._decoder.step()
            self._begun.append(began)
        except Exception as error:
            self._lose_rows(error)
            return True
        self._held += self._decoder.burst
        return self._listen() or True

    def _drawing(self) -> dict[int, Flight]:
        """Whose ids are drawn, by their rows."""
        return {f.row: f for f in self._active if f.row is not None and f.line_drawn}

    def _listen(self) -> bool:
        """Take in the ids that have been drawn, if there are new ones."""
        if not self._decoder.has_news:
            return False
        try:
            told = self._decoder.news(lag=AHEAD)
        except Exception as error:
            self._lose_rows(error)
            return True
        began = now = time.perf_counter()
        while len(self._begun) > self._decoder.unread:
            began = min(began, self._begun.popleft())
        drawing = self._drawing()
        seconds, self._told = (now - max(began, self._told)) / max(len(drawing), 1), now
        for row, news in told.items():
            if row in drawing:
                self._heard(drawing[row], news, seconds)
        return True

    def _lose_rows(self, error: Exception) -> None:
        """A step has failed: of nobody's in particular."""
        why = self._explain(error)
        for flight in self._drawing().values():
            self._end(flight, why)

    def _heard(self, flight: Flight, news: News, seconds: float) -> None:
        line = flight.line_drawn
        assert flight.clock is not None
        assert line is not None
        if news.error:
            self._end(flight, news.error)
            return
        flight.clock.drawn(len(news.tokens), seconds)
        line.rendering.add(news.tokens)
        line.count += len(news.tokens)
        line.last = news.tokens[-1] if news.tokens else line.last
        if news.finish == "stop":
            self._out(flight, line, "stop")
        elif news.finish == "length":
            line.drawing, line.shown = False, [([], [line.last])]

    def _out(self, flight: Flight, line: Line, finish: Finish) -> None:
        line.out, line.drawing = True, False
        line.rendering.end()
        if flight.clock is not None:
            flight.clock.ended(finish)
        self._leave(flight)

    def _choose(self) -> list[Flight]:
        """Whose chunks to render."""
        due, more, first = [], False, False
        for flight in self._active:
            if flight.lines and (rendering := flight.lines[0].rendering).due is not None:
                due.append((flight, Due(bool(flight.started), flight.dry_at, rendering.frames, rendering.steps)))
            elif flight.line_drawn:
                more = True
            first = first or bool(flight.line_drawn and not flight.started)
        expected = Expected(first, more, self._held)
        numbers = chosen([chunk for _, chunk in due], expected, time.monotonic(), self.tts.engine.flow_frames)
        return [due[number][0] for number in numbers]

    def _render(self, flights: list[Flight]) -> None:
        """One chunk of each; side by side in the flow, one after the other in the vocoder, which is short."""

        def between() -> None:
            self._advance()
            if self._closed or not any(flight in self._active for flight in flights):
                raise _AbandonedError

        try:
            mels = self.tts.engine.mels([f.lines[0].rendering.chunk for f in flights], between=between)
        except _AbandonedError:
            return
        except Exception as error:
            if len(flights) > 1 and not is_fatal(error):  # whose fault it was shows when each is alone
                for flight in flights:
                    if flight in self._active:
                        self._render([flight])
                return
            why = self._explain(error)
            for flight in flights:
                self._end(flight, why)
            return
        self._flow = Mark(mels[0].device)
        for flight, mel in zip(flights, mels, strict=True):
            self._attempt(flight, partial(self._sound, mel=mel))

    def _sound(self, flight: Flight, mel: Tensor) -> bool:
        """Begin what a flight's chunk sounds like."""

        def between() -> None:
            self._advance()
            if flight not in self._active or self._closed:
                raise _AbandonedError

        line = flight.lines[0]
        sound = line.rendering.take(mel, between)
        if flight not in self._active:
            return True
        lead, line.lead = line.lead, 0
        if lead or len(sound):
            flight.started = flight.started or time.monotonic()
        flight.made += (lead + len(sound)) / self.tts.sample_rate
        flight.sounding += 1
        self._sounds.append(_Sounding(flight, line, lead, sound))
        if line.rendering.over:
            del flight.lines[0]
        self._deliver()
        return True

    def _deliver(self) -> bool:
        """Pass on what has come."""
        delivered = False
        while self._sounds and self._sounds[0].sound.ready:
            one, delivered = self._sounds.popleft(), True
            one.flight.sounding -= 1
            if one.flight in self._active:
                self._attempt(one.flight, partial(self._pass_on, one=one))
            elif not one.flight.sounding:
                one.flight.listener.release()
        return delivered

    def _pass_on(self, flight: Flight, one: _Sounding) -> bool:
        if flight.tell(one.line, one.lead, one.sound.samples().numpy()):
            self._end(flight, None)
        return True

    # ---- how it ends

    def _attempt(self, flight: Flight, work: Callable[[Flight], bool]) -> bool:
        try:
            return flight in self._active and work(flight)
        except _AbandonedError:
            pass
        except Exception as error:
            self._end(flight, self._explain(error))
        return True

    def _explain(self, error: Exception) -> CosyqError:
        """What a listener is told; where the device is lost, nothing is spoken from here on."""
        why = explained(error)
        if why is not error and isinstance(why, GoneError) and not self._closed:
            with self._changed:
                self._closed = True
            self._on_fatal(lost(error))
        return why

    def _leave(self, flight: Flight) -> None:
        if flight.row is not None:
            row, flight.row = flight.row, None
            self._decoder.leave(row)

    def _end(self, flight: Flight, error: CosyqError | None) -> None:
        if flight in self._active:
            self._active.remove(flight)
        if not self._closed:
            self._leave(flight)
        for line in list(flight.lines):
            line.rendering.forget()
        flight.listener.end(error)
        if self._closed:
            flight.sounding = 0
        if not flight.sounding:
            flight.listener.release()


@dataclass(frozen=True)
class _Sounding:
    """A chunk on its way to its listener; `lead` samples of silence come before it."""

    flight: Flight
    line: Line
    lead: int
    sound: Sound


class _AbandonedError(Exception):
    """A render whose audio nobody wants any more."""


def rows_for(engine: Engine) -> int:
    """How many requests to speak at once where nobody says: on a CPU, 4; on a GPU, a power of two up to 32, whose keys
    and values fit a quarter of the memory that is free."""
    if engine.device.type != "cuda":
        return ROWS_OF_A_CPU
    c = engine.config.llm
    row = 2 * c.num_layers * c.num_kv_heads * c.head_dim * (POSITIONS + ROOM) * 2  # 16 bits
    fit = int(SHARE * torch.cuda.mem_get_info(engine.device)[0] / row)
    return min(1 << max(fit.bit_length() - 1, 0), MOST_ROWS)
