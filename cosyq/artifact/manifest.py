"""manifest.json as a value. Nothing in it depends on a clock, a path or an order of execution."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

from cosyq.artifact.names import STAGE_FILES
from cosyq.model.config import ModelConfig
from cosyq.quantize.formats import Format
from cosyq.text import tokenizer

SCHEMA = 1  # what this code writes
READER = 1  # the newest `minimum_reader` that this code satisfies
FILE_NAME = "manifest.json"
TOKENIZER_FILE, RECIPE_FILE, VOICE_FOLDER = tokenizer.FILE_NAME, "recipe.yaml", "voices"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,119}")
_PATH = re.compile(rf"({VOICE_FOLDER}/)?{_NAME.pattern}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class ModuleRecord:
    """One module as it was packed; `rms_error` is |dequantized - source| / |source| of its weight,
    or of a norm or bias that was learned, whichever is larger.

    weighted_error: the same of what the layer gives out on the inputs that it was calibrated on, where it was.
    """

    name: str
    format: Format
    rule: str
    shape: tuple[int, ...]
    source_dtype: str
    bytes: int
    rms_error: float
    weighted_error: float | None = None


@dataclass(frozen=True)
class FileRecord:
    """One file; `header_sha256` covers the length and header of a safetensors file, None for others."""

    bytes: int
    sha256: str
    header_sha256: str | None = None


@dataclass(frozen=True)
class SourceRecord:
    """Where the weights came from. `files` maps each source file to its sha256."""

    repo: str | None
    revision: str | None
    files: dict[str, str]


@dataclass(frozen=True)
class Manifest:
    name: str
    source: SourceRecord
    recipe: dict[str, Any]  # as resolved, overrides included; of its keys, `_recipe` checks those that are asked for
    recipe_sha256: str
    model: ModelConfig
    flow_steps: tuple[int, ...]
    modules: tuple[ModuleRecord, ...]
    files: dict[str, FileRecord]
    versions: dict[str, str]
    device: str
    schema: int = SCHEMA
    minimum_reader: int = 1

    @property
    def bundled(self) -> str | None:
        """The name of the checkpoint that came with cosyq, where it was made from one."""
        return self.recipe["source"].get("bundled")

    @property
    def one_sentence(self) -> bool:
        """Whether the language model ends after a sentence whatever follows: cosyq-mini learnt of single ones."""
        return self.bundled == "mini"

    @property
    def digest(self) -> str:
        """sha256 of all of it, which `to_json` ends in: artifacts with the same one hold the same bytes."""
        return json.loads(self.to_json())["digest"]

    def to_json(self) -> str:
        """Canonical text, ending in a digest of itself."""
        body = {
            "schema": self.schema,
            "minimum_reader": self.minimum_reader,
            "name": self.name,
            "source": {"repo": self.source.repo, "revision": self.source.revision, "files": self.source.files},
            "recipe": self.recipe,
            "recipe_sha256": self.recipe_sha256,
            "model": self.model.to_dict(),
            "flow_steps": list(self.flow_steps),
            "files": {name: _drop_none(record.__dict__) for name, record in sorted(self.files.items())},
            "versions": self.versions,
            "device": self.device,
            "modules": [_drop_none({**record.__dict__, "format": record.format.to_dict()}) for record in self.modules],
        }
        return json.dumps({**body, "digest": _digest(body)}, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Strict inverse of `to_json`.

        Raises:
            NewerSchemaError: a newer cosyq wrote it.
            ValueError: anything else that is wrong with it.
        """
        data = json.loads(text)
        if not isinstance(data, dict):
            raise ValueError("expected a JSON object")
        minimum = data.get("minimum_reader")
        if isinstance(minimum, int) and minimum > READER:
            raise NewerSchemaError(f"schema {data.get('schema')} needs a reader of {minimum}; this one is {READER}")
        if data.pop("digest", None) != _digest(data):
            raise ValueError("its digest does not match its content")
        try:
            return cls(
                name=_text(data["name"]),
                source=SourceRecord(
                    repo=_text_or_none(data["source"]["repo"]),
                    revision=_text_or_none(data["source"]["revision"]),
                    files={str(k): _hash(v) for k, v in data["source"]["files"].items()},
                ),
                recipe=_recipe(data["recipe"]),
                recipe_sha256=_hash(data["recipe_sha256"]),
                model=ModelConfig.from_dict(data["model"]),
                flow_steps=tuple(_count(n) for n in data["flow_steps"]),
                modules=tuple(_module(entry) for entry in data["modules"]),
                files={_path(k): _file(v) for k, v in data["files"].items()},
                versions={str(k): str(v) for k, v in data["versions"].items()},
                device=_text(data["device"]),
                schema=_count(data["schema"]),
                minimum_reader=_count(data["minimum_reader"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"a key is missing or of the wrong type ({error})") from None


class NewerSchemaError(Exception):
    """The artifact was written for a later reader."""


def _drop_none(data: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if value is not None}


def _digest(body: dict[str, Any]) -> str:
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected text, found {value!r}")
    return value


def _text_or_none(value: Any) -> str | None:
    return None if value is None else _text(value)


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 53:
        raise ValueError(f"expected a count, found {value!r}")
    return value


def _hash(value: Any) -> str:
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise ValueError(f"expected a sha256, found {value!r}")
    return value


def _name(value: Any) -> str:
    if not _NAME.fullmatch(_text(value)):
        raise ValueError(f"{value!r} is not a name")
    return value


def _recipe(data: Any) -> dict[str, Any]:
    """What is asked of a recipe later is there: the source's file and bundled name, the stages' formats."""
    source, stages = data["source"], data["stages"]
    _name(source["llm"])
    if source.get("bundled") is not None:
        _name(source["bundled"])
    for options in (*stages.values(), *(stages[stage] for stage in STAGE_FILES)):
        _text(options["weights"])
    return dict(data)


def _path(value: str) -> str:
    if not _PATH.fullmatch(value):
        raise ValueError(f"{value!r} is not the name of a file in an artifact")
    return value


def _file(data: dict[str, Any]) -> FileRecord:
    header = data.get("header_sha256")
    return FileRecord(_count(data["bytes"]), _hash(data["sha256"]), _hash(header) if header is not None else None)


def _module(data: dict[str, Any]) -> ModuleRecord:
    return ModuleRecord(
        name=_text(data["name"]),
        format=Format.from_dict(data["format"]),
        rule=_text(data["rule"]),
        shape=tuple(_count(n) for n in data["shape"]),
        source_dtype=_text(data["source_dtype"]),
        bytes=_count(data["bytes"]),
        rms_error=float(data["rms_error"]),
        weighted_error=float(data["weighted_error"]) if "weighted_error" in data else None,
    )
