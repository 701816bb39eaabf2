"""An evaluation as one HTML file: it asks for nothing from elsewhere, and runs no script but its own few lines."""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from cosyq.audio.sinks import flac
from cosyq.eval.evaluation import Compared, Evaluation, Rendition
from cosyq.eval.figures import bar, charts, spectrograms
from cosyq.eval.metric import Finding
from cosyq.eval.wording import MEANING, parted, title, verdict, written
from cosyq.eval.worst import RULE, worst
from cosyq.files import whole_file

HERE = Path(__file__).parent
UTTERANCES = 10
MEDIA_BYTES = 8_000_000  # of pictures and sound, as base64
SECONDS = 20  # of a sound
CHARACTERS = 600  # of a text
COLOURS = 6
MARKS = {"gained": "▲", "held": "●", "lost": "▼", "open": "○"}  # beside the colour, which not everyone sees
BETTER = {"lower": "lower is better", "higher": "higher is better", "near": "nearer is better"}


def page(evaluation: Evaluation) -> str:
    """The whole page. Its pictures and sounds take at most `MEDIA_BYTES`, the worst utterances first.

    Texts and names are shown as text, whatever they hold.
    """
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    style, script = ((HERE / f"page.{kind}").read_text("utf-8") for kind in ("css", "js"))
    verdicts = Counter(verdict(finding) for finding in evaluation.findings)
    formats = _formats(evaluation.modules)
    return environment.get_template("page.html").render(
        policy=_policy(style, script),
        style=style,
        script=script,
        artifact=_plain(evaluation.artifact),
        against=_plain(evaluation.against),
        about=_plain(evaluation.about),
        extra=[(_plain(name), _plain(value)) for name, value in sorted(evaluation.extra.items())],
        summary=[(name, meaning, verdicts[name]) for name, meaning in MEANING.items() if verdicts[name]],
        marks=MARKS,
        findings=[_finding(finding) for finding in evaluation.findings],
        rule=RULE,
        heard=_heard(evaluation),
        charts=charts([(_plain(name), _plain(fmt), size, error) for name, fmt, size, error in evaluation.modules]),
        kinds={row["format"]: number % COLOURS for number, row in enumerate(formats)},
        formats=formats,
        modules=[
            {"name": _plain(name), "format": _plain(fmt), "bytes": f"{size:,}", "error": _percent(error)}
            for name, fmt, size, error in sorted(evaluation.modules, key=lambda module: (-module[3], module[0]))
        ],
        total=f"{sum(size for _, _, size, _ in evaluation.modules):,}",
        percent=_percent,
    )


def write_page(path: Path, evaluation: Evaluation) -> None:
    """Raises ArtifactError when it cannot be written."""
    text = page(evaluation)
    with whole_file(path) as partial:
        partial.write_text(text, "utf-8")


def _policy(style: str, script: str) -> str:
    """Nothing is loaded but what is in the file, and no style or script counts but these two."""

    def source(text: str) -> str:
        return f"'sha256-{_base64(hashlib.sha256(text.encode()).digest())}'"

    return (
        f"default-src 'none'; style-src {source(style)}; script-src {source(script)}; img-src data:; media-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _finding(finding: Finding) -> dict[str, Any]:
    metric = finding.metric
    return {
        "title": title(metric),
        "key": metric.key,
        "better": BETTER[metric.better],
        "claim": f"{metric.claim:g} {metric.unit}".strip(),
        "artifact": parted(finding.artifact),
        "reference": finding.reference and parted(finding.reference),
        "difference": finding.reference and parted(finding.difference, signed=True),
        "drawn": written(finding.difference, signed=finding.reference is not None),
        "bar": bar(finding),
        "verdict": verdict(finding),
        "count": finding.items,
        "needed": finding.needed,
    }


def _formats(modules: Sequence[tuple[str, str, int, float]]) -> list[dict[str, Any]]:
    by_format: dict[str, list[tuple[str, str, int, float]]] = {}
    for module in modules:
        by_format.setdefault(_plain(module[1]), []).append(module)
    rows = []
    for fmt, members in by_format.items():
        name, _, _, error = max(members, key=lambda module: module[3])
        size = sum(size for _, _, size, _ in members)
        row = {"format": fmt, "modules": len(members), "bytes": f"{size:,}", "error": _percent(error)}
        rows.append((-size, fmt, {**row, "worst": _plain(name) if error else ""}))
    return [row for _, _, row in sorted(rows, key=lambda entry: entry[:2])]


def _heard(evaluation: Evaluation) -> list[dict[str, Any]]:
    """The worst utterances, with pictures and sound as long as there is room."""
    room, shown = MEDIA_BYTES, []
    for item in worst(evaluation, UTTERANCES):
        compared = item.compared
        media = _media(compared, evaluation.sample_rate)
        size = sum(len(data) for side in media for data in side)
        if size > room:
            media = [("", ""), ("", "")]
        else:
            room -= size
        sides = [
            _side(name, rendition, picture, sound, evaluation.sample_rate)
            for name, rendition, (picture, sound) in zip(
                ("artifact", "reference"), (compared.artifact, compared.reference), media, strict=True
            )
        ]
        shown.append(
            {
                "text": _plain(compared.text),
                "voice": _plain(compared.voice),
                "seed": compared.seed,
                "reason": item.reason,
                "sides": sides,
                "switches": all(sound for _, sound in media),
            }
        )
    return shown


def _media(compared: Compared, rate: int) -> list[tuple[str, str]]:
    """Of each side a PNG and a FLAC file in base64: every browser plays FLAC, and it adds no loss of its own."""
    sounds = [side.samples for side in (compared.artifact, compared.reference)]
    held = [None if sound is None or not len(sound) else sound[: SECONDS * rate] for sound in sounds]
    return [
        (_base64(picture or b""), "" if sound is None else _base64(flac(sound, rate)))
        for picture, sound in zip(spectrograms(held), held, strict=True)
    ]


def _side(name: str, side: Rendition, picture: str, sound: str, rate: int) -> dict[str, Any]:
    length = 0 if side.samples is None else len(side.samples) / rate
    note = ""
    if side.samples is None or not length:
        note = "no sound"
    elif not sound:
        note = "its sound is left out: the page would be too large"
    elif length > SECONDS:
        note = f"the first {SECONDS} seconds"
    return {
        "name": name,
        "seconds": f"{length:.2f} s" if length else "",
        "finish": side.finish,
        "picture": picture,
        "sound": sound,
        "note": note,
        "understood": None if side.understood is None else _plain(side.understood),
    }


def _percent(error: float) -> str:
    return f"{100 * error:.3g} %"


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _plain(text: str) -> str:
    """On one line, of bounded length, and nothing that is not shown: no control, no change of direction."""
    shown = " ".join("".join(character if character.isprintable() else " " for character in text).split())
    return shown if len(shown) <= CHARACTERS else shown[:CHARACTERS] + "…"
