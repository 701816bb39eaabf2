"""A corpus of ids is made in parts, joined, and trained on."""

from __future__ import annotations

import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # the training code is not part of the package

from training.mini import parts
from training.mini.config import SAMPLES_PER_TOKEN, Folders
from training.mini.corpus import Corpus
from training.mini.layout import read_text_tokenizer
from training.mini.train_llm import SOS, Items, next_id_loss

TOKENIZER = Path(__file__).parents[2] / "training/mini/model/CosyVoice-BlankEN"


@pytest.fixture
def folder(tmp_path) -> Folders:
    return Folders(tmp_path / "work", tmp_path)


def part(*words: str) -> parts.Part:
    """Every word is said as its own length, as many times."""
    speech = [np.full(len(word), len(word), np.int16) for word in words]
    return parts.Part(list(words), [len(word) % 5 for word in words], speech)


def save(path: Path, made: parts.Part) -> None:
    np.savez_compressed(
        path,
        texts=np.array(made.texts),
        speakers=np.array(made.speakers),
        counts=np.array([len(ids) for ids in made.speech]),
        tokens=np.concatenate(made.speech),
    )


def test_joined_parts_are_a_corpus(folder, tmp_path):
    save(tmp_path / parts.name(0), part("one", "three"))
    save(tmp_path / parts.name(4000), part("eleven", "seventeen"))
    parts.join(map(parts.read, parts.finished(tmp_path)), folder)
    corpus = Corpus(folder, torch.device("cpu"))
    assert sorted(corpus.texts) == ["eleven", "one", "seventeen", "three"]
    assert corpus.texts != ["one", "three", "eleven", "seventeen"], "shuffled: the first ones are not trained on"
    for text, speaker, begin, length in zip(corpus.texts, corpus.speakers, corpus.begins, corpus.lengths, strict=True):
        row = corpus.tokens[begin // SAMPLES_PER_TOKEN : (begin + length) // SAMPLES_PER_TOKEN]
        assert row.tolist() == [len(text)] * len(text)
        assert speaker == len(text) % 5


def test_a_part_is_what_was_read_and_is_not_made_twice(tmp_path, monkeypatch):
    calls = []

    def generate(folders, texts, seconds, processes, *, first):
        calls.append(first)
        samples = SAMPLES_PER_TOKEN * np.array([2, 3])
        np.zeros(samples.sum(), np.int16).tofile(folders.waves)
        np.savez(folders.index, lengths=samples, speakers=np.array([4, 1]), texts=np.array(texts))

    monkeypatch.setattr(parts, "generate", generate)
    monkeypatch.setattr(parts, "load_encoders", lambda folders, device: (None, None))
    monkeypatch.setattr(parts, "speech_ids", lambda corpus, tokenizer: np.array([9, 9, 6560, 8, 8], np.int32))
    for _ in range(2):
        parts.make((8000, ["A.", "B."]), tmp_path, tmp_path)
    made = parts.read(tmp_path / "008000.npz")
    assert (made.texts, made.speakers) == (["A.", "B."], [4, 1])
    assert [ids.tolist() for ids in made.speech] == [[9, 9], [6560, 8, 8]]
    assert calls == [parts.FIRST + 8000]
    assert [path.name for path in tmp_path.iterdir()] == ["008000.npz"], "the waves are gone"


def test_what_is_unseen_is_not_trained_on(folder):
    parts.join([part(*["a"] * 20, *["bb"] * 20)], folder)
    corpus = Corpus(folder, torch.device("cpu"))
    items = Items(corpus, TOKENIZER, 960)
    items.speech[:4] = [np.full(6, 6)] * 4

    def said(ids, is_text, targets) -> set[int]:
        return set(ids[~is_text & (ids < SOS)].tolist())

    assert set().union(*(said(*batch) for batch in islice(items, 30))) == {1, 2}
    assert said(*items.unseen()) == {6}


def test_texts_are_spelt_in_many_ways(folder):
    text = "Extraordinary lighthouses illuminate mountainous, uninhabited neighbourhoods."
    parts.join([part(text)], folder)
    items = Items(Corpus(folder, torch.device("cpu")), TOKENIZER, 96)
    next(iter(items))
    usual = read_text_tokenizer(TOKENIZER)
    spelt = [items.spelling(0).tolist() for _ in range(100)]
    assert {usual._tokenizer.decode(ids) for ids in spelt} == {text}
    assert 40 < spelt.count(usual.encode(text)) < 100, "most as inference does it"
    assert len(set(map(tuple, spelt))) > 2


def test_the_product_may_be_padded():
    torch.manual_seed(0)
    hidden, weight = torch.randn(7, 16), torch.randn(101, 16)
    targets = torch.tensor([3, -100, 100, 0, 5, -100, 7])
    logits = hidden @ weight.T
    targets[0] = logits[0].argmax()
    loss, right = next_id_loss(hidden, weight, targets)
    assert float(loss) == pytest.approx(float(torch.nn.functional.cross_entropy(logits, targets)), rel=1e-5)
    learnt = targets >= 0
    assert float(right) == pytest.approx(float((logits.argmax(-1) == targets)[learnt].float().mean()))
