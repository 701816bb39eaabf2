"""Rows of a batch say what they would say alone, whenever they join and whoever is beside them."""

import random
from dataclasses import replace

import pytest
import torch

import cosyq
from cosyq.errors import DeviceError
from cosyq.runtime.batch import BatchDecoder, follow_alone
from cosyq.runtime.batch_sampling import sample_rows
from cosyq.runtime.decode import decode, prefill
from cosyq.runtime.forward import TorchForward
from cosyq.runtime.interleave import Frame, interleaved, whole

LONGEST, CAPACITY = 40, 128


@pytest.fixture(scope="module")
def engine(artifact_of):
    return cosyq.load(artifact_of("int8"), device="cpu", dtype="fp32", engine="unpacked").engine


def prompts(engine, count: int) -> list[torch.Tensor]:
    draw = random.Random(count)
    return [
        engine.embed(
            [draw.randrange(200) for _ in range(draw.randint(1, 30))],
            [draw.randrange(engine.config.llm.speech_vocab) for _ in range(draw.choice((0, 5, 40)))],
        )[None]
        for _ in range(count)
    ]


def decoder(engine, rows: int, *, burst: int = 1, **sampling) -> BatchDecoder:
    config = replace(engine.config.sampling, **sampling)
    forward = TorchForward(engine.llm, rows=rows, capacity=CAPACITY)
    return BatchDecoder(forward, config, longest=LONGEST, burst=burst)


def run_alone(engine, prompt, seed, *, minimum=5, maximum=LONGEST, **sampling):
    batch = decoder(engine, 1, **sampling)
    row = batch.join(prompt, minimum=minimum, maximum=maximum, generator=torch.Generator().manual_seed(seed))
    tokens, finish = [], None
    while finish is None:
        batch.step()
        news = batch.news()[row]
        tokens, finish = tokens + news.tokens, news.finish
    return tokens, finish


def test_the_likeliest_ids_are_the_reference_decoders(engine):
    """With one id to choose from, nothing is left to chance, and both loops must agree."""
    for index, prompt in enumerate(prompts(engine, 4)):
        cache = engine._cache(prompt.shape[1] + LONGEST)

        def likeliest(logits, history, may_stop):
            return int(logits[: None if may_stop else engine.config.llm.speech_vocab].argmax())

        expected = list(decode(engine.llm, prompt, cache, likeliest, minimum=3, maximum=20 + index))
        found = run_alone(engine, prompt, 0, minimum=3, maximum=20 + index, top_k=1, tau_r=2.0)
        assert found[0] == expected


def test_history_is_the_last_ids_of_this_utterance(engine):
    """Three likeliest ids only, so that most draws repeat one: against the plain loop with the same random numbers."""
    sampling = replace(engine.config.sampling, top_k=3, tau_r=0.1)
    batch = decoder(engine, 1, top_k=3, tau_r=0.1)
    for seed, prompt in enumerate(prompts(engine, 1) * 6):  # one after the other in the same row
        uniform = torch.rand(LONGEST, 2, generator=torch.Generator().manual_seed(seed))

        def plain(logits, history, may_stop, uniform=uniform):
            recent = torch.full((1, sampling.win_size), -1)
            last = torch.tensor(history[-sampling.win_size :], dtype=torch.int64)
            recent[0, : len(last)] = last
            stop, turn = engine.config.llm.speech_vocab, len(history)
            drawn = sample_rows(
                logits[None], recent, uniform[turn : turn + 1], sampling,
                forbidden=torch.tensor([not may_stop]), forbid_from=stop,
            )  # fmt: skip
            return int(drawn)

        cache = engine._cache(prompt.shape[1] + LONGEST)
        expected = list(decode(engine.llm, prompt, cache, plain, minimum=LONGEST, maximum=LONGEST))
        generator = torch.Generator().manual_seed(seed)
        row = batch.join(prompt, minimum=LONGEST, maximum=LONGEST, generator=generator)
        for _ in range(LONGEST):
            batch.step()
        assert batch.news()[row].tokens == expected
        batch.leave(row)


@pytest.mark.parametrize(("order", "burst"), [(0, 1), (1, 1), (2, 3), (3, 4)])
def test_rows_join_and_leave_without_a_trace(engine, order, burst):
    """Eight utterances over three rows, at random times, one given up half-way: each as it would be alone."""
    draw, texts = random.Random(order), prompts(engine, 8)
    alone = [run_alone(engine, prompt, seed) for seed, prompt in enumerate(texts)]
    batch, waiting = decoder(engine, 3, burst=burst), list(range(8))
    draw.shuffle(waiting)
    given_up = waiting[2]
    rows: dict[int, int] = {}
    said: dict[int, list[int]] = {utterance: [] for utterance in waiting}
    ended = {}
    while waiting or rows:
        while waiting and batch.free and draw.random() < 0.7:
            utterance = waiting.pop()
            generator = torch.Generator().manual_seed(utterance)
            rows[batch.join(texts[utterance], minimum=5, maximum=LONGEST, generator=generator)] = utterance
        for _ in range(draw.randint(1, 4)):
            batch.step()
        for row, news in batch.news().items():
            utterance = rows[row]
            said[utterance] += news.tokens
            if news.finish or (utterance == given_up and said[utterance]):
                ended[utterance] = news.finish
                batch.leave(row)
                del rows[row]
    for utterance, (tokens, finish) in enumerate(alone):
        if utterance != given_up:
            assert (said[utterance], ended[utterance]) == (tokens, finish)
    assert said[given_up] == alone[given_up][0][: len(said[given_up])]


def test_bounds_hold(engine):
    (prompt,) = prompts(engine, 1)
    for seed in range(6):
        tokens, finish = run_alone(engine, prompt, seed, minimum=8, maximum=12)
        assert 8 <= len(tokens) <= 12
        assert finish == ("length" if len(tokens) == 12 else "stop")
        assert max(tokens) < engine.config.llm.speech_vocab
    batch = decoder(engine, 1)
    generator = torch.Generator()
    with pytest.raises(ValueError, match="do not fit a row"):
        batch.join(prompt, minimum=0, maximum=LONGEST + 1, generator=generator)
    batch.join(prompt, minimum=0, maximum=LONGEST, generator=generator)
    with pytest.raises(ValueError, match="every row is taken"):
        batch.join(prompt, minimum=0, maximum=LONGEST, generator=generator)


def test_a_row_that_is_not_finite_says_so_and_its_neighbour_goes_on(engine):
    one, other = prompts(engine, 2)
    batch = decoder(engine, 2)
    rows = [
        batch.join(p, minimum=5, maximum=LONGEST, generator=torch.Generator().manual_seed(s))
        for s, p in enumerate((one, other))
    ]
    batch.prefill()
    batch.logits[rows[0]] = torch.nan
    for _ in range(3):
        batch.step()
    news = batch.news()
    assert isinstance(news[rows[0]].error, DeviceError)
    assert news[rows[1]].error is None
    assert news[rows[1]].tokens == run_alone(engine, other, 1)[0][:3]


def test_an_utterance_goes_on_after_more_was_shown(engine):
    """Parts of it shown in turns, a neighbour beside it: the ids of a plain loop over the same positions."""
    one, other, first, second = prompts(engine, 4)
    uniform = torch.rand(30, 2, generator=torch.Generator().manual_seed(3))
    cache, config = engine._cache(CAPACITY), replace(engine.config.sampling, top_k=4)
    stop, expected, shown = engine.config.llm.speech_vocab, [], one
    for more, maximum in ((first[:, :4], 6), (second[:, :3], 7), (None, 30)):
        while len(expected) < maximum:
            logits = prefill(engine.llm, shown, cache)
            recent = torch.full((1, config.win_size), -1)
            last = torch.tensor(expected[-config.win_size :], dtype=torch.int64)
            recent[0, : len(last)] = last
            turn = uniform[len(expected) :][:1]
            ids = sample_rows(
                logits[None], recent, turn, config, forbidden=torch.tensor([True]), forbid_from=stop
            )  # fmt: skip
            expected.append(int(ids))
            shown = engine.llm.embed_speech(ids[None])
        if more is not None:
            shown = torch.cat([shown, more], dim=1)
    batch = decoder(engine, 2, top_k=4)
    neighbour = batch.join(other, minimum=40, maximum=40, generator=torch.Generator())
    row = batch.join(one, minimum=6, maximum=6, generator=torch.Generator().manual_seed(3), room=30)
    with pytest.raises(ValueError, match="not come to its end"):
        batch.extend(row, first, minimum=7, maximum=7)
    found = []
    for more, maximum in ((first[:, :4], 7), (second[:, :3], 30), (None, 0)):
        finish = None
        while finish is None:
            batch.step()
            news = batch.news()[row]
            found, finish = found + news.tokens, news.finish
        assert finish == "length"
        if more is not None:
            last = engine.llm.embed_speech(torch.tensor([[found[-1]]]))
            batch.extend(row, torch.cat([last, more], dim=1), minimum=maximum, maximum=maximum)
    assert found == expected
    batch.leave(neighbour)


def test_what_was_drawn_before_a_row_changed_hands_is_not_the_newcomers(engine):
    one, other = prompts(engine, 2)
    batch = decoder(engine, 1)
    for seed, prompt in enumerate((one, other)):
        row = batch.join(prompt, minimum=9, maximum=LONGEST, generator=torch.Generator().manual_seed(seed))
        for _ in range(4):
            batch.step()
        if prompt is one:
            batch.leave(row)
    assert batch.news()[row].tokens == run_alone(engine, other, 1, minimum=9)[0][:4]


def test_prompts_wait_for_the_next_step_and_run_together(engine, monkeypatch):
    """Of three that join, the one that leaves before the step is not run."""
    texts = prompts(engine, 3)
    batch, calls = decoder(engine, 3), []
    inner = batch.forward.prefill
    monkeypatch.setattr(batch.forward, "prefill", lambda shown: calls.append([p.row for p in shown]) or inner(shown))
    for seed, prompt in enumerate(texts):
        batch.join(prompt, minimum=9, maximum=LONGEST, generator=torch.Generator().manual_seed(seed))
    batch.leave(0)
    assert not calls
    for _ in range(3):
        batch.step()
    assert calls == [[1, 2]]
    news = batch.news()
    for row in (1, 2):
        assert news[row].tokens == run_alone(engine, texts[row], row, minimum=9)[0][:3]


def test_a_row_that_finds_no_room_is_nobodys(engine, monkeypatch):
    one, other = prompts(engine, 2)
    batch = decoder(engine, 2)
    bounds = {"minimum": 9, "maximum": LONGEST}
    row = batch.join(one, **bounds, generator=torch.Generator().manual_seed(0))

    def full(row, positions):
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(batch.forward, "reserve", full)
        with pytest.raises(torch.OutOfMemoryError):
            batch.join(other, **bounds, generator=torch.Generator().manual_seed(1))
    assert batch.free == {1}
    batch.step()
    assert batch.news()[row].tokens == run_alone(engine, one, 0, minimum=9)[0][:1]


@pytest.mark.parametrize("arriving", [False, True])
def test_a_row_alone_says_what_the_plain_loop_says(engine, arriving):
    """With the same random numbers, for a text that is there and for one shown in parts."""
    c, draw = engine.config.llm, random.Random(7)
    text, prompt = [draw.randrange(500) for _ in range(12)], [draw.randrange(c.speech_vocab) for _ in range(20)]
    if arriving:
        frame = Frame([3, 4], [5, 6], prompt, longest=12, least=2, most=20, room=80)
        parts = list(interleaved(frame, iter(text), sos=c.sos, task_id=c.task_id))
    else:
        parts = [whole(text, prompt, minimum=24, maximum=80, sos=c.sos, task_id=c.task_id)]
    for seed in range(3):
        plain = engine.speech_tokens(parts, positions=60, room=80, generator=torch.Generator().manual_seed(seed))
        alone = follow_alone(
            engine.decoder(1, positions=60, room=80),
            engine.embed,
            parts,
            room=80,
            generator=torch.Generator().manual_seed(seed),
        )
        tokens = list(plain)
        assert len(tokens) >= 24
        assert list(alone) == tokens
