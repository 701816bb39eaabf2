"""Train the language model on `[sos] text [task_id] speech [eos]`, half of it behind a prompt of the same speaker.

python -m training.mini.train_llm --work DIR --checkpoints DIR --seconds 400
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
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
POOL = 2048  # items that are sorted by length together
LONGEST_PROMPT = 150  # tokens
MISHEARD = 0.04  # of the speech tokens shown are wrong, as the model's own will be
DROPOUT = 0.1

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Item:
    """ids and which of them are text; what is learnt are the speech ids after the text, `eos` last."""

    ids: Ids
    text: int  # positions 1 .. text are text


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
        self.prompts: dict[int, list[int]] = defaultdict(list)
        for utterance, speaker in enumerate(self.speakers):
            if len(self.speech[utterance]) <= LONGEST_PROMPT:
                self.prompts[int(speaker)].append(utterance)
        self.random = np.random.default_rng()

    def item(self, utterance: int) -> Item:
        c = MINI.llm
        texts, speech = [self.system, self.texts[utterance]], [self.speech[utterance]]
        prompts = self.prompts[int(self.speakers[utterance])]
        if self.random.random() < 0.5 and prompts:
            prompt = prompts[self.random.integers(len(prompts))]
            texts.insert(1, self.texts[prompt])
            speech.insert(0, self.speech[prompt])
        count = sum(map(len, texts))
        ids = np.concatenate([[c.sos], *texts, [c.task_id], *speech, [c.sos + 1]])
        return Item(ids, count)

    def batches(self, positions: int) -> Iterator[tuple[Ids, Ids, Ids]]:
        """ids [b, t] padded with eos, the count of text [b], the length [b]."""
        while True:
            order = self.random.permutation(len(self.texts))
            for begin in range(0, len(order), POOL):
                pool = sorted((self.item(int(u)) for u in order[begin : begin + POOL]), key=lambda i: len(i.ids))
                groups, group = [], []
                for item in pool:
                    if group and (len(group) + 1) * len(item.ids) > positions:
                        groups.append(group)
                        group = []
                    group.append(item)
                groups.append(group)
                for number in self.random.permutation(len(groups)):
                    yield _padded(groups[number])


def _padded(items: list[Item]) -> tuple[Ids, Ids, Ids]:
    lengths = np.array([len(item.ids) for item in items])
    ids = np.full((len(items), int(lengths.max())), MINI.llm.sos + 1, np.int64)
    for row, item in zip(ids, items, strict=True):
        row[: len(item.ids)] = item.ids
    return ids, np.array([item.text for item in items]), lengths


def batch_loss(network: SpeechLM, ids: Tensor, text: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy of speech and eos, and the share of them that the model would have chosen."""
    positions = torch.arange(ids.shape[1], device=ids.device)
    is_text = (positions >= 1) & (positions <= text[:, None])
    is_speech = (positions > text[:, None] + 1) & (positions < lengths[:, None])
    shown = ids
    if network.training:
        wrong = (torch.rand(ids.shape, device=ids.device) < MISHEARD) & is_speech
        shown = torch.where(wrong, torch.randint_like(ids, MINI.llm.speech_vocab), ids)
    hidden = network(shown[:, :-1], is_text[:, :-1])
    learnt = is_speech[:, 1:]
    logits, wanted = network.llm_decoder(hidden[learnt]).float(), ids[:, 1:][learnt]
    return F.cross_entropy(logits, wanted), (logits.argmax(-1) == wanted).float().mean()


def main() -> None:
    args = stage_arguments(__doc__)
    device = pick_device()
    corpus = Corpus(folders(args), torch.device("cpu"))
    items = Items(corpus, read_text_tokenizer(folders(args).text_tokenizer))
    network = SpeechLM(MINI.llm, DROPOUT).to(device)
    stage = Stage("llm", network, args, rate=2e-3)
    batches = items.batches(int(POSITIONS_PER_BATCH * args.batch_scale))
    for _ in stage.steps():
        ids, text, lengths = (torch.from_numpy(a).to(device, non_blocking=True) for a in next(batches))
        with mixed(device):
            loss, right = batch_loss(network, ids, text, lengths)
        stage.descend(loss, right=right)


if __name__ == "__main__":
    main()
