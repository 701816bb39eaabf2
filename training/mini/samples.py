"""Held-out sentences to listen to, and one of them stage by stage, to hear where it is lost.

python -m training.mini.samples --model DIR --checkpoints DIR --output DIR
"""

from __future__ import annotations

import argparse
import wave
from pathlib import Path

import torch
from torch import Tensor

from cosyq.voices.voice import load_voice
from training.mini.config import SAMPLE_RATE, SPEAKERS, Folders
from training.mini.data import Teacher
from training.mini.encode import load_encoders
from training.mini.features import WHISPER_HOP, acoustic_mel, to_16k, whisper_mel
from training.mini.sentences import held_out
from training.mini.speak import load_networks

SPOKEN = (2, 3, 9, 25)  # numbers of held-out sentences
TRACED = 9


def write_wav(path: Path, samples: Tensor) -> None:
    """samples [n] float32 in -1..1 as 16-bit mono."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes((samples.clamp(-1, 1) * 32767).short().numpy().tobytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--model", "--checkpoints", "--output"):
        parser.add_argument(name, type=Path, required=True)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    networks = load_networks(args.model, device=device)
    voices = [
        load_voice(args.model / "voices" / f"{name}.safetensors", networks.config.flow) for name, _, _ in SPEAKERS
    ]
    sentences = held_out()[0]

    with torch.inference_mode():
        real = torch.from_numpy(Teacher().read(sentences[TRACED], 0).wave).float() / 32768
        mel = acoustic_mel(real[None])[0]
        low = to_16k(real[None])
        tokenizer, _ = load_encoders(Folders(args.output, args.checkpoints), torch.device("cpu"))
        tokens = tokenizer(whisper_mel(low), torch.tensor([low.shape[1] // WHISPER_HOP]))[0].tolist()
    write_wav(args.output / "trace-1-teacher.wav", real)
    write_wav(args.output / "trace-2-vocoder.wav", networks.vocode(mel.to(device)))
    write_wav(args.output / "trace-3-flow.wav", networks.render(tokens, voices[0]))
    for number in SPOKEN:
        voice = voices[number % 2]  # the two largest shares of the data
        spoken = networks.speak(sentences[number], voice)
        write_wav(args.output / f"heldout-{number:02d}-{voice.name}.wav", spoken.samples)
        print(f"{number} {voice.name}: {spoken.tokens} tokens, {spoken.finish}", flush=True)


if __name__ == "__main__":
    main()
