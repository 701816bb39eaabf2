"""Train the speaker encoder: how fast the teacher's voice was played, told from two seconds of it.

Playing faster moves pitch and formants together, so the classes are a scale of voices from low to high; small
random shifts fill the room between the data's speakers.

    python -m training.mini.train_speaker --work DIR --checkpoints DIR --seconds 30
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from training.mini.config import SAMPLE_RATE, SPEAKER_DIM, SPEAKERS
from training.mini.corpus import Corpus
from training.mini.features import speaker_fbank, to_16k
from training.mini.loop import Stage, folders, mixed, pick_device, save_weights, stage_arguments
from training.mini.networks.speaker import SpeakerEncoder

CLASSES, LOWEST, HIGHEST = 33, 0.68, 1.45
SHIFT = 0.08
CROP = 2 * SAMPLE_RATE
SHARPNESS = 16.0


class Training(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = SpeakerEncoder()
        self.classes = nn.Parameter(torch.randn(CLASSES, SPEAKER_DIM) / SPEAKER_DIM**0.5)

    def forward(self, fbank: torch.Tensor) -> torch.Tensor:
        """Class logits from the vector's direction alone, which is all that the flow reads."""
        directions = F.normalize(self.encoder(fbank).float(), dim=-1)
        return SHARPNESS * directions @ F.normalize(self.classes, dim=-1).T


def main() -> None:
    args = stage_arguments(__doc__)
    device = pick_device()
    corpus = Corpus(folders(args), device)
    network = Training().to(device)
    stage = Stage("speaker_training", network, args, rate=1e-3)
    factors = torch.tensor([factor for _, factor, _ in SPEAKERS], device=device)
    speakers = torch.from_numpy(corpus.speakers).to(device)
    begins, lengths = (torch.from_numpy(a).to(device) for a in (corpus.begins, corpus.lengths))
    rows = max(int(192 * args.batch_scale), 4)
    steps = torch.arange(CROP, device=device)
    for _ in stage.steps():
        chosen = torch.randint(len(corpus), (rows,), device=device)
        room = (lengths[chosen] - CROP).clamp(min=0)
        at = begins[chosen] + (torch.rand(rows, device=device) * room).long()
        inside = torch.minimum(at[:, None] + steps, (begins + lengths)[chosen, None] - 1)
        wave = corpus.waves[inside].float() / 32768
        shift = math.exp((torch.rand(()).item() * 2 - 1) * SHIFT)
        wave = F.interpolate(wave[:, None], size=int(CROP / shift) // 3 * 3, mode="linear")[:, 0]
        noise = torch.randn_like(wave) * 10 ** (-5 * torch.rand(rows, 1, device=device))
        place = (factors[speakers[chosen]] * shift / LOWEST).log() / math.log(HIGHEST / LOWEST) * (CLASSES - 1)
        fbank = speaker_fbank(to_16k(wave + noise * 0.01))
        with mixed(device):
            logits = network(fbank)
        right = place.round().long().clamp(0, CLASSES - 1)
        loss = F.cross_entropy(logits.float(), right, label_smoothing=0.05)
        near = ((logits.argmax(-1) - right).abs() <= 1).float().mean()
        stage.descend(loss, near=near)
    prefix = "encoder."
    averaged = stage.good_weights()
    state = {name.removeprefix(prefix): t for name, t in averaged.items() if name.startswith(prefix)}
    save_weights(folders(args).checkpoint("speaker_encoder"), state)
    stage.path.unlink()


if __name__ == "__main__":
    main()
