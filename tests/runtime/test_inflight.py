"""Many requests over one engine: each as it would be alone, whoever comes, goes or fails beside it."""

import itertools
import queue
import random
import threading
import time

import numpy as np
import pytest
import torch

import cosyq
from cosyq.errors import CosyqError, DeviceError, UsageError
from cosyq.runtime import inflight, transfer
from cosyq.runtime.flight import GoneError
from cosyq.runtime.flow_past import Segment
from cosyq.runtime.inflight import InFlight, rows_for
from cosyq.runtime.urgency import Due, Expected

TEXT = "hello world, the quick brown fox jumps"
LONG = "hello world, the quick fox.\n\nanother begins."


class Slowed:
    """An engine that notes what it does, and each of whose Euler steps takes a while, or fails."""

    def __init__(self, engine):
        self._engine, self.name, self.config, self.device = engine, engine.name, engine.config, engine.device
        self.embed, self.speech_tokens, self.sound = engine.embed, engine.speech_tokens, engine.sound
        self.weights, self.flow_frames, self.growth = engine.weights, engine.flow_frames, engine.growth
        self.frames, self.prepare = engine.frames, engine.prepare
        self.delay, self.errors, self.done = 0.0, {}, []
        self.steps, self.poison, self.during = 0, None, []

    def decoder(self, rows, **bounds):
        made = self._engine.decoder(rows, **bounds)
        step = made.step

        def noted():
            self.steps += 1
            self.done.append("step")
            if error := self.errors.get("step"):
                raise error
            if self.poison in made._rows:
                made.logits[self.poison] = torch.nan
            step()

        made.step = noted
        return made

    def mels(self, chunks, *, between):
        def slowly():
            time.sleep(self.delay)
            for chunk in chunks:
                if error := self.errors.get(chunk.voice.name):
                    raise error
            between()

        self.done.append(tuple(chunk.voice.name for chunk in chunks))
        before = self.steps
        try:
            return self._engine.mels(chunks, between=slowly)
        finally:
            self.during.append(self.steps - before)


class Ear:
    """A listener that notes when it heard what."""

    def __init__(self, batch):
        self.batch, self.cancelled, self.chunks, self.error = batch, False, [], None
        self.began, self.over, self.times = threading.Event(), threading.Event(), {}

    def begin(self):
        self.began.set()

    def put(self, audio):
        self.times.setdefault("first", time.monotonic())
        self.chunks.append(audio)

    def end(self, error):
        self.error = error
        self.times["end"] = time.monotonic()

    def release(self):
        self.over.set()

    def cancel(self):
        self.times["cancel"], self.cancelled = time.monotonic(), True
        self.batch.wake()


class LateMark:
    """Of a device that takes its time."""

    seconds = 0.003

    def __init__(self, device):
        self._at = time.monotonic() + self.seconds

    @property
    def passed(self):
        return time.monotonic() > self._at

    def wait(self):
        time.sleep(max(self._at - time.monotonic(), 0))


@pytest.fixture
def late(monkeypatch):
    """Whatever is launched is done later only, as on a GPU."""
    monkeypatch.setattr(transfer, "Mark", LateMark)
    monkeypatch.setattr(inflight, "Mark", LateMark)


@pytest.fixture(scope="module")
def tts(artifact_of):
    return cosyq.load(artifact_of("int8"), device="cpu")


@pytest.fixture
def engine(tts):
    return Slowed(tts.engine)


@pytest.fixture
def batch(tts, engine):
    failures = []
    made = InFlight(cosyq.Synthesizer(tts.artifact, engine), rows=3, on_fatal=failures.append)
    made.failures = failures
    yield made
    made.close()
    assert not made._thread.is_alive()


def submit(batch, text=TEXT, **options):
    ear = Ear(batch)
    batch.submit(text, ear, **{"seed": 7, **options})
    return ear


def joined(chunks):
    return np.concatenate([chunk.samples for chunk in chunks])


def named(voice, name):
    return type(voice)(name, voice.speaker, voice.prompt_tokens, voice.prompt_mel, voice.transcript)


def slowly(text, gaps):
    for word in text.split(" "):
        time.sleep(next(gaps))
        yield word + " "


def test_each_is_what_it_would_be_alone(tts, batch, voice):
    """Eight requests over three rows, at random times: of several utterances, fast, instructed, still being written."""
    draw = random.Random(1)
    requests = [
        ("hello there", {"seed": 1}),
        ("a\n\nb\n\nc", {"seed": 2, "voice": voice}),
        ("hello there", {"seed": 3, "speed": 1.5, "instruct": "speak slowly"}),
        (["hello world.\n\n", "and more"], {"seed": 4, "voice": voice, "cross_lingual": True}),
        ("it is $1", {"seed": 5}),
        ("a\n\nb", {"seed": 6, "speed": 2.0}),
        (["the fox"], {"seed": 7}),
        ("a", {"seed": 8, "voice": voice}),
    ]
    heard = {}

    def ask(index, text, options):
        if not isinstance(text, str):
            text = slowly("".join(text), itertools.repeat(0.002))
        heard[index] = list(batch.stream(text, **options))

    threads = []
    for index, (text, options) in enumerate(requests):
        threads.append(threading.Thread(target=ask, args=(index, text, options)))
        threads[-1].start()
        time.sleep(draw.random() / 20)
    for thread in threads:
        thread.join(60)
    for index, (text, options) in enumerate(requests):
        alone = list(tts.stream(text, **options) if isinstance(text, str) else tts.stream_text(text, **options))
        together = heard[index]
        np.testing.assert_array_equal(joined(together), joined(alone))
        assert [c.pause for c in together if c.pause] == [c.pause for c in alone if c.pause]
        mine, other = together[-1].timings, alone[-1].timings
        assert (mine.text_tokens, mine.speech_tokens) == (other.text_tokens, other.speech_tokens)
        assert (mine.finish, together[-1].text) == (other.finish, alone[-1].text)
        assert together[-1].seed == options["seed"]
    assert (batch.active, batch.waiting) == (0, 0)


def test_each_is_what_it_would_be_alone_where_work_is_launched_and_not_waited_for(late, tts, batch, voice):
    test_each_is_what_it_would_be_alone(tts, batch, voice)


def test_who_leaves_is_let_go_of_when_what_was_launched_is_over(late, monkeypatch, batch):
    monkeypatch.setattr(LateMark, "seconds", 0.1)
    ear = submit(batch)
    deadline = time.monotonic() + 20
    while not (launched := [one.sound for one in batch._sounds]):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    ear.cancel()
    assert ear.over.wait(5)
    assert all(sound.ready for sound in launched)
    assert not ear.chunks
    monkeypatch.setattr(LateMark, "seconds", 0.0)
    assert submit(batch).over.wait(20)


@pytest.mark.parametrize("leaves", [False, True])
def test_what_a_flow_keeps_of_an_utterance_goes_with_it(batch, engine, leaves):
    """Though others still know of it."""
    kept, mels = [], engine.mels

    def keeping(chunks, *, between):
        for chunk in chunks:
            assert chunk.sent == 0 or chunk.state.segments
            chunk.state.segments += (Segment(1, torch.zeros(1, 1)),)
            kept.append(chunk.state)
        return mels(chunks, between=between)

    engine.mels, ear = keeping, submit(batch)
    if leaves:
        deadline = time.monotonic() + 10
        while not kept:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        ear.cancel()
    assert ear.over.wait(20)
    assert len({id(state) for state in kept}) == 1
    assert not kept[0].segments


def test_no_more_at_once_than_rows_and_the_others_in_order(batch, engine):
    engine.delay = 0.005
    ears = [submit(batch, "hello") for _ in range(5)]
    for ear in ears[:3]:
        assert ear.began.wait(10)
    assert not ears[3].began.is_set()
    assert (batch.active, batch.waiting) == (3, 2)
    ears[3].cancel()  # who leaves the queue gives up the place at once
    assert batch.waiting == 1
    for ear in ears:
        assert ear.over.wait(20)
    assert not ears[3].began.is_set()
    assert isinstance(ears[3].error, GoneError)
    assert ears[4].error is None


def test_a_text_that_has_not_begun_holds_up_nobody(batch):
    pieces = queue.SimpleQueue()
    silent = Ear(batch)
    batch.submit(iter(pieces.get, None), silent, seed=1)
    assert submit(batch).over.wait(20)
    assert not silent.began.is_set()
    pieces.put("hello there")
    pieces.put(None)
    assert silent.over.wait(20)
    assert silent.chunks[-1].timings.finish


@pytest.mark.parametrize("rendering", ["its own", "another's"])
def test_who_leaves_is_let_go_of_within_100_ms_of_a_long_render(batch, engine, rendering):
    """A render of half a second or more is on: between two of its Euler steps."""
    engine.delay = 0.05
    one = submit(batch)
    assert one.began.wait(10)
    deadline = time.monotonic() + 10
    while not any(isinstance(work, tuple) for work in engine.done):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    ear = one
    if rendering == "another's":
        ear = submit(batch)
        assert ear.began.wait(10)
    steps = engine.steps
    time.sleep(0.1)
    assert engine.steps > steps or rendering == "its own"  # others' words go on meanwhile
    ear.cancel()
    assert ear.over.wait(5)
    assert ear.times["end"] - ear.times["cancel"] < 0.1
    if rendering == "its own":
        assert not one.chunks
        assert batch.active == 0
    engine.delay = 0.0
    assert submit(batch).over.wait(20)


def test_the_first_chunks_come_first(batch, engine, voice):
    """Streams that are ahead of their listeners let a newcomer's first chunk pass, at once and in order of arrival."""
    engine.delay = 0.01
    early = submit(batch, LONG, voice=named(voice, "early"))
    while not early.chunks:
        time.sleep(0.001)
    engine.done.clear()
    late = [submit(batch, "a", voice=named(voice, name)) for name in ("late", "later")]
    for ear in late:
        while not ear.chunks:
            time.sleep(0.001)
    renders = [name for work in engine.done if isinstance(work, tuple) for name in work]
    assert renders[: renders.index("later")].count("early") <= 2
    firsts = [ear.times["first"] for ear in late]
    assert firsts == sorted(firsts)
    for ear in (early, *late):
        assert ear.over.wait(30)


def test_nobodys_words_run_further_ahead_than_a_chunk(batch, engine):
    """A render is not kept up by ids that nobody needs yet, but goes on with those of a newcomer."""
    engine.delay = 0.01
    one = submit(batch, TEXT)
    deadline = time.monotonic() + 20
    while not engine.during:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert engine.during[0] == 0
    other = submit(batch, TEXT)
    for ear in (one, other):
        assert ear.over.wait(20)
    assert sum(engine.during) > 0


def test_what_is_due_and_what_is_expected_of_whom(batch, engine, monkeypatch):
    def flight(started, due, drawn, frames):
        rendering = type("Rendering", (), {"due": 5 if due else None, "frames": frames, "steps": 10})
        line = type("Line", (), {"rendering": rendering})
        return type("Flight", (), {"lines": [line], "started": started, "dry_at": started, "line_drawn": drawn})

    heard, new = flight(7.0, True, True, 50), flight(0, True, False, 30)
    asked = []
    monkeypatch.setattr(inflight, "chosen", lambda *given: asked.append(given[:2]) or [1])
    batch._held = 3
    for others, first, more in (
        ([], False, False),
        ([flight(6.0, False, True, 0)], False, True),
        ([flight(0, False, True, 0)], True, True),
        ([flight(0, False, False, 0)], False, False),  # its text is still being shown
    ):
        batch._active = [heard, *others, new]
        assert batch._choose() == [new]
        assert asked.pop() == ([Due(True, 7.0, 50, 10), Due(False, 0, 30, 10)], Expected(first, more, 3))
    batch._active = []


def test_ids_wait_for_a_step_of_many_where_there_is_audio_in_hand(batch):
    def flight(started, sent, due):
        rendering = type("Rendering", (), {"due": 5 if due else None})
        line = type("Line", (), {"rendering": rendering})
        about = {"lines": [line], "row": started, "line_drawn": line, "dry_at": started + sent}
        return type("Flight", (), about)

    steps, decoder, now = [], batch._decoder, time.monotonic()
    fake = {"burst": 4, "step": lambda _: steps.append(1), "unread": 0, "has_news": False}
    batch._decoder = type("Decoder", (), fake)()
    rich, poor, new, ready = (
        flight(now - 1, 9, False),
        flight(now - 2, 2.1, False),
        flight(0, 0, False),
        flight(0, 0, True),
    )
    for flights, urgent, draws in (
        ([rich], True, False),
        ([rich], False, True),
        ([rich, poor], True, True),
        ([rich, new], True, True),
        ([ready], False, False),
        ([ready, rich], True, False),
        ([ready, rich], False, True),
    ):
        batch._active = flights
        assert batch._draw(urgent=urgent) is draws
    assert len(steps) == 4
    batch._active, batch._decoder = [], decoder


def test_short_texts_are_read_by_the_thread_that_speaks_them(batch, monkeypatch):
    readers = []
    read = batch.tts.requests.utterances
    monkeypatch.setattr(
        batch.tts.requests, "utterances", lambda *a: readers.append(threading.current_thread().name) or read(*a)
    )
    for text in ("a", "a " * inflight.SHORT):
        ear = submit(batch, text)
        while not (ear.began.wait(0.001) or ear.over.is_set()):
            pass
        ear.cancel()
        assert ear.over.wait(20)
    assert readers[0] == "in-flight"
    assert readers[1].startswith("preparing")


def test_chunks_rendered_side_by_side_are_what_they_would_be_alone(tts, engine, voice):
    """Also where one of them leaves meanwhile, and one cannot be rendered."""
    engine.flow_frames, engine.delay = 10_000, 0.01
    engine.errors["bad"] = DeviceError("not finite")
    batch = InFlight(cosyq.Synthesizer(tts.artifact, engine), rows=5)
    ears = [submit(batch, "hello there", seed=seed) for seed in range(3)]
    bad = submit(batch, "hello there", voice=named(voice, "bad"))
    leaves = submit(batch, LONG)
    assert leaves.began.wait(20)
    leaves.cancel()
    for ear in (*ears, bad):
        assert ear.over.wait(20)
    batch.close()
    assert "not finite" in str(bad.error)
    assert max(len(work) for work in engine.done if isinstance(work, tuple)) > 1
    for seed, ear in enumerate(ears):
        np.testing.assert_array_equal(joined(ear.chunks), joined(tts.stream("hello there", seed=seed)))


def test_what_is_wrong_with_the_engine_ends_what_is_spoken_and_nothing_else(batch, engine):
    def broken(chunk):
        raise ValueError("secret text")

    frames, engine.frames = engine.frames, broken
    ear = submit(batch, TEXT)
    assert ear.over.wait(10)
    assert "internal error: ValueError" in str(ear.error)
    engine.frames = frames
    ear = submit(batch, TEXT)
    assert ear.over.wait(20)
    assert ear.error is None


def test_what_is_wrong_with_one_harms_no_other(batch, engine, voice, tts):
    good = [submit(batch, LONG, voice=voice)]
    for text, options, expected in (
        ("...", {}, "nothing to say"),
        (TEXT, {"voice": "nobody"}, "unknown voice"),
        (TEXT, {"speed": 9}, "a speed is"),
        (TEXT, {"instruct": "slowly " * 2048}, "2048 are the most"),
        ([" "], {}, "nothing to say"),
        (["<|endofprompt|> is said"], {}, "placed for you"),
    ):
        ear = submit(batch, text, **options)
        assert ear.over.wait(10)
        assert isinstance(ear.error, UsageError)
        assert expected in str(ear.error)
    for error, expected in (
        (DeviceError("not finite"), "not finite"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
        (ValueError("secret text"), "internal error: ValueError"),
    ):
        engine.errors["bad"] = error
        ear = submit(batch, voice=named(voice, "bad"))
        assert ear.over.wait(10)
        assert str(ear.error).startswith(expected) or expected in str(ear.error)
        assert "secret" not in str(ear.error)
    good.append(submit(batch, LONG, voice=voice))
    for ear in good:
        assert ear.over.wait(30)
        assert ear.error is None
        np.testing.assert_array_equal(joined(ear.chunks), joined(tts.stream(LONG, voice=voice, seed=7)))
    assert not batch.failures


def test_logits_that_are_not_finite_end_their_own_request(batch, engine):
    ears = [submit(batch, "hello") for _ in range(2)]
    engine.poison = 1
    for ear in ears:
        assert ear.over.wait(30)
    assert ears[0].error is None
    assert "not finite" in str(ears[1].error)


def test_a_step_that_fails_ends_those_who_had_a_row(batch, engine):
    engine.errors["step"] = torch.OutOfMemoryError("CUDA out of memory")
    ear = submit(batch)
    assert ear.over.wait(10)
    assert "out of memory" in str(ear.error)
    engine.errors.clear()
    ear = submit(batch)
    assert ear.over.wait(20)
    assert ear.error is None


@pytest.mark.parametrize("where", ["step", "bad"])
def test_a_failed_device_is_the_end_of_all(batch, engine, voice, where):
    engine.delay = 0.01
    ears = [submit(batch, LONG, voice=named(voice, "bad")) for _ in range(4)]
    assert ears[0].began.wait(10)
    engine.errors[where] = RuntimeError("CUDA error: an illegal memory access was encountered\nmore")
    for ear in ears:
        assert ear.over.wait(10)
        assert isinstance(ear.error, GoneError)
    with pytest.raises(GoneError):
        submit(batch)
    (error,) = batch.failures
    assert isinstance(error, DeviceError)
    assert "illegal memory access" in str(error)
    assert "more" not in str(error)


def test_audio_is_cut_where_it_is_said(batch):
    ear = Ear(batch)
    batch.submit(TEXT, ear, longest=1.1, seed=7)
    assert ear.over.wait(20)
    assert len(joined(ear.chunks)) == round(1.1 * 24_000)
    assert ear.chunks[-1].timings.finish == "length"
    assert ear.error is None


def test_closing_ends_what_is_spoken_and_what_waits(batch, engine):
    engine.delay = 0.05
    ears = [submit(batch, LONG) for _ in range(5)]
    assert ears[0].began.wait(10)
    started = time.monotonic()
    batch.close()
    assert time.monotonic() - started < 1
    for ear in ears:
        assert ear.over.is_set()
        assert isinstance(ear.error, GoneError)


def test_an_iterator_that_is_closed_gives_up_its_request(batch):
    chunks = batch.stream(LONG * 5, seed=1)
    next(chunks)
    chunks.close()
    deadline = time.monotonic() + 5
    while batch.active:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    with pytest.raises(CosyqError, match="nothing to say"):
        list(batch.stream("..."))


@pytest.mark.parametrize(("kind", "sizes"), [("cpu", {1}), ("cuda", {1, 2, 4})])
def test_warming_up_takes_every_size_of_a_batch(tts, engine, kind, sizes):
    """On a GPU, where each is compiled and recorded by itself; here only what is asked for is looked at."""
    batch, seen = InFlight(cosyq.Synthesizer(tts.artifact, engine), rows=4), set()
    advance = batch._decoder.advance
    batch._decoder.advance = lambda rows, span: seen.add(rows) or advance(rows, span)
    engine.device = torch.device(kind)
    batch.warm_up("a")
    batch.close()
    assert seen == sizes


def test_a_cpu_speaks_four_at_once(tts):
    assert rows_for(tts.engine) == 4
