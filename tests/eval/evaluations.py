"""Evaluations made up to be shown and judged."""

from __future__ import annotations

import numpy as np

from cosyq.eval.evaluation import Compared, Evaluation, Rendition
from cosyq.eval.metric import Finding, Interval
from cosyq.eval.metrics import METRICS

RATE = 24_000
FILES = {"llm.safetensors": "a" * 64, "flow.safetensors": "b" * 64, "vocoder.safetensors": "c" * 64}
MODULES = (
    *((f"llm.layers.{layer}.mlp.up_proj", "nf4/64", 1000 + layer, 0.09 + layer / 1e4) for layer in range(200)),
    ("llm.norm", "fp32", 77, 0.0),
    *((f"flow.estimator.blocks.{block}.ff.up", "int8", 500, 0.011) for block in range(150)),
    *((f"vocoder.resblocks.{n}.convs1.0", "fp32", 40, 0.0) for n in range(60)),
)


def finding(key, *difference, artifact=(5.0, 4.0, 6.0), reference=(4.0, 3.5, 4.5), items=24, needed=30):
    """Of a metric, by value, low and high of the difference; without one, a distance."""
    if not difference:
        return Finding(METRICS[key], Interval(*artifact), None, Interval(*artifact), items, needed)
    return Finding(METRICS[key], Interval(*artifact), Interval(*reference), Interval(*difference), items, needed)


def sound(seconds, hertz=300.0, loudness=0.3):
    """A tone, [n] float32."""
    return (loudness * np.sin(2 * np.pi * hertz * np.arange(round(RATE * seconds)) / RATE)).astype(np.float32)


def said(text, *, seed=0, errors=(0.0, 0.0), samples=None, other=None, understood=(None, None), finish="stop"):
    mine = Rendition({"spoken.errors": errors[0]}, samples, understood[0], finish)
    return Compared(text, "anna", seed, mine, Rendition({"spoken.errors": errors[1]}, other, understood[1], "stop"))


def replayed(text, distance, *, seed=0, samples=None, other=None):
    return Compared(
        text, "anna", seed, Rendition({"chain.lsd": distance}, samples), Rendition({}, other, finish="stop")
    )


def evaluation(**changes):
    given = {
        "artifact": "tiny-nf4",
        "against": "tiny-fp32",
        "about": "24 utterances, made up.",
        "sample_rate": RATE,
        "findings": (
            finding("llm.kl", artifact=(0.0312, 0.0281, 0.0345)),
            finding("llm.top1", -3.2, -4.1, -2.2, artifact=(96.8, 95.9, 97.8), reference=(100.0, 100.0, 100.0)),
            finding("llm.stop", 0.1, -0.4, 0.6, artifact=(98.1, 97.2, 99.0), reference=(98.0, 97.1, 98.9)),
            finding("spoken.errors", 0.8, -1.2, 2.9, artifact=(12.8, 10.1, 15.6), reference=(12.0, 9.7, 14.4)),
        ),
        "modules": MODULES,
        "exact": tuple(replayed(f"Replayed {n}.", 1.0 + n, seed=n, samples=sound(1), other=sound(1)) for n in range(4)),
        "spoken": tuple(
            said(
                f"Said {n}.",
                seed=n,
                errors=(10.0 * n, 10.0),
                samples=sound(1 + n / 10, 200),
                other=sound(1),
                understood=("sad", "said"),
            )
            for n in range(4)
        ),
        "extra": {"recognizer": "made up 1.0"},
        "files": FILES,
    }
    return Evaluation(**{**given, **changes})
