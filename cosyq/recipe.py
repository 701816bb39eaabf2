"""A recipe: which checkpoint, which format for what, where to put it. Strict: what is not known is an error."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from cosyq.errors import RecipeError

MAX_BYTES = 1 << 20
Weights = Literal["int8", "nf4", "fp4", "bf16", "fp16", "fp32"]
FloatWeights = Literal["bf16", "fp16", "fp32"]
Blocksize = Literal[32, 64, 128, 256, 512, 1024, 2048, 4096]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
RepoId = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")]
MetricName = Annotated[str, StringConstraints(pattern=r"^[a-z]+\.[a-z0-9]+$")]
# Not a program of the user's, as `cosyq eval` takes: whoever wrote a recipe runs nothing.
RecognizerName = Annotated[str, StringConstraints(pattern=r"^(pocketsphinx|whisper|(whisper|transformers):.{1,500})$")]
Bound = Annotated[float, Field(allow_inf_nan=False)]
Steps = Annotated[int, Field(ge=1, le=100)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Source(_Strict):
    """Where the checkpoint is: a Hub `repo` at a pinned `revision`, a folder `path`, or one that is `bundled`."""

    repo: RepoId | None = None
    revision: Annotated[str, StringConstraints(pattern=r"^[\w./-]{1,200}$")] | None = None
    path: str | None = None
    bundled: Literal["mini"] | None = None
    llm: Literal["llm.pt", "llm.rl.pt"] = "llm.pt"
    sha256: dict[str, Sha256] = Field(default_factory=dict)  # file name -> what it must hash to

    @model_validator(mode="after")
    def _one_place(self) -> Source:
        if [self.repo, self.path, self.bundled].count(None) != 2:
            raise ValueError("give one of repo (with a revision), path and bundled")
        if (self.repo is None) != (self.revision is None):
            raise ValueError("repo and revision belong together")
        return self


class _Packable(_Strict):
    weights: Weights
    blocksize: Blocksize | None = None
    double_quant: bool | None = None

    @model_validator(mode="after")
    def _options_fit(self) -> _Packable:
        if self.weights not in ("nf4", "fp4") and (self.blocksize is not None or self.double_quant is not None):
            raise ValueError(f"blocksize and double_quant are options of nf4 and fp4, not of {self.weights}")
        return self


class Calibration(_Strict):
    """Packing that makes up for its errors on what the model itself says: so many utterances of it."""

    sequences: Annotated[int, Field(ge=1, le=1024)]


class Refinement(Calibration):
    """And codes, norms and biases that are then learned, in so many passes over the utterances."""

    refine: Annotated[int, Field(ge=1, le=16)] | None = None

    @model_validator(mode="after")
    def _something_to_judge_by(self) -> Refinement:
        if self.refine is not None and self.sequences < 2:
            raise ValueError("refine needs two sequences or more: what is learned on one is judged on another")
        return self


class _Calibrated(_Packable):
    calibrate: Calibration | None = None

    @model_validator(mode="after")
    def _something_to_calibrate(self) -> _Calibrated:
        if self.calibrate is not None and self.weights not in ("int8", "nf4", "fp4"):
            raise ValueError(f"calibrate is an option of int8, nf4 and fp4, not of {self.weights}")
        return self


class LLMStage(_Calibrated):
    calibrate: Refinement | None = None


class FlowStage(_Calibrated):
    steps: Annotated[list[Steps], Field(min_length=1, max_length=8)] = [10]

    @model_validator(mode="after")
    def _no_repeats(self) -> FlowStage:
        if len(set(self.steps)) != len(self.steps):
            raise ValueError("steps repeat")
        return self


class VocoderStage(_Strict):
    weights: FloatWeights = "fp32"


class Stages(_Strict):
    llm: LLMStage
    flow: FlowStage
    vocoder: VocoderStage = VocoderStage()


class Rule(_Packable):
    match: Annotated[str, StringConstraints(min_length=1, max_length=500)]


class VoiceEntry(_Strict):
    """A voice to carry in the artifact: a ready voice `file`, or a recording and what is said in it, to be enrolled.

    A `bundled` one is a ready voice that comes with the bundled checkpoint.
    Paths are relative to the working directory. `audio` may be an https:// address, and `sha256` then says of what.
    """

    name: Name
    file: str | None = None
    audio: str | None = None
    bundled: Name | None = None
    transcript: Annotated[str, StringConstraints(max_length=4096)] | None = None  # "": only the timbre is taken
    sha256: Sha256 | None = None

    @property
    def remote(self) -> bool:
        return self.audio is not None and "://" in self.audio

    @model_validator(mode="after")
    def _one_origin(self) -> VoiceEntry:
        if [self.file, self.audio, self.bundled].count(None) != 2:
            raise ValueError("give one of file, a ready voice, audio, a recording, and bundled")
        if (self.audio is None) != (self.transcript is None):
            raise ValueError("audio and its transcript belong together")
        if self.remote and not re.fullmatch(r"https://[\w.-]+(:\d+)?/[!-~]+", self.audio or "", re.ASCII):
            raise ValueError("audio is a path, or an https:// address without spaces")
        if self.remote and self.sha256 is None:
            raise ValueError("remote audio needs its sha256")
        return self


class Limit(_Strict):
    """What a metric of the artifact may be, and how much worse than the full-precision model's, in its own unit.

    Its 95 % interval has to keep to it whole: by `eval.gate`, the bound that is worse counts, not the value.
    """

    max: Bound | None = None
    min: Bound | None = None
    max_difference: Annotated[Bound, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _limits(self) -> Limit:
        if self.max is None and self.min is None and self.max_difference is None:
            raise ValueError("give max, min or max_difference")
        return self


class Measuring(_Strict):
    """How much a gate measures. Fewer than eight utterances have no interval to speak of.

    language: of cosyq's own texts, only the ones in it; cosyq-mini is given English alone.
    mos: predict listeners' opinion, which spoken.mos needs, as spoken.errors a recognizer.
    """

    sequences: Annotated[int, Field(ge=8, le=100_000)] = 32
    language: Literal["en", "zh"] | None = None
    recognizer: RecognizerName | None = None
    mos: bool = False


class Recipe(_Strict):
    version: Literal[1]
    name: Name
    source: Source
    stages: Stages
    rules: list[Rule] = Field(default_factory=list)
    voices: list[VoiceEntry] = Field(default_factory=list)
    gate: dict[MetricName, Limit] = Field(default_factory=dict)
    evaluate: Measuring = Measuring()
    output: str | None = None

    @model_validator(mode="after")
    def _voices_fit(self) -> Recipe:
        names = [voice.name for voice in self.voices]
        if len(set(names)) != len(names):
            raise ValueError("two voices have the same name")
        if self.source.bundled is None and any(voice.bundled for voice in self.voices):
            raise ValueError("a bundled voice goes with a bundled source")
        return self

    @property
    def enrols(self) -> bool:
        """Whether a voice is to be made from a recording."""
        return any(voice.audio is not None for voice in self.voices)

    def resolved(self) -> dict[str, Any]:
        """The recipe as it shapes the artifact's bytes: without the folders and addresses it happened to name.

        A voice counts by name, transcript and sha256, which `voices.entries.pin` fills in. A gate lets an artifact
        through or not, and changes nothing in it. A stage that is not calibrated, or not refined, does not say so:
        recipes from before there was such an option keep their digest.
        """
        not_in_bytes = dict.fromkeys(("output", "gate", "evaluate"), True)
        data = self.model_dump(
            exclude={**not_in_bytes, "source": {"path"}, "voices": {"__all__": {"file", "audio", "bundled"}}},
        )
        for stage in data["stages"].values():
            for options, key in ((stage, "calibrate"), (stage.get("calibrate") or {}, "refine")):
                if options.get(key, ...) is None:
                    del options[key]
        return data

    def digest(self) -> str:
        """sha256 of `resolved`, independent of spelling, order and comments."""
        text = json.dumps(self.resolved(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def shipped_folder() -> Path:
    """The folder of the recipes that come with cosyq: inside the package, or beside it in a checkout."""
    inside = Path(__file__).parent / "recipes"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "recipes"


def bundled_checkpoint(name: str) -> Path:
    """The folder of a checkpoint that comes with cosyq: inside the package, or where a checkout has it."""
    inside = Path(__file__).parent / name
    return inside if inside.is_dir() else Path(__file__).parent.parent / "training" / name / "model"


def shipped_recipes() -> list[str]:
    return sorted(path.stem for path in shipped_folder().glob("*.yaml"))


def find_recipe(name_or_path: str) -> Path:
    """A path to a recipe, given one or the name of a shipped recipe."""
    path = Path(name_or_path)
    if path.is_file():
        return path
    if name_or_path in shipped_recipes():
        return shipped_folder() / f"{name_or_path}.yaml"
    raise RecipeError("no such recipe", where=name_or_path, remedy=f"shipped are: {', '.join(shipped_recipes())}")


def load_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """Read and check a recipe, `overrides` being `dotted.key=value` with the value in YAML.

    Raises:
        RecipeError: naming the key, what was found and what is allowed.
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot be read ({error})", where=path) from None
    return parse_recipe(text, str(path), overrides or [])


def parse_recipe(text: str, where: str, overrides: list[str]) -> Recipe:
    if len(text) > MAX_BYTES:
        raise RecipeError(f"{len(text)} characters are too many for a recipe", where=where)
    data = _parse_yaml(text, where)
    if not isinstance(data, dict):
        raise RecipeError("a recipe is a mapping of keys", where=where)
    for override in overrides:
        _override(data, override)
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError(_explain(error), where=where) from None


def to_yaml(data: Any) -> str:
    """Plain data as YAML, innermost mappings and lists in a line each, keys in their order."""
    text: str = yaml.safe_dump(data, default_flow_style=None, sort_keys=False, allow_unicode=True, width=1 << 16)
    return text


class _UniqueKeys(yaml.SafeLoader):
    pass


def _unique_mapping(loader: _UniqueKeys, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value]
    for key in keys:
        if isinstance(key, (dict, list)) or keys.count(key) > 1:
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: key {key!r} is there twice or is no plain key")
    return loader.construct_mapping(node, deep=True)


_UniqueKeys.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _UniqueKeys)  # a SafeLoader: tags that construct objects are refused
    except (yaml.YAMLError, RecursionError) as error:
        raise RecipeError(f"not YAML ({error})", where=where) from None


def _override(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError("expected KEY=VALUE", where=f"--set {override}")
    *parents, last = key.split(".")
    target: Any = data
    for part in parents:
        if isinstance(target, list) and part.isdigit() and int(part) < len(target):
            target = target[int(part)]
        elif isinstance(target, dict):
            target = target.setdefault(part, {})
        else:
            target = None
    value = _parse_yaml(text, f"--set {override}")
    if isinstance(target, dict):
        target[last] = value
    elif isinstance(target, list) and last.isdigit() and int(last) < len(target):
        target[int(last)] = value
    else:
        raise RecipeError("leads into something that is no mapping", where=f"--set {override}")


def _explain(error: ValidationError) -> str:
    lines = []
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            lines.append(f"{where}: unknown key, valid here: {', '.join(_valid_keys(problem['loc']))}")
        elif problem["type"] == "missing":
            lines.append(f"{where}: missing")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            found = f", found {problem['input']!r}"[:80]
            lines.append(f"{where}: {message}{found}" if where else message)
    return " | ".join(lines)


def _valid_keys(location: tuple[Any, ...]) -> list[str]:
    model: Any = Recipe
    for part in location[:-1]:
        if isinstance(part, int) or part not in model.model_fields:  # an index, or a key of the reader's own choice
            continue
        annotation = model.model_fields[part].annotation
        inner = getattr(annotation, "__args__", (annotation,))
        model = next(kind for kind in inner if isinstance(kind, type) and issubclass(kind, BaseModel))
    return list(model.model_fields)
