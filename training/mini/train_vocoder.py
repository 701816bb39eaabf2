"""Train the vocoder on one-second crops of true mel: spectral losses at several resolutions, pitch beside them.

python -m training.mini.train_vocoder --work DIR --checkpoints DIR --seconds 400 [--adversarial] [--compile]
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor

from training.mini.config import MEL_HOP, MINI
from training.mini.corpus import Corpus
from training.mini.discriminators import Judges, Verdict, deceiving_loss, judging_loss
from training.mini.features import acoustic_mel, magnitude
from training.mini.loop import Stage, folders, load_weights, new_optimizer, pick_device, save_weights, stage_arguments
from training.mini.networks.vocoder import HiFT

RESOLUTIONS = ((2048, 480), (1024, 240), (512, 120), (256, 60))
ROWS, JUDGED_ROWS, FRAMES = 32, 16, 58  # judges cost twice what the vocoder does, and need many steps
BEFORE, AFTER = 4, 4  # frames at the ends that are heard without their context, and not judged
MEL_WEIGHT, PITCH_SCALE = 1.0, 50.0
ADVERSARIAL_WEIGHT, FEATURE_WEIGHT = 0.3, 1.0


def spectral_loss(made: Tensor, real: Tensor) -> Tensor:
    """Log-magnitude L1 and spectral convergence, averaged over the resolutions; waves [b, n]."""
    total = made.new_zeros(())
    for window, hop in RESOLUTIONS:
        m, r = magnitude(made, window, hop), magnitude(real, window, hop)
        total = total + F.l1_loss(m.clamp(min=1e-4).log(), r.clamp(min=1e-4).log())
        total = total + (m - r).norm() / r.norm().clamp(min=1e-3)
    return total / len(RESOLUTIONS)


class Crops:
    def __init__(self, corpus: Corpus):
        self.corpus = corpus

    def draw(self, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """mel [rows, 80, FRAMES], f0 [rows, FRAMES], wave [rows, FRAMES * 480], from anywhere in the data."""
        c = self.corpus
        begin = torch.randint(len(c.mels) - FRAMES, (rows, 1), device=c.device)
        frames = begin + torch.arange(FRAMES, device=c.device)
        samples = begin * MEL_HOP + torch.arange(FRAMES * MEL_HOP, device=c.device)
        return c.mels[frames].float().mT, c.f0[frames], c.waves[samples].float() / 32768


class Adversary:
    """The judges and their optimizer; they resume with the vocoder."""

    def __init__(self, stage: Stage, args: argparse.Namespace, device: torch.device):
        self.judges = Judges().to(device)
        self.path = folders(args).checkpoint("judges")
        load_weights(self.path, self.judges)
        self.optimizer = new_optimizer(list(self.judges.parameters()), stage.current_rate, betas=(0.8, 0.99))

    def judge(self, made: Tensor, real: Tensor) -> list[Verdict]:
        """The judges' own step; what they said of the real before it."""
        seen = self.judges(real)
        loss = judging_loss(seen, self.judges(made.detach()))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.judges.parameters(), 5.0)
        self.optimizer.found_inf = (~torch.isfinite(norm)).float()
        self.optimizer.step()
        return seen

    def loss(self, made: Tensor, seen: list[Verdict]) -> Tensor:
        """What the vocoder learns from them."""
        fooled, matched = deceiving_loss(seen, self.judges(made))
        return ADVERSARIAL_WEIGHT * fooled + FEATURE_WEIGHT * matched

    def save(self) -> None:
        save_weights(self.path, dict(self.judges.state_dict()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adversarial", action="store_true", help="judges beside the spectral losses")
    parser.add_argument("--compile", action="store_true", help="compile the residual blocks first")
    args = stage_arguments(None, parser)
    device = pick_device()
    torch.backends.cudnn.benchmark = True  # every step has the same shapes
    crops = Crops(Corpus(folders(args), device))
    network = HiFT(MINI.vocoder).to(device)
    stage = Stage("hift", network, args, rate=8e-4, clip=5.0)
    if args.compile:
        network.compile_blocks()
    adversary = Adversary(stage, args, device) if args.adversarial else None
    rows = max(int((JUDGED_ROWS if adversary else ROWS) * args.batch_scale), 2)
    c = MINI.vocoder
    judged = slice(BEFORE * MEL_HOP, (FRAMES - AFTER) * MEL_HOP)

    def step() -> None:
        mel, f0, wave = crops.draw(rows)
        noise = torch.rand(rows, wave.shape[1], c.harmonics + 1, device=device)
        made = network(mel, f0, noise)[:, judged]
        real = wave[:, judged]
        pitch = (network.f0_predictor(mel) - f0)[:, BEFORE:-AFTER].abs().mean()
        seen = adversary.judge(made, real) if adversary else []
        spectral, mels = spectral_loss(made, real), F.l1_loss(acoustic_mel(made), acoustic_mel(real))
        loss = spectral + MEL_WEIGHT * mels + pitch / PITCH_SCALE
        health = loss  # without what judges say, who grow sterner
        if adversary:
            loss = loss + adversary.loss(made, seen)
        stage.descend(loss, health=health, spectral=spectral, mel=mels, pitch=pitch)

    for _ in stage.steps():
        stage.replay("crops", step)
    if adversary:
        adversary.save()


if __name__ == "__main__":
    main()
