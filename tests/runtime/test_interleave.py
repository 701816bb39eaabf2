"""Text and speech in turns: the order of training, however the text comes, and bounds that hold."""

import random

import pytest
import torch
from conftest import relative
from hypothesis import given, settings
from hypothesis import strategies as st

from cosyq.artifact.reader import open_artifact
from cosyq.model.llm import KVCache
from cosyq.runtime.decode import follow
from cosyq.runtime.engine import TorchEngine
from cosyq.runtime.interleave import Frame, interleaved

VOCAB = 1000
SOS, TASK = ("speech", VOCAB), ("speech", VOCAB + 2)


def training_order(head, text, speech, sos=SOS, task=TASK):
    """What the original's `prepare_lm_input_target` makes of a sentence in the mixed order, written anew: inputs only.

    It goes over ceil((len(text) + 1) / 5) blocks; the last is short of five, perhaps empty, and takes the rest.
    """
    order = [sos] + [("text", i) for i in head]
    blocks = -(-(len(text) + 1) // 5)
    for j in range(blocks):
        words = [("text", i) for i in text[5 * j : 5 * j + 5]]
        if len(words) == 5:
            order += words + [("speech", i) for i in speech[15 * j : 15 * j + 15]]
        else:
            order += [*words, task] + [("speech", i) for i in speech[15 * j :]]
    return order


class Recorder:
    """A language model that writes down what it is shown."""

    class config:
        speech_vocab, sos, task_id = VOCAB, VOCAB, VOCAB + 2

    def __init__(self):
        self.seen = []

    def __call__(self, x, cache):
        self.seen += [("speech" if kind else "text", int(i)) for i, kind in x[0].tolist()]
        return x

    def embed_speech(self, ids):
        return torch.stack([ids.float(), torch.ones_like(ids).float()], dim=-1)

    def embed(self, text, speech):
        return torch.tensor([[i, 0.0] for i in text] + [[i, 1.0] for i in speech]).reshape(-1, 2)

    def logits(self, hidden):
        return hidden


class Cache:
    keys = torch.zeros(1)


def run(text, *, transcript=(), prompt=(), head=(7, 8, 9), least=2, most=20, room=10_000, stop_at=None, seed=0):
    """Returns what was seen, said, how it ended, and for each draw (drawn before, may stop, text ids taken)."""
    llm, rng, asked, taken = Recorder(), random.Random(seed), [], 0

    def arriving():
        nonlocal taken
        for token in text:
            taken += 1
            yield token

    def sampler(logits, history, may_stop):
        asked.append((len(history), may_stop, taken))
        stops = may_stop and (stop_at is None or len(history) >= stop_at)
        return rng.randrange(VOCAB, VOCAB + 200) if stops else rng.randrange(VOCAB)

    frame = Frame(list(head), list(transcript), list(prompt), longest=500, least=least, most=most, room=room)
    parts = interleaved(frame, arriving(), sos=VOCAB, task_id=VOCAB + 2)
    generator, said = follow(llm, llm.embed, parts, Cache(), sampler), []
    while True:
        try:
            said.append(next(generator))
        except StopIteration as end:
            return llm.seen, said, end.value, asked


@settings(max_examples=300, deadline=None)
@given(
    st.integers(0, 32), st.integers(0, 40), st.integers(0, 130), st.integers(0, 5), st.integers(0, 120), st.integers(0)
)
def test_the_order_is_that_of_training(words, transcript, prompt, head, more, seed):
    text, before = list(range(100, 100 + words)), list(range(300, 300 + transcript))
    spoken, first = list(range(500, 500 + prompt)), list(range(head))
    seen, said, finish, _ = run(text, transcript=before, prompt=spoken, head=first, stop_at=more, seed=seed)
    order = training_order(first, before + text, spoken + said)
    # What was cut at its greatest length never shows its last id.
    assert seen == order[: len(seen)]
    assert finish == "length" or seen == order
    assert all(0 <= token < VOCAB for token in said)


@pytest.mark.parametrize("words", [1, 4, 5, 6, 9, 10, 11, 23])
@pytest.mark.parametrize("prompt", [0, 7, 15, 16, 40, 200])
def test_everything_is_shown_when_it_ends_by_itself(words, prompt):
    text, spoken = list(range(words)), list(range(500, 500 + prompt))
    seen, said, finish, _ = run(text, transcript=[1, 2, 3], prompt=spoken)
    assert finish == "stop"
    assert seen == training_order([7, 8, 9], [1, 2, 3, *text], spoken + said)


def test_no_text_is_no_speech():
    assert run([])[1:3] == ([], "length")


@pytest.mark.parametrize(("words", "least"), [(4, 8), (5, 15), (6, 15), (14, 30), (40, 120)])
def test_it_may_end_only_after_the_text_and_the_least_length(words, least):
    """Two to a text id, and fifteen to every five of them that were spoken before the text had ended."""
    seen, said, finish, asked = run(range(words))
    assert (len(said), finish) == (least, "stop")
    assert TASK in seen
    for drawn, may_stop, taken in asked:
        assert may_stop == (taken == words and drawn >= 15 * (words // 5) and drawn >= 2 * words)


def test_the_greatest_length_and_the_room_are_kept():
    assert len(run(range(4), stop_at=10_000)[1]) == 80
    assert len(run(range(6), stop_at=10_000)[1]) == 120
    with_recording = {"transcript": range(9), "prompt": range(60)}  # which count for nothing in it
    assert len(run(range(4), stop_at=10_000, **with_recording)[1]) == 80
    assert len(run(range(4), **with_recording)[1]) == 8
    for room in (0, 7, 15, 16, 31):
        assert (len(run(range(40), room=room)[1]), run(range(40), room=room)[2]) == (room, "length")


@pytest.mark.parametrize(("transcript", "prompt", "first"), [(0, 0, 5), (3, 10, 2), (5, 15, 5), (5, 16, 5), (7, 40, 8)])
def test_it_waits_for_no_more_text_than_a_block_needs(transcript, prompt, first):
    """The prompt's speech uses up blocks; the first draw is in the block after."""
    _, _, _, asked = run(range(30), transcript=range(transcript), prompt=range(prompt))
    assert asked[0][2] == first
    for drawn, may_stop, taken in asked:
        if not may_stop and taken < 30:
            assert taken + transcript == 5 * ((prompt + drawn) // 15 + 1)


def test_a_recording_with_more_text_than_its_share_is_known():
    fits = lambda t, s: Frame([], [1] * t, [1] * s, 1, 1, 1, 1).fits()  # noqa: E731
    assert fits(0, 0)
    assert fits(5, 15)
    assert fits(5, 60)
    assert not fits(6, 15)
    assert not fits(1, 0)


@pytest.fixture(scope="module")
def engine(artifact_of):
    return TorchEngine(open_artifact(artifact_of("fp32")), "reference", torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(("words", "transcript", "prompt"), [(4, 0, 0), (5, 3, 20), (13, 4, 33), (22, 6, 70)])
def test_logits_equal_those_of_one_pass(engine, words, transcript, prompt):
    """A run through the cache against the whole sequence, in the order of training, at once."""
    c, rng = engine.config.llm, random.Random(words)
    text, before, head = ([rng.randrange(500) for _ in range(n)] for n in (words, transcript, 6))
    spoken = [rng.randrange(c.speech_vocab) for _ in range(prompt)]
    frame = Frame(head, before, spoken, longest=words, least=2, most=20, room=200)
    drawn, sampler = [], engine._sampler(200, torch.Generator().manual_seed(5))

    def recording(logits, history, may_stop):
        drawn.append(logits.clone())
        return sampler(logits, history, may_stop)

    cache = KVCache.empty(c, frame.positions + frame.room, device=torch.device("cpu"), dtype=torch.float32)
    parts = interleaved(frame, iter(text), sos=c.sos, task_id=c.task_id)
    said = list(follow(engine.llm, engine.embed, parts, cache, recording))
    assert len(said) > 3 * words

    special = {"sos": c.sos, "task": c.task_id}
    order = training_order(head, before + text, spoken + said, *(("special", name) for name in special))
    rows = [engine.embed([i], []) if kind == "text" else engine.embed([], [special.get(i, i)]) for kind, i in order]
    whole = KVCache.empty(c, len(rows), device=torch.device("cpu"), dtype=torch.float32)
    with torch.inference_mode():
        hidden = engine.llm(torch.cat(rows).unsqueeze(0), whole)
        logits = engine.llm.logits(hidden)[0]
    # Each new id is drawn from the logits of the place before it, the end from those of the last place.
    places = [place - 1 for place, (kind, _) in enumerate(order) if kind == "speech"][prompt:]
    expected = torch.cat([logits[places], logits[-1:]])[: len(drawn)]
    assert len(drawn) >= len(said)
    assert relative(torch.stack(drawn), expected) < 5e-6


def test_the_writer_of_the_text_is_not_in_inference_mode(engine):
    modes = []

    def text():
        for token in range(12):
            modes.append(torch.is_inference_mode_enabled())
            yield token

    frame = Frame([1], [], [], longest=12, least=2, most=20, room=100)
    parts = interleaved(frame, text(), sos=engine.config.llm.sos, task_id=engine.config.llm.task_id)
    tokens = engine.speech_tokens(
        parts, positions=frame.positions, room=frame.room, generator=torch.Generator().manual_seed(1)
    )
    assert len(list(tokens)) > 30
    assert modes == [False] * 12
