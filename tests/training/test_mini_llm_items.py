"""What the language model is trained on is what inference shows it."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))  # the training code is not part of the package

from training.mini.train_llm import EOS, FILL, NOT_LEARNT, SOS, TASK, in_a_row, interleaved

SYSTEM = np.array([900, 901])


def learnt(item) -> list[tuple[int, int]]:
    """(the id that is shown, the id that is to follow)"""
    return [(int(i), int(t)) for i, t in zip(item.ids, item.targets, strict=True) if t != NOT_LEARNT]


def test_text_first_then_speech():
    item = in_a_row(SYSTEM, np.array([1, 2, 3]), np.array([50, 60]))
    assert item.ids.tolist() == [SOS, 900, 901, 1, 2, 3, TASK, 50, 60]
    assert item.is_text.tolist() == [False, True, True, True, True, True, False, False, False]
    assert learnt(item) == [(TASK, 50), (50, 60), (60, EOS)]


@pytest.mark.parametrize("words", [4, 5, 7, 10])
def test_five_and_fifteen_in_turn(words):
    text, speech = np.arange(1, words + 1), np.arange(100, 100 + 4 * words)
    item = interleaved(SYSTEM, text, speech)
    ids, targets = [SOS, *SYSTEM], [NOT_LEARNT] * 3
    left_text, left_speech = text.tolist(), speech.tolist()
    while len(left_text) >= 5:  # as prepare_lm_input_target of the original lays them out
        ids += left_text[:5] + left_speech[:15]
        targets += [NOT_LEARNT] * 4 + left_speech[:15] + [FILL]
        left_text, left_speech = left_text[5:], left_speech[15:]
    ids += [*left_text, TASK, *left_speech]
    targets += [NOT_LEARNT] * len(left_text) + left_speech + [EOS]
    assert item.ids.tolist() == ids
    assert item.targets.tolist() == targets
    assert item.ids[item.is_text].tolist() == [*SYSTEM, *text]
