"""The model card: README.md of a repository, written from the manifest and nothing else that could be forgotten."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cosyq.artifact.manifest import Manifest
from cosyq.publish.reports import REPORT_FILES, Report

CARD_FILE = "README.md"


@dataclass(frozen=True)
class Origin:
    """What is known of a checkpoint beyond its bytes."""

    title: str
    licence: str
    languages: tuple[str, ...]


# Languages as the published model's own card has them.
PUBLISHED = Origin("Fun-CosyVoice3-0.5B", "apache-2.0", ("zh", "en", "ja", "ko", "de", "es", "fr", "it", "ru"))
KNOWN = {"FunAudioLLM/Fun-CosyVoice3-0.5B-2512": PUBLISHED}
BUNDLED = {"mini": Origin("cosyq-mini", "apache-2.0", ("en",))}
CONSENT = (
    "## Cloning voices\n\nA few seconds of a recording are enough to speak in somebody's voice. Clone only voices "
    "whose owners agreed to it, for what they agreed to; tell listeners that they hear a generated voice; do not "
    "impersonate, deceive or harass."
)
TITLES = dict(zip(REPORT_FILES, ("Quality", "Speed"), strict=True))


def model_card(manifest: Manifest, repo: str, reports: Mapping[str, Report]) -> str:
    """The card of an artifact in `repo`: the same manifest and reports, the same text."""
    origin = _origin(manifest)
    sections = [
        f"# {_cell(manifest.name)}",
        _about(manifest, origin),
        _use(manifest, repo),
        _packed(manifest),
        *(_measured(TITLES[name], reports.get(name)) for name in REPORT_FILES),
        _limits(origin),
        CONSENT,
        _provenance(manifest, origin, repo),
        _licence(origin),
    ]
    return _front_matter(manifest, origin) + "\n\n".join(sections) + "\n"


def _origin(manifest: Manifest) -> Origin | None:
    return KNOWN.get(manifest.source.repo or "") or BUNDLED.get(manifest.bundled or "")


def _base(manifest: Manifest) -> str | None:
    """The source's repository, if it is the name of one: a stranger's manifest may say anything."""
    return manifest.source.repo if re.fullmatch(r"[\w.-]+/[\w.-]+", manifest.source.repo or "", re.ASCII) else None


def _front_matter(manifest: Manifest, origin: Origin | None) -> str:
    entries: dict[str, object] = {
        "library_name": "cosyq",
        "pipeline_tag": "text-to-speech",
        "tags": ["text-to-speech", "voice-cloning", *sorted({m.format.name for m in manifest.modules} - {"fp32"})],
    }
    if base := _base(manifest):
        entries |= {"base_model": base, "base_model_relation": "quantized"}
    if origin:
        entries |= {"license": origin.licence, "language": list(origin.languages)}
    lines = (f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in entries.items())  # JSON is YAML
    return "\n".join(["---", *lines, "---"]) + "\n"


def _about(manifest: Manifest, origin: Origin | None) -> str:
    title = origin.title if origin else "a checkpoint in the layout of Fun-CosyVoice3"
    base = _base(manifest)
    where = f" ([{base}](https://huggingface.co/{base}))" if base else ""
    size = sum(record.bytes for record in manifest.files.values())
    return (
        f"Text to speech and voice cloning: {title}{where}, packed by cosyq into {size / 1e6:,.0f} MB of safetensors "
        "in bitsandbytes' formats. No code is executed from it: JSON and tensors are all there is."
    )


def _use(manifest: Manifest, repo: str) -> str:
    lines = [
        "pip install cosyq",
        f'cosyq synth "Hello there." -a hf://{repo} -o hello.wav',
        f"cosyq pull {repo} -o artifacts/{repo.partition('/')[2]}",
    ]
    voices = [name for name in sorted(manifest.files) if name.startswith("voices/")]
    names = ", ".join(f"`{name.removeprefix('voices/').removesuffix('.safetensors')}`" for name in voices)
    held = f"Voices: {names}." if voices else "It holds no voices: it speaks with a neutral one until you add yours."
    return "## Use\n\n```sh\n" + "\n".join(lines) + f"\n```\n\n{held}"


def _packed(manifest: Manifest) -> str:
    size: Counter[tuple[str, str]] = Counter()
    modules: Counter[tuple[str, str]] = Counter()
    worst: dict[tuple[str, str], float] = {}
    for module in manifest.modules:
        key = (module.name.partition(".")[0], str(module.format))
        size[key] += module.bytes
        modules[key] += 1
        worst[key] = max(worst.get(key, 0.0), module.rms_error)
    rows = [
        (stage, fmt, modules[stage, fmt], f"{size[stage, fmt]:,}", f"{worst[stage, fmt]:.3%}") for stage, fmt in size
    ]
    table = _table(("stage", "format", "modules", "bytes", "largest error"), rows)
    return f"## What is packed how\n\n{table}\n\nThe error of a module is the relative RMS error of its weight."


def _measured(title: str, report: Report | None) -> str:
    if report is None:
        return f"## {title}\n\nNot measured."
    whose = "\n\nMeasured on the weights whose hashes are below." if report.measured else ""
    return f"## {title}\n\n{_cell(report.about)}\n\n{_table(report.columns, report.rows)}{whose}"


def _limits(origin: Origin | None) -> str:
    spoken = f"Languages: {', '.join(origin.languages)}; others are not to be expected." if origin else ""
    return (
        "## Limits\n\nSpeech is generated, one utterance of about a sentence at a time: words can be misread, left out "
        "or repeated, and quantization adds its own error to the model's. Do not use it where a wrong word does harm "
        f"without somebody listening. {spoken}".rstrip()
    )


def _provenance(manifest: Manifest, origin: Origin | None, repo: str) -> str:
    source = manifest.source
    local = origin.title if origin else "a checkpoint without a repository"
    place = f"{source.repo} at revision `{source.revision}`" if source.repo else local
    versions = ", ".join(f"{name} {version}" for name, version in sorted(manifest.versions.items()))
    files = [(name, f"{record.bytes:,}", f"`{record.sha256}`") for name, record in sorted(manifest.files.items())]
    sources = [(name, f"`{sha256}`") for name, sha256 in sorted(source.files.items())]
    recipe = json.dumps(manifest.recipe, ensure_ascii=False, indent=1)
    fence = "`" * (max([2, *map(len, re.findall("`+", recipe))]) + 1)
    return "\n\n".join(
        [
            "## Where it came from",
            f"Made from {_cell(place)}, with {_cell(versions)}, on {_cell(manifest.device)}.",
            _table(("source file", "sha256"), sources),
            f"The recipe as resolved (its sha256, with the voices it may have had: `{manifest.recipe_sha256}`):",
            f"{fence}json\n{recipe}\n{fence}",
            "## Hashes",
            f"`cosyq verify hf://{repo}` compares every file with them; the manifest's own digest is "
            f"`{manifest.digest}`.",
            _table(("file", "bytes", "sha256"), files),
        ]
    )


def _licence(origin: Origin | None) -> str:
    if origin is None:
        return "## Licence\n\nThat of the checkpoint it was made from, which the artifact does not know."
    return (
        f"## Licence\n\n{origin.title} is under Apache-2.0, and so is this. Whoever passes it on gives the licence's "
        "text along, keeps its notices, and says what was changed: here the weights were quantized and stored anew; "
        "nothing was trained."
    )


def _table(columns: tuple[str, ...], rows: Sequence[tuple[object, ...]]) -> str:
    lines = [columns, tuple("---" for _ in columns), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(value: object) -> str:
    """On one line, and nothing that ends the cell, opens HTML or a link."""
    text = " ".join(str(value).split())
    return re.sub(r"([\\|<\[])", r"\\\1", text)
