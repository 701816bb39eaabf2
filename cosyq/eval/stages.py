"""Two artifacts at the same work, stage by stage: no draw of theirs differs, because they make none.

Both are shown ids that a reference spoke, the same noise and the same mel, so an artifact against itself is at exact
zeros. One stage's two networks are loaded at a time, and what outlives a stage is mels. The functions in the middle
take networks rather than artifacts, and serve whoever changes a network's weights and measures again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cosyq.artifact.reader import Artifact, load_stage, text_rows
from cosyq.audio.features import flow_mel
from cosyq.eval import metrics
from cosyq.eval.distances import (
    agreement,
    divergence,
    log_spectral,
    mel_cepstral,
    outcomes,
    stft_distance,
    surprise,
)
from cosyq.eval.evaluation import Compared, Rendition
from cosyq.eval.metric import Metric, Series
from cosyq.model.flow import Flow, start_noise
from cosyq.model.inventory import Stage
from cosyq.model.llm import KVCache, LanguageModel
from cosyq.model.vocoder import StreamState, Vocoder
from cosyq.quantize.linear import Matmul
from cosyq.runtime.engine import Chunk, render, solve
from cosyq.runtime.sampling import not_finite
from cosyq.sequences import Heard, Progress

SOUNDS = 24  # utterances whose samples are kept, the worst: a long list's would fill the memory
Rows = Callable[[list[int]], Tensor]  # text ids -> their embeddings, [n, hidden] float32; see `text_rows`


@dataclass(frozen=True)
class Arithmetic:
    """Where and in what both sides compute; the vocoder's is float32 everywhere."""

    device: torch.device
    dtype: torch.dtype = torch.float32
    matmul: Matmul = "unpacked"

    def load(self, artifact: Artifact, stage: Stage) -> Any:
        """The stage's network; errors as in `load_stage`."""
        dtype = torch.float32 if stage == "vocoder" else self.dtype
        return load_stage(artifact, stage, device=self.device, dtype=dtype, matmul=self.matmul)


@dataclass(frozen=True)
class Share:
    """What an utterance adds to a metric: a total on either side, over the same weight.

    reference: None of a distance.
    """

    metric: Metric
    weight: float
    artifact: float
    reference: float | None = None


# ---- networks at work, one utterance at a time


def steps_ahead(llm: LanguageModel, rows: Rows, heard: Iterable[Heard]) -> Iterator[Tensor]:
    """The logits of every step of every utterance, shown as it was spoken: [steps, speech_rows] float32.

    There is a step for each id and, where the utterance came to an end of its own, one for that.

    Raises:
        DeviceError: they are not finite.
    """
    for item in heard:
        found = _logits(llm, rows, item)
        if not torch.isfinite(found).all():
            raise not_finite()
        yield found


@torch.inference_mode()
def _logits(llm: LanguageModel, rows: Rows, item: Heard) -> Tensor:
    device, tokens = llm.norm.weight.device, item.spoken.tokens
    shown = []
    for text, speech in (*item.part.shown, ((), tokens)):
        shown.append(rows(list(text)).to(device))
        shown.append(llm.embed_speech(torch.tensor(speech, dtype=torch.int64, device=device)))
    embeddings = torch.cat(shown)[None]
    cache = KVCache.empty(llm.config, embeddings.shape[1], device=device, dtype=llm.norm.dtype)
    hidden = llm(embeddings, cache)[0, item.part.positions - 1 :]
    return llm.logits(hidden if item.spoken.finish == "stop" else hidden[:-1])


def mels(flow: Flow, heard: Iterable[Heard]) -> Iterator[Tensor]:
    """The mel of every utterance's ids, rendered whole as `Synthesizer.synthesize` does: [mel, frames] float32.

    Raises:
        DeviceError: it is not finite.
    """
    noise = start_noise(flow.config).to(flow.speaker_proj.weight.device)
    for item in heard:
        yield solve(flow, Chunk(list(item.audible), item.voice, False, True, item.manner.steps), noise)


def sound(vocoder: Vocoder, mel: Tensor) -> Tensor:
    """The samples of a mel [mel, frames]: [n] float32 on the host.

    Raises:
        DeviceError: they are not finite.
    """
    return render(vocoder, mel.to(vocoder.conv_pre.weight.device), StreamState(), final=True).samples()


# ---- what is made of two outputs


def llm_shares(item: Heard, speech_vocab: int, artifact: Tensor, reference: Tensor) -> list[Share]:
    """Of two `steps_ahead`."""
    tokens, stops = item.spoken.tokens, item.spoken.finish == "stop"
    mine, other = (outcomes(logits, speech_vocab, item.part.minimum) for logits in (artifact, reference))
    happened = torch.tensor([*tokens, *([speech_vocab] if stops else [])], device=mine.device)
    steps = len(happened)
    shares = [
        Share(metrics.KL, steps, float(divergence(other, mine).sum())),
        Share(metrics.TOP1, steps, 100 * int(agreement(other, mine).sum()), 100 * steps),  # of itself, all
        Share(metrics.NLL, steps, float(surprise(mine, happened).sum()), float(surprise(other, happened).sum())),
    ]
    if stops:
        shares.append(Share(metrics.STOP, 1, 100 * float(mine[-1, -1].exp()), 100 * float(other[-1, -1].exp())))
    return shares


def flow_shares(artifact: Tensor, reference: Tensor) -> list[Share]:
    """Of two mels."""
    spectral, cepstral = log_spectral(reference, artifact), mel_cepstral(reference, artifact)
    return [
        Share(metrics.FLOW_LSD, len(spectral), float(spectral.sum())),
        Share(metrics.FLOW_MCD, len(cepstral), float(cepstral.sum())),
    ]


def sound_shares(frames: int, vocoded: Tensor, artifact: Tensor, reference: Tensor) -> list[Share]:
    """Of the samples of one mel by both vocoders, `vocoded` and `reference`, and of the artifact's own chain."""
    spectral = log_spectral(flow_mel(reference).T, flow_mel(artifact).T)
    return [
        Share(metrics.VOCODER_STFT, frames, frames * stft_distance(reference, vocoded)),
        Share(metrics.CHAIN_LSD, len(spectral), float(spectral.sum())),
        Share(metrics.CHAIN_STFT, frames, frames * stft_distance(reference, artifact)),
    ]


# ---- both artifacts, stage by stage


def compare(
    artifact: Artifact, reference: Artifact, heard: Sequence[Heard], arithmetic: Arithmetic, progress: Progress
) -> tuple[list[Series], tuple[Compared, ...]]:
    """Every exact metric's series, and the utterances, of which the worst have their sound.

    Raises:
        ArtifactError: a packed tensor contradicts itself.
        DeviceError: the device ran out of memory or of finite numbers.
    """
    sides = artifact, reference
    read = _compare_llm(sides, heard, arithmetic, progress)
    flown = _compare_flow(sides, heard, arithmetic, progress)
    shares: list[list[Share]] = []
    compared: list[Compared] = []
    for item, first, (mine, other), (last, samples) in zip(
        heard, read, flown, _compare_vocoder(sides, flown, arithmetic, progress), strict=True
    ):
        shares.append([*first, *flow_shares(mine, other), *last])
        compared.append(_compared(item, shares[-1], samples))
        _forget_best(compared)
    return [found for metric in metrics.EXACT if (found := _series(metric, shares))], tuple(compared)


Sides = tuple[Artifact, Artifact]  # the artifact, the reference; so are all pairs here


def _compare_llm(sides: Sides, heard: Sequence[Heard], arithmetic: Arithmetic, progress: Progress) -> list[list[Share]]:
    logits = [steps_ahead(arithmetic.load(side, "llm"), text_rows(side), heard) for side in sides]
    vocabulary = sides[0].manifest.model.llm.speech_vocab
    found = []
    for index, (item, mine, other) in enumerate(zip(heard, *logits, strict=True)):
        progress("language model", index, len(heard))
        found.append(llm_shares(item, vocabulary, mine, other))
    return found


def _compare_flow(
    sides: Sides, heard: Sequence[Heard], arithmetic: Arithmetic, progress: Progress
) -> list[tuple[Tensor, Tensor]]:
    solved = [mels(arithmetic.load(side, "flow"), heard) for side in sides]
    found = []
    for index, (mine, other) in enumerate(zip(*solved, strict=True)):
        progress("flow", index, len(heard))
        found.append((mine.cpu(), other.cpu()))
    return found


def _compare_vocoder(
    sides: Sides, flown: Sequence[tuple[Tensor, Tensor]], arithmetic: Arithmetic, progress: Progress
) -> Iterator[tuple[list[Share], tuple[Tensor, Tensor]]]:
    mine, other = (arithmetic.load(side, "vocoder") for side in sides)
    for index, (mel, right) in enumerate(flown):
        progress("vocoder", index, len(flown))
        chain, reference = sound(mine, mel), sound(other, right)
        yield sound_shares(right.shape[1], sound(mine, right), chain, reference), (chain, reference)


def _compared(item: Heard, shares: list[Share], samples: tuple[Tensor, Tensor]) -> Compared:
    mine = {share.metric.key: share.artifact / share.weight for share in shares}
    other = {share.metric.key: share.reference / share.weight for share in shares if share.reference is not None}
    chain, reference = (side.numpy() for side in samples)
    spoken = item.spoken
    return Compared(
        spoken.text,
        spoken.voice,
        spoken.seed,
        Rendition(mine, chain),
        Rendition(other, reference, finish=spoken.finish),
    )


def _forget_best(compared: list[Compared]) -> None:
    """Let go of one utterance's samples, the most alike, where more than `SOUNDS` have some."""
    sounding = [index for index, item in enumerate(compared) if item.artifact.samples is not None]
    if len(sounding) > SOUNDS:
        best = min(sounding, key=lambda index: compared[index].artifact.values[metrics.CHAIN_LSD.key])
        item = compared[best]
        compared[best] = replace(
            item, artifact=replace(item.artifact, samples=None), reference=replace(item.reference, samples=None)
        )


def _series(metric: Metric, shares: Sequence[Sequence[Share]]) -> Series | None:
    """A metric over the utterances that say something of it; None where none does."""
    found = [share for item in shares for share in item if share.metric is metric]
    if not found:
        return None
    weights = np.array([share.weight for share in found], dtype=np.float64)
    mine = np.array([share.artifact for share in found], dtype=np.float64)
    references = [share.reference for share in found if share.reference is not None]
    if not references:
        return Series(metric, mine, weights)
    return Series(metric, mine, weights, np.array(references, dtype=np.float64), weights)
