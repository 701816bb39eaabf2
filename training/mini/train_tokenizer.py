"""Train the speech tokenizer: codes from which the mel and the phonemes can be told, given the speaker.

    python -m training.mini.train_tokenizer --work DIR --checkpoints DIR --seconds 90

An earlier one is trained on, with new heads. Later stages depend on its ids: whatever changes it, changes them all.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

from training.mini.config import MEL_BINS, SAMPLE_RATE, SPEAKERS
from training.mini.corpus import FRAMES_PER_TOKEN, Corpus
from training.mini.features import WHISPER_HOP, to_16k, whisper_mel
from training.mini.loop import Stage, folders, mixed, pick_device, save_weights, stage_arguments
from training.mini.networks.tokenizer import Heads, SpeechTokenizer, correlation, quantize

SECONDS_PER_BATCH = 400
PHONEME_WEIGHT = 0.8
CORRELATION_WEIGHT = 0.3
LOUDEST_NOISE = 0.01  # faint noise turns pauses into other codes, unless training hears it too
CALIBRATION = 40  # batches
UNSPOKEN = " ˈˌ"  # stress and spaces take no time of their own


class Training(nn.Module):
    def __init__(self, phonemes: int):
        super().__init__()
        self.tokenizer = SpeechTokenizer()
        self.heads = Heads(len(SPEAKERS), phonemes, MEL_BINS)

    def forward(self, feats: Tensor, lengths: Tensor, speaker: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """values before rounding [b, n, 8], mask [b, n, 1], mel [b, 2n, 80], phonemes' log-probabilities [b, n, c]."""
        values, mask = self.tokenizer.encode(feats, lengths)
        return values, mask, *self.heads(quantize(values), mask, speaker)


def phoneme_targets(phonemes: list[str], device: torch.device) -> tuple[Tensor, Tensor, int]:
    """All utterances' phoneme numbers from 1, padded with 0 (CTC's blank), their counts, and how many there are."""
    spoken = [[c for c in text if c not in UNSPOKEN] for text in phonemes]
    alphabet = {c: i for i, c in enumerate(sorted({c for text in spoken for c in text}), 1)}
    counts = torch.tensor([len(text) for text in spoken])
    targets = torch.zeros(len(spoken), int(counts.max()), dtype=torch.int64)
    for row, text in zip(targets, spoken, strict=True):
        row[: len(text)] = torch.tensor([alphabet[c] for c in text])
    return targets.to(device), counts.to(device), len(alphabet) + 1


def whisper_batch(corpus: Corpus, chosen: NDArray[np.int64], *, loudest: float = 0.0) -> tuple[Tensor, Tensor]:
    """Features [b, 128, t] and their lengths [b], with white noise of `loudest` down to 100 dB less."""
    wave, lengths = corpus.padded_waves(chosen)
    if loudest:
        wave = wave + torch.randn_like(wave) * loudest * 10 ** (-5 * torch.rand(len(wave), 1, device=wave.device))
    return whisper_mel(to_16k(wave)), lengths * 2 // 3 // WHISPER_HOP


def main() -> None:
    args = stage_arguments(__doc__)
    device = pick_device()
    corpus = Corpus(folders(args), device)
    targets, counts, alphabet = phoneme_targets(corpus.phonemes, device)
    network = Training(alphabet).to(device)
    earlier = folders(args).checkpoint("speech_tokenizer")
    if earlier.is_file():  # go on from it; the heads are new
        network.tokenizer.load_state_dict(load_file(earlier), strict=False)
    stage = Stage("tokenizer_training", network, args, rate=1.5e-3)
    speakers = torch.from_numpy(corpus.speakers).to(device)
    batches = corpus.batches(int(SECONDS_PER_BATCH * args.batch_scale) * SAMPLE_RATE)
    usage = torch.zeros(3**8, device=device)
    for _ in stage.steps():
        chosen = next(batches)
        feats, lengths = whisper_batch(corpus, chosen, loudest=LOUDEST_NOISE)
        wanted = corpus.padded_mels(chosen)
        rows = torch.from_numpy(chosen).to(device)
        with mixed(device):
            values, mask, mel, logs = network(feats, lengths, speakers[rows])
        heard = mask.repeat_interleave(FRAMES_PER_TOKEN, dim=1)
        loss_mel = ((mel.float() - wanted).abs() * heard).sum() / heard.sum() / MEL_BINS
        tokens = mask.sum(dim=(1, 2)).long()
        loss_phonemes = F.ctc_loss(
            logs.transpose(0, 1).float(), targets[rows], tokens, counts[rows], zero_infinity=True
        )
        alike = correlation(values, mask)
        loss = loss_mel + PHONEME_WEIGHT * loss_phonemes + CORRELATION_WEIGHT * alike
        stage.descend(loss, mel=loss_mel, phonemes=loss_phonemes, alike=alike)
        usage = 0.99 * usage + code_counts(values.detach(), mask)
        if stage.step_number % 200 == 0:
            print(f"tokenizer: {describe(usage)}", flush=True)
    network.load_state_dict(stage.good_weights())
    tokenizer = network.tokenizer
    usage = calibrate(tokenizer, corpus, batches)
    print(f"tokenizer: {describe(usage)}", flush=True)
    save_weights(earlier, tokenizer.state_dict())
    stage.path.unlink()  # the heads have done their work


def code_counts(values: Tensor, mask: Tensor) -> Tensor:
    """How often every code occurs in values [b, n, 8]: [6561]."""
    digits = (values.round() + 1).long()
    ids = (digits * 3 ** torch.arange(8, device=values.device)).sum(-1)[mask[..., 0] > 0]
    return torch.bincount(ids, minlength=3**8).float()


def describe(usage: Tensor) -> str:
    share = usage / usage.sum()
    entropy = -(share * share.clamp(min=1e-12).log()).sum()
    return f"{int((share > 1e-6).sum())} codes in use, perplexity {entropy.exp():.0f}"


@torch.no_grad()
def calibrate(tokenizer: SpeechTokenizer, corpus: Corpus, batches: Iterator[NDArray[np.int64]]) -> Tensor:
    """Statistics of `Spread` for the averaged weights, which were not those it ran with; counts of codes [6561]."""
    tokenizer.train()
    for _ in range(CALIBRATION):
        tokenizer.encode(*whisper_batch(corpus, next(batches)))
    tokenizer.eval()
    usage = torch.zeros(3**8, device=corpus.device)
    for _ in range(CALIBRATION):
        usage += code_counts(*tokenizer.encode(*whisper_batch(corpus, next(batches))))
    return usage


if __name__ == "__main__":
    main()
