"""A full-precision network of which some weights become what a format makes of them, and how far its output moves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from cosyq.artifact.reader import Artifact, StageFile
from cosyq.errors import CheckpointError
from cosyq.eval.distances import DECIBELS, divergence, outcomes
from cosyq.eval.stages import Arithmetic, mels, steps_ahead
from cosyq.model.inventory import Stage
from cosyq.quantize.formats import Format, dequantize
from cosyq.quantize.pack import pack
from cosyq.sequences import Heard

UNITS = {"llm": "nats a step", "flow": "dB²"}


class Probe:
    """One stage of an artifact in float32; its weights are as they were after every question."""

    def __init__(self, distance: Callable[[], float], network: Any, others: dict[str, Tensor]):
        self._distance, self._network, self._others = distance, network, others

    def cost(self, stored: Mapping[str, Format]) -> float:
        """The distance of the output, with these modules, by name, packed and unpacked again.

        Both distances grow with the square of a small error, so that those of independent errors add up.

        Raises:
            CheckpointError: a format cannot hold a weight.
            DeviceError: the output is not finite.
        """
        with ExitStack() as changes, torch.no_grad():
            for name, fmt in stored.items():
                changes.enter_context(_as_stored(name, self._weight(name), fmt))
            # Its last digits are the order of sums, which threads decide.
            return float(f"{self._distance():.6g}")

    def _weight(self, name: str) -> Tensor:
        if name in self._others:
            return self._others[name]
        weight: Tensor = self._network.get_submodule(name.partition(".")[2]).weight
        return weight.data


@contextmanager
def _as_stored(name: str, weight: Tensor, fmt: Format) -> Iterator[None]:
    try:
        packed, _ = pack(weight, fmt, weight.device)
    except OverflowError as error:
        raise CheckpointError(f"{name} as {fmt}: {error}") from None
    kept = weight.clone()
    weight.copy_(dequantize(fmt, packed, tuple(weight.shape)))
    try:
        yield
    finally:
        weight.copy_(kept)


def open_probe(stage: Stage, reference: Artifact, heard: Sequence[Heard], arithmetic: Arithmetic) -> Probe:
    """Of the language model: the divergence of the next id's distribution, nats a step. Of the flow: the squared
    difference of log mels, dB² a bin.
    """
    network = arithmetic.load(reference, stage)
    return _language_model(network, reference, heard) if stage == "llm" else _flow(network, heard)


def _language_model(network: Any, reference: Artifact, heard: Sequence[Heard]) -> Probe:
    module = reference.modules("llm")[0]
    words = StageFile(reference, "llm").read(module)["weight"].clone()
    vocabulary = reference.manifest.model.llm.speech_vocab

    def found() -> Iterator[Tensor]:
        logits = steps_ahead(network, lambda ids: words[torch.tensor(ids, dtype=torch.int64)], heard)
        for item, steps in zip(heard, logits, strict=True):
            yield outcomes(steps, vocabulary, item.part.minimum)

    right = list(found())

    def distance() -> float:
        return sum(float(divergence(one, other).sum()) for one, other in zip(right, found(), strict=True)) / sum(
            map(len, right)
        )

    return Probe(distance, network, {module.name: words})


def _flow(network: Any, heard: Sequence[Heard]) -> Probe:
    right = list(mels(network, heard))

    def distance() -> float:
        squares = (
            float((one.double() - other.double()).square().sum())
            for one, other in zip(right, mels(network, heard), strict=True)
        )
        return sum(squares) * DECIBELS**2 / sum(mel.numel() for mel in right)

    return Probe(distance, network, {})
