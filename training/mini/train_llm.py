"""Train the language model on `[sos] text [task_id] speech [eos]`, half of it behind a prompt of the same speaker.

A share is interleaved, five text ids and fifteen speech ids in turn, as for text that arrives while it is spoken.

python -m training.mini.train_llm --work DIR --checkpoints DIR --seconds 400
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from cosyq.text.prompt import SYSTEM
from cosyq.text.tokenizer import END_OF_PROMPT, TextTokenizer
from training.mini.config import MINI, SAMPLES_PER_TOKEN
from training.mini.corpus import Corpus
from training.mini.layout import read_text_tokenizer
from training.mini.loop import Stage, folders, mixed, pick_device, stage_arguments
from training.mini.networks.llm import SpeechLM

POSITIONS_PER_BATCH = 32_768
LENGTHS = (96, 128, 160, 192, 224, 256, 320, 384, 448, 512, 640, 768)  # what sequences are padded to
LONGEST_PROMPT = 150  # tokens
PROMPTED = 0.5
INTERLEAVED = 0.2
TEXT_TURN, SPEECH_TURN = 5, 15
MISHEARD = 0.04  # of the speech tokens shown are wrong, as the model's own will be
DROPOUT = 0.1
UNSEEN = 300  # utterances that are not trained on, to see whether the model learns or remembers
UNSEEN_EVERY = 1000  # steps
NOT_LEARNT = -100

Ids = NDArray[np.int64]
SOS, EOS, TASK, FILL = (MINI.llm.sos + i for i in range(4))


@dataclass(frozen=True)
class Item:
    """What is shown, [t]; which of it is text; and what is to be said next, NOT_LEARNT where nothing is."""

    ids: Ids
    is_text: NDArray[np.bool_]
    targets: Ids


def turns(parts: Iterable[tuple[Ids, Ids, int]]) -> Item:
    """An item of (text, speech behind it, what is said after that speech) in turn; [sos] belongs to the first text.

    The speech is predicted from the last id of the text on.
    """
    ids, is_text, targets = [], [], []
    for text, speech, then in parts:
        ids += [text, speech]
        is_text += [text < SOS, np.zeros(len(speech), bool)]
        targets += [np.full(len(text) - 1, NOT_LEARNT), speech, [then]]
    return Item(np.concatenate(ids), np.concatenate(is_text), np.concatenate(targets))


def in_a_row(system: Ids, text: Ids, speech: Ids) -> Item:
    return turns([(np.concatenate([[SOS], system, text, [TASK]]), speech, EOS)])


def interleaved(system: Ids, text: Ids, speech: Ids) -> Item:
    """The system line first, then turns; the last has the rest of the text, fewer than five ids, and of the speech.

    There must be more than three times as many speech ids as text ids.
    """
    whole = len(text) // TEXT_TURN
    parts = [
        (text[i * TEXT_TURN : (i + 1) * TEXT_TURN], speech[i * SPEECH_TURN : (i + 1) * SPEECH_TURN], FILL)
        for i in range(whole)
    ]
    parts.append((np.concatenate([text[whole * TEXT_TURN :], [TASK]]), speech[whole * SPEECH_TURN :], EOS))
    first, *others = parts
    return turns([(np.concatenate([[SOS], system, first[0]]), *first[1:]), *others])


class Items:
    """Endless training sequences over the corpus."""

    def __init__(self, corpus: Corpus, tokenizer: TextTokenizer):
        self.system = np.array(tokenizer.encode(SYSTEM + END_OF_PROMPT), np.int64)
        self.texts = [np.array(tokenizer.encode(text), np.int64) for text in corpus.texts]
        ends = (corpus.begins + corpus.lengths) // SAMPLES_PER_TOKEN
        begins = corpus.begins // SAMPLES_PER_TOKEN
        tokens = corpus.tokens.astype(np.int64)
        self.speech = [tokens[b:e] for b, e in zip(begins, ends, strict=True)]
        self.speakers = corpus.speakers
        self.seen = range(min(UNSEEN, len(self.texts) // 10), len(self.texts))
        self.prompts: dict[int, list[int]] = defaultdict(list)
        for utterance in self.seen:
            if len(self.speech[utterance]) <= LONGEST_PROMPT:
                self.prompts[int(self.speakers[utterance])].append(utterance)
        self.random = np.random.default_rng()

    def item(self, utterance: int) -> Item:
        text, speech = self.texts[utterance], self.speech[utterance]
        prompts = self.prompts[int(self.speakers[utterance])]
        if self.random.random() < PROMPTED and prompts:
            prompt = prompts[self.random.integers(len(prompts))]
            text = np.concatenate([self.texts[prompt], text])
            speech = np.concatenate([self.speech[prompt], speech])
        enough = len(speech) * TEXT_TURN > len(text) * SPEECH_TURN
        arrange = interleaved if enough and self.random.random() < INTERLEAVED else in_a_row
        return arrange(self.system, text, speech)

    def batches(self, positions: int) -> Iterator[tuple[Tensor, ...]]:
        """ids, is_text and targets, each [positions // t, t] for a t of LENGTHS."""
        waiting: dict[int, list[Item]] = {length: [] for length in LENGTHS}
        while True:
            for utterance in self.random.permutation(self.seen):
                item = self.item(int(utterance))
                length = next((length for length in LENGTHS if length >= len(item.ids)), None)
                if length is None:
                    continue
                group = waiting[length]
                group.append(item)
                if len(group) >= max(positions // length, 1):
                    yield padded(group, length)
                    waiting[length] = []

    def unseen(self) -> tuple[Tensor, ...]:
        items = [in_a_row(self.system, self.texts[u], self.speech[u]) for u in range(self.seen.start)]
        return padded(items, max(len(item.ids) for item in items))


def padded(items: list[Item], length: int) -> tuple[Tensor, ...]:
    ids = np.full((len(items), length), EOS, np.int64)
    is_text = np.zeros((len(items), length), bool)
    targets = np.full((len(items), length), NOT_LEARNT, np.int64)
    for row, item in enumerate(items):
        n = len(item.ids)
        ids[row, :n], is_text[row, :n], targets[row, :n] = item.ids, item.is_text, item.targets
    tensors = tuple(torch.from_numpy(a) for a in (ids, is_text, targets))
    return tuple(t.pin_memory() for t in tensors) if torch.cuda.is_available() else tensors


def batch_loss(network: SpeechLM, ids: Tensor, is_text: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy of what is to be learnt, and the share of it that the model would have chosen."""
    if network.training:
        wrong = (torch.rand(ids.shape, device=ids.device) < MISHEARD) & ~is_text & (ids < SOS)
        ids = torch.where(wrong, torch.randint_like(ids, SOS), ids)
    logits = network.llm_decoder(network(ids, is_text)).float().flatten(0, 1)
    wanted = targets.flatten()
    right = ((logits.argmax(-1) == wanted) & (wanted >= 0)).sum() / (wanted >= 0).sum()
    return F.cross_entropy(logits, wanted, ignore_index=NOT_LEARNT), right


def main() -> None:
    args = stage_arguments(__doc__)
    device = pick_device()
    corpus = Corpus(folders(args), torch.device("cpu"))
    items = Items(corpus, read_text_tokenizer(folders(args).text_tokenizer))
    network = SpeechLM(MINI.llm, DROPOUT).to(device)
    stage = Stage("llm", network, args, rate=2e-3)
    batches = items.batches(int(POSITIONS_PER_BATCH * args.batch_scale))
    unseen = [tensor.to(device) for tensor in items.unseen()]

    def step(*batch: Tensor) -> None:
        with mixed(device):
            loss, right = batch_loss(network, *batch)
        stage.descend(loss, right=right)

    for number in stage.steps():
        batch = [tensor.to(device, non_blocking=True) for tensor in next(batches)]
        stage.replay("batch", step, *batch)
        if number % UNSEEN_EVERY == UNSEEN_EVERY - 1:
            network.eval()
            with torch.no_grad(), mixed(device):
                loss, right = batch_loss(network, *unseen)
            network.train()
            print(f"llm: unseen loss {loss:.3f}, right {right:.3f}", flush=True)


if __name__ == "__main__":
    main()
