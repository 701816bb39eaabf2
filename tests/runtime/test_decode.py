from itertools import islice, pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from cosyq.checkpoint.describe import SILENT_TOKENS
from cosyq.runtime.decode import LONGEST_SILENCE, Silence, decode
from cosyq.runtime.schedule import Growth, chunk_ends, shown_prompt


class Scripted:
    """A language model that says what it is told: its logits are the number of the step."""

    class config:
        speech_vocab = 100

    def __call__(self, x, cache):
        return x

    def embed_speech(self, ids):
        return ids[..., None].float()

    def logits(self, hidden):
        return hidden


class Cache:
    keys = torch.zeros(1)


def run(script, minimum=0, maximum=50):
    asked = []

    def sampler(logits, history, may_stop):
        asked.append((float(logits), may_stop))
        return script[len(history)]

    tokens, generator = [], decode(Scripted(), torch.zeros(1, 3, 1), Cache(), sampler, minimum=minimum, maximum=maximum)
    while True:
        try:
            tokens.append(next(generator))
        except StopIteration as end:
            return tokens, end.value, asked


def test_every_id_above_the_codes_stops():
    for stop in (100, 101, 164, 299):
        assert run([5, 6, stop, 7])[:2] == ([5, 6], "stop")


def test_the_longest_speech_is_cut_and_said_so():
    assert run([5] * 60, maximum=4)[:2] == ([5] * 4, "length")


def test_each_step_gets_the_token_before_it_and_may_stop_only_after_the_minimum():
    tokens, _, asked = run([5, 6, 7, 100], minimum=2)
    assert tokens == [5, 6, 7]
    assert asked == [(0, False), (5, False), (6, True), (7, True)]


@given(st.lists(st.sampled_from([1, 2, 28, 4000, 5000]), max_size=60))
def test_silence_is_shortened_and_nothing_else(tokens):
    kept = list(filter(Silence(SILENT_TOKENS).lets_through, tokens))
    assert [t for t in kept if t not in SILENT_TOKENS] == [t for t in tokens if t not in SILENT_TOKENS]
    run_length = longest = 0
    for token in kept:
        run_length = run_length + 1 if token in SILENT_TOKENS else 0
        longest = max(longest, run_length)
    assert longest <= LONGEST_SILENCE
    if kept != tokens:
        assert longest == LONGEST_SILENCE


@given(st.integers(0, 800), st.sampled_from([25, 10]))
def test_chunks_end_where_blocks_end(prompt, block):
    growth = Growth(3, 5)
    ends = list(islice(chunk_ends(prompt, block, growth), 6))
    assert all((prompt + end) % block == 0 for end in ends)
    assert 0 < ends[0] <= block
    shown = shown_prompt(prompt, block)
    assert 0 <= prompt - shown < block
    first = next(chunk_ends(shown, block, growth))
    assert first == 2 * block // 5 or (prompt < block and first == block - prompt)
    steps = [b - a for a, b in pairwise(ends)]
    assert steps == [block, 3 * block, 5 * block, 5 * block, 5 * block]
