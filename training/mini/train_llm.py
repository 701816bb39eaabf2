"""Train the language model on `[sos] text [task_id] speech [eos]`, half of it behind a prompt of the same speaker.

A share is interleaved, five text ids and fifteen speech ids in turn, as for text that arrives while it is spoken.

python -m training.mini.train_llm --work DIR --checkpoints DIR --seconds 400
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from cosyq.text.prompt import SYSTEM
from cosyq.text.tokenizer import END_OF_PROMPT
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
RESPELT = 0.3  # of the texts are cut into other ids than inference would,
MERGES_LEFT_OUT = 0.1  # with this share of the merges left out: spelling is to be read, not only whole words
LOADERS = 4  # processes that put batches together for a GPU
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


class Items(IterableDataset[tuple[Tensor, ...]]):
    """Endless batches of training sequences: ids, is_text and targets, each [positions // t, t] for a t of LENGTHS."""

    def __init__(self, corpus: Corpus, text_tokenizer: Path, positions: int):
        self.text_tokenizer, self.positions = text_tokenizer, positions
        tokenizer = read_text_tokenizer(text_tokenizer)
        self.system = np.array(tokenizer.encode(SYSTEM + END_OF_PROMPT), np.int64)
        self.texts = corpus.texts
        self.spelt = [np.array(tokenizer.encode(text), np.int64) for text in corpus.texts]
        ends = corpus.lengths.cumsum() // SAMPLES_PER_TOKEN
        self.speech = np.split(corpus.tokens.astype(np.int64), ends[:-1])
        self.speakers: list[int] = corpus.speakers.tolist()
        self.seen = range(min(UNSEEN, len(corpus) // 10), len(corpus))
        self.prompts: dict[int, list[int]] = defaultdict(list)
        for utterance in self.seen:
            if len(self.speech[utterance]) <= LONGEST_PROMPT:
                self.prompts[self.speakers[utterance]].append(utterance)

    def item(self, utterance: int) -> Item:
        text, speech = self.spelling(utterance), self.speech[utterance]
        prompts = self.prompts[self.speakers[utterance]]
        if self.random.random() < PROMPTED and prompts:
            prompt = prompts[self.random.integers(len(prompts))]
            text = np.concatenate([self.spelling(prompt), text])
            speech = np.concatenate([self.speech[prompt], speech])
        enough = len(speech) * TEXT_TURN > len(text) * SPEECH_TURN
        arrange = interleaved if enough and self.random.random() < INTERLEAVED else in_a_row
        return arrange(self.system, text, speech)

    def spelling(self, utterance: int) -> Ids:
        if self.random.random() < RESPELT:
            return np.array(self.respelling.encode(self.texts[utterance]), np.int64)
        return self.spelt[utterance]

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        self.random = np.random.default_rng()  # of its own in every loader
        self.respelling = read_text_tokenizer(self.text_tokenizer, MERGES_LEFT_OUT)
        waiting: dict[int, list[Item]] = {length: [] for length in LENGTHS}
        while True:
            for utterance in self.random.permutation(self.seen):
                item = self.item(int(utterance))
                length = next((length for length in LENGTHS if length >= len(item.ids)), None)
                if length is None:
                    continue
                group = waiting[length]
                group.append(item)
                if len(group) >= max(self.positions // length, 1):
                    yield padded(group, length)
                    waiting[length] = []

    def unseen(self) -> tuple[Tensor, ...]:
        """Utterances that are never trained on."""
        items = [in_a_row(self.system, self.spelt[u], self.speech[u]) for u in range(self.seen.start)]
        return padded(items, max(len(item.ids) for item in items))


def padded(items: list[Item], length: int) -> tuple[Tensor, ...]:
    ids = np.full((len(items), length), EOS, np.int64)
    is_text = np.zeros((len(items), length), bool)
    targets = np.full((len(items), length), NOT_LEARNT, np.int64)
    for row, item in enumerate(items):
        n = len(item.ids)
        ids[row, :n], is_text[row, :n], targets[row, :n] = item.ids, item.is_text, item.targets
    return tuple(torch.from_numpy(a) for a in (ids, is_text, targets))


def batch_loss(network: SpeechLM, ids: Tensor, is_text: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy of what is to be learnt, and the share of it that the model would have chosen."""
    if network.training:
        wrong = (torch.rand(ids.shape, device=ids.device) < MISHEARD) & ~is_text & (ids < SOS)
        ids = torch.where(wrong, torch.randint_like(ids, SOS), ids)
    hidden = network(ids, is_text).flatten(0, 1)
    return next_id_loss(hidden, network.llm_decoder.weight, targets.flatten())


def next_id_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """hidden [n, h], weight [rows, h], targets [n]. The product's rows are padded to what a GPU multiplies fast."""
    rows = len(weight)
    logits = F.linear(hidden, F.pad(weight, (0, 0, 0, -rows % 64)))[:, :rows].float()
    learnt = targets != NOT_LEARNT
    right = ((logits.argmax(-1) == targets) & learnt).sum() / learnt.sum()
    return F.cross_entropy(logits, targets, ignore_index=NOT_LEARNT), right


def compile_parts(network: SpeechLM) -> None:
    """Fuse what lies between the products, which is most of a step; one variant for every shape."""
    global next_id_loss
    torch._dynamo.config.recompile_limit = 64
    for layer in network.backbone.layers:
        layer.compile(dynamic=True)
    next_id_loss = torch.compile(next_id_loss, dynamic=True)


def main() -> None:
    args = stage_arguments(__doc__)
    corpus = Corpus(folders(args), torch.device("cpu"))
    items = Items(corpus, folders(args).text_tokenizer, int(POSITIONS_PER_BATCH * args.batch_scale))
    gpu = torch.cuda.is_available()
    batches = iter(DataLoader(items, batch_size=None, num_workers=LOADERS if gpu else 0))
    device = pick_device()
    network = SpeechLM(MINI.llm, DROPOUT).to(device)
    stage = Stage("llm", network, args, rate=2e-3, warm=0.08)  # compiling spends some of it
    unseen = [tensor.to(device) for tensor in items.unseen()]
    if gpu:
        compile_parts(network)

    def step(*batch: Tensor) -> None:
        with mixed(device):
            loss, right = batch_loss(network, *batch)
        stage.descend(loss, right=right)

    for number in stage.steps():
        batch = next(batches)
        if gpu:  # here, not in a thread of the loader's: while a graph is recorded no other may ask for memory
            batch = [tensor.pin_memory().to(device, non_blocking=True) for tensor in batch]
        stage.replay("batch", step, *batch)
        if number % UNSEEN_EVERY == UNSEEN_EVERY - 1:
            network.eval()
            with torch.no_grad(), mixed(device), torch.compiler.set_stance("force_eager"):
                loss, right = batch_loss(network, *unseen)
            network.train()
            print(f"llm: unseen loss {loss:.3f}, right {right:.3f}", flush=True)


if __name__ == "__main__":
    main()
