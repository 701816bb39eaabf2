"""Train the flow on stretches of one speaker's tokens and mel, which run across utterances as a prompt does.

python -m training.mini.train_flow --work DIR --checkpoints DIR --seconds 400
"""

from __future__ import annotations

import random
from functools import partial

import numpy as np
import torch
from torch import Tensor

from training.mini.config import MINI, SAMPLES_PER_TOKEN, TIME_WIDTH
from training.mini.corpus import FRAMES_PER_TOKEN, Corpus
from training.mini.loop import Stage, folders, mixed, pick_device, stage_arguments
from training.mini.networks.flow import FlowMatching

STRETCHES = (150, 375)  # tokens: six and fifteen seconds; each is compiled for itself
TOKENS_PER_BATCH = 12_000
RATE = 5e-4  # at 1.2e-3 the first block's modulation ran away
RESTRAINT = 0.1
PROMPT_SHARE = 0.6  # of a stretch at most; the original's 0.3 is less than a short sentence meets


class Stretches:
    """Everything one speaker says in a row, speaker after speaker."""

    def __init__(self, corpus: Corpus):
        device = corpus.device
        order = np.argsort(corpus.speakers, kind="stable")
        counts = corpus.lengths[order] // SAMPLES_PER_TOKEN
        begins = corpus.begins[order] // SAMPLES_PER_TOKEN
        source = np.concatenate([np.arange(b, b + n) for b, n in zip(begins, counts, strict=True)])
        self.tokens = torch.from_numpy(corpus.tokens[source].astype(np.int64)).to(device)
        frames = torch.from_numpy(source).to(device)[:, None] * FRAMES_PER_TOKEN
        self.frames = (frames + torch.arange(FRAMES_PER_TOKEN, device=device)).flatten()
        self.mels = corpus.mels
        self.voices = torch.from_numpy(corpus.voices).to(device)
        self.utterance = torch.from_numpy(np.repeat(order, counts)).to(device)
        self.starts = torch.from_numpy(np.concatenate([[0], counts.cumsum()[:-1]])).to(device)
        speaker = corpus.speakers[np.repeat(order, counts)]
        self.last = torch.from_numpy(np.searchsorted(speaker, speaker, side="right")).to(device)  # end of the speaker

    def draw(self, rows: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """tokens [rows, length], speaker [rows, 192], mel [rows, 2 length, 80]; half begin where a sentence does."""
        device = self.tokens.device
        anywhere = torch.randint(len(self.tokens), (rows,), device=device)
        sentence = self.starts[torch.randint(len(self.starts), (rows,), device=device)]
        begin = torch.where(torch.rand(rows, device=device) < 0.5, sentence, anywhere)
        begin = torch.minimum(begin, self.last[begin] - length).clamp(min=0)  # stay with one speaker
        index = begin[:, None] + torch.arange(length, device=device)
        frames = begin[:, None] * FRAMES_PER_TOKEN + torch.arange(length * FRAMES_PER_TOKEN, device=device)
        mel = self.mels[self.frames[frames]].float()
        return self.tokens[index], self.voices[self.utterance[begin + length // 2]], mel


def random_prompt(mel: Tensor) -> Tensor:
    """The first frames of half the rows, zeros elsewhere: [b, t, 80]."""
    b, t, _ = mel.shape
    share = torch.rand(b, device=mel.device) * PROMPT_SHARE * (torch.rand(b, device=mel.device) < 0.5)
    return mel * (torch.arange(t, device=mel.device) < (share * t)[:, None])[..., None]


def main() -> None:
    args = stage_arguments(__doc__)
    device = pick_device()
    stretches = Stretches(Corpus(folders(args), device))
    network = FlowMatching(MINI.flow, TIME_WIDTH).to(device)
    with torch.no_grad():  # the mel's mean is far from the noise's: a start that knows it saves a hundred steps
        network.decoder["estimator"].proj_out.bias.copy_(stretches.mels[:100_000].float().mean(0))
    stage = Stage("flow", network, args, rate=RATE, warm=0.06)
    if device.type == "cuda":  # fused by the compiler a step takes 8 ms instead of 18
        torch._dynamo.config.recompile_limit = 64  # one class, and a variant for each length and mask
        for block in network.decoder["estimator"].transformer_blocks:
            block.compile(dynamic=False)

    def step(length: int, streaming: bool) -> None:
        rows = max(int(TOKENS_PER_BATCH * args.batch_scale) // length, 1)
        tokens, speaker, mel = stretches.draw(rows, length)
        with mixed(device):
            loss = network.loss(tokens, speaker, mel, random_prompt(mel), streaming=streaming)
        excess = network.excess()
        stage.descend(loss + RESTRAINT * excess, velocity=loss, excess=excess)

    for _ in stage.steps():
        length, streaming = random.choice(STRETCHES), random.random() < 0.5
        stage.replay((length, streaming), partial(step, length, streaming))


if __name__ == "__main__":
    main()
