"""Run the trained speech tokenizer and speaker encoder over all the data.

python -m training.mini.encode --work DIR --checkpoints DIR
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from training.mini.config import SAMPLE_RATE, SAMPLES_PER_TOKEN, SPEAKER_DIM, Folders
from training.mini.corpus import Corpus
from training.mini.features import speaker_fbank, to_16k
from training.mini.loop import load_weights, pick_device
from training.mini.networks.speaker import SpeakerEncoder
from training.mini.networks.tokenizer import SpeechTokenizer
from training.mini.train_tokenizer import whisper_batch

SECONDS_PER_BATCH = 300


def load_encoders(folders: Folders, device: torch.device) -> tuple[SpeechTokenizer, SpeakerEncoder]:
    """Raises FileNotFoundError when they were not trained yet."""
    tokenizer, encoder = SpeechTokenizer().to(device).eval(), SpeakerEncoder().to(device).eval()
    for name, network in (("speech_tokenizer", tokenizer), ("speaker_encoder", encoder)):
        if not load_weights(folders.checkpoint(name), network):
            raise FileNotFoundError(folders.checkpoint(name))
    return tokenizer, encoder


@torch.inference_mode()
def speech_ids(corpus: Corpus, tokenizer: SpeechTokenizer) -> NDArray[np.int32]:
    """[tokens] of all utterances in a row."""
    tokens = np.zeros(int(corpus.lengths.sum()) // SAMPLES_PER_TOKEN, np.int32)
    for chosen in corpus.batches(SECONDS_PER_BATCH * SAMPLE_RATE, forever=False):
        feats, lengths = whisper_batch(corpus, chosen)
        ids = tokenizer(feats, lengths).cpu().numpy()
        for row, utterance in enumerate(chosen):
            begin, count = (int(a[utterance]) // SAMPLES_PER_TOKEN for a in (corpus.begins, corpus.lengths))
            tokens[begin : begin + count] = ids[row, :count]
    return tokens


@torch.inference_mode()
def speaker_vectors(corpus: Corpus, encoder: SpeakerEncoder) -> NDArray[np.float32]:
    """[utterances, 192]"""
    voices = np.zeros((len(corpus), SPEAKER_DIM), np.float32)
    for chosen in corpus.batches(SECONDS_PER_BATCH * SAMPLE_RATE, forever=False):
        wave, samples = corpus.padded_waves(chosen)
        shortest = int(samples.min())  # of like length: what is cut off is little
        voices[chosen] = encoder(speaker_fbank(to_16k(wave[:, :shortest]))).cpu().numpy()
    return voices


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--checkpoints", type=Path, required=True)
    args = parser.parse_args()
    started = time.monotonic()
    folders, device = Folders(args.work, args.checkpoints), pick_device()
    corpus = Corpus(folders, device)
    tokenizer, encoder = load_encoders(folders, device)
    tokens = speech_ids(corpus, tokenizer)
    np.savez(folders.encoded, tokens=tokens, voices=speaker_vectors(corpus, encoder))
    counts = np.bincount(tokens, minlength=3**8)
    repeats = float((tokens[1:] == tokens[:-1]).mean())
    print(
        f"encode: {len(tokens)} tokens, {int((counts > 0).sum())} different, {repeats:.1%} repeat the one before, "
        f"{time.monotonic() - started:.0f} s",
        flush=True,
    )


if __name__ == "__main__":
    main()
