"""A folder in the published layout -> what it describes and, stage by stage, its tensors under our names.

Only headers are read until a tensor is asked for, and a stage's file is mapped only while that stage is
worked on: at full size the host never holds more than one tensor and the pages just read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cosyq.checkpoint import describe, fold, hyperyaml, keymap
from cosyq.checkpoint.tensors import LazyTensor, open_tensors
from cosyq.errors import CheckpointError
from cosyq.model.config import MAX_DIMENSION, ModelConfig
from cosyq.model.inventory import Module, Stage, inventory
from cosyq.text.tokenizer import TextTokenizer, assemble, parse_merges

YAML = "cosyvoice3.yaml"
QWEN = "CosyVoice-BlankEN"
QWEN_FILES = ("config.json", "tokenizer_config.json", "vocab.json", "merges.txt")
TEXT_FILES = (YAML, *(f"{QWEN}/{name}" for name in QWEN_FILES))
MAX_TEXT_BYTES = 64 << 20
NAMES_SHOWN = 6


def weight_files(llm: str) -> dict[Stage, str]:
    """The published file of each stage; any of them may also be its .safetensors twin."""
    return {"llm": llm, "flow": "flow.pt", "vocoder": "hift.pt"}


@dataclass(frozen=True)
class Checkpoint:
    """A checked checkpoint. `files` are all that was or will be read, by published name."""

    config: ModelConfig
    tokenizer: str  # a tokenizer.json
    weights: dict[Stage, Path]
    files: dict[str, Path]


@dataclass(frozen=True)
class StageTensors:
    """One stage's parameters, by the names of its network, and the text embedding among the LLM's."""

    path: Path
    tensors: dict[str, LazyTensor]

    def read(self, module: Module, parameter: str) -> Tensor:
        """A parameter as the checkpoint has it, on the host. Whether it is finite is seen where it is packed."""
        return self.tensors[_parameter_name(module, parameter)].read()

    def not_finite(self, module: Module, parameter: str) -> list[str]:
        """The published names of the tensors behind a parameter that hold NaN or infinity."""
        published = open_tensors(self.path)
        names = self.tensors[_parameter_name(module, parameter)].names
        return [name for name in names if not torch.isfinite(published[name].read()).all()]

    def dtype(self, module: Module, parameter: str) -> str:
        return str(self.tensors[_parameter_name(module, parameter)].dtype).removeprefix("torch.")


def open_checkpoint(folder: Path, llm: str = "llm.pt") -> Checkpoint:
    """Read everything but the weights, and check it.

    Raises:
        CheckpointError: a file is missing or damaged, or the description does not add up.
    """
    if not folder.is_dir():
        raise CheckpointError("no such folder", where=folder)
    weights = {stage: _find_weights(folder, name) for stage, name in weight_files(llm).items()}
    files = {str(path.relative_to(folder)): path for path in weights.values()}
    texts = {}
    for name in TEXT_FILES:
        files[name] = folder / name
        texts[name] = _read_text(folder / name)
    config = _describe(folder, texts, weights)
    return Checkpoint(config, _tokenizer(folder, texts, config), weights, files)


def open_stage(checkpoint: Checkpoint, stage: Stage, *, steps: tuple[int, ...]) -> StageTensors:
    """Map one stage's file and check every tensor's name and shape.

    Raises:
        CheckpointError: tensors are missing, left over or misshapen; the message names them.
    """
    path = checkpoint.weights[stage]
    tensors = _renamed(path, stage)
    tensors = _derived(tensors, stage, checkpoint.config, path, steps)
    expected = {
        _parameter_name(module, name): shape
        for module in inventory(stage, checkpoint.config, steps=steps)
        for name, shape in module.parameters.items()
    }
    _require(path, expected, tensors)
    return StageTensors(path, tensors)


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _parameter_name(module: Module, parameter: str) -> str:
    return f"{module.path}.{parameter}" if module.path else parameter


def _find_weights(folder: Path, name: str) -> Path:
    twin = (folder / name).with_suffix(".safetensors")
    for path in (twin, folder / name):
        if path.is_file():
            return path
    raise CheckpointError(
        f"neither {name} nor {twin.name} is there", where=folder, remedy="is this the folder of a checkpoint?"
    )


def _read_text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_TEXT_BYTES:
            raise CheckpointError("too large for what it should be", where=path)
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"cannot be read ({reason})", where=path) from None


def _json_object(path: Path, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"not JSON ({error})", where=path) from None
    if not isinstance(value, dict):
        raise CheckpointError("expected a JSON object", where=path)
    return value


def _describe(folder: Path, texts: dict[str, str], weights: dict[Stage, Path]) -> ModelConfig:
    qwen_path = folder / QWEN / "config.json"
    qwen = _json_object(qwen_path, texts[f"{QWEN}/config.json"])
    try:
        yaml = hyperyaml.load(texts[YAML])
        config = ModelConfig(
            llm=describe.describe_llm(yaml, qwen, _renamed(weights["llm"], "llm")),
            sampling=describe.describe_sampling(yaml),
            flow=describe.describe_flow(yaml, _renamed(weights["flow"], "flow")),
            vocoder=describe.describe_vocoder(yaml, _renamed(weights["vocoder"], "vocoder")),
        )
        _check_sizes(config)
        return config
    except KeyError as error:
        raise CheckpointError(f"{error.args[0]} is missing", where=f"{folder} ({YAML}, {QWEN}/config.json)") from None
    except (TypeError, ValueError) as error:
        raise CheckpointError(str(error), where=f"{folder} ({YAML}, {QWEN}/config.json)") from None


def _check_sizes(config: ModelConfig) -> None:
    """Raises ValueError for sizes that no network can be built from."""
    ModelConfig.from_dict(config.to_dict())  # the same bounds as a reader of the artifact will apply
    llm, flow, voc = config.llm, config.flow, config.vocoder
    positive = {
        "num_hidden_layers": llm.num_layers, "num_key_value_heads": llm.num_kv_heads, "head_dim": llm.head_dim,
        "depth": flow.depth, "heads": flow.heads, "dim_head": flow.head_dim, "token_mel_ratio": flow.token_mel_ratio,
        "static_chunk_size": flow.chunk_frames, "hop_len": voc.hop, "upsample_rates": len(voc.upsample_rates),
        "sampling_rate": voc.sample_rate, "pre_lookahead_len": flow.lookahead, "top_k": config.sampling.top_k,
        "conv_pos_embed groups": flow.conv_groups,
    }  # fmt: skip
    for name, value in positive.items():
        if not 0 < value <= MAX_DIMENSION:
            raise ValueError(f"{name} is {value}")
    if llm.num_heads % llm.num_kv_heads or llm.head_dim % 2 or flow.head_dim % 2 or flow.dim % flow.conv_groups:
        raise ValueError("attention heads or convolution groups do not divide their channels")
    if llm.speech_rows < llm.speech_vocab + 4 or flow.vocab != llm.speech_vocab:
        raise ValueError(
            f"{llm.speech_rows} speech rows and {flow.vocab} flow tokens do not fit {llm.speech_vocab} codes"
        )
    if flow.mel_dim != voc.mel_dim:
        raise ValueError(f"the flow makes {flow.mel_dim} mel channels, the vocoder takes {voc.mel_dim}")
    if voc.base_channels >> len(voc.upsample_rates) == 0:
        raise ValueError("too few vocoder channels for its upsampling stages")


def _tokenizer(folder: Path, texts: dict[str, str], config: ModelConfig) -> str:
    where = folder / QWEN
    vocab = _json_object(where / "vocab.json", texts[f"{QWEN}/vocab.json"])
    stated = _json_object(where / "tokenizer_config.json", texts[f"{QWEN}/tokenizer_config.json"])
    try:
        serialized = assemble(vocab, parse_merges(texts[f"{QWEN}/merges.txt"]), stated)
        size = len(TextTokenizer(serialized))
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise CheckpointError(f"the tokenizer's files do not fit together ({error})", where=where) from None
    if size > config.llm.text_rows:
        raise CheckpointError(
            f"the tokenizer has {size} entries, the text embedding {config.llm.text_rows} rows", where=where
        )
    return serialized


def _renamed(path: Path, stage: Stage) -> dict[str, LazyTensor]:
    """The file's tensors under our names; what inference does not need is left out."""
    rules = {"llm": keymap.LLM, "flow": keymap.FLOW, "vocoder": keymap.VOCODER}[stage]
    result: dict[str, LazyTensor] = {}
    unknown = []
    for name, tensor in open_tensors(path).items():
        try:
            ours = keymap.rename(keymap.plain_vocoder_name(name) if stage == "vocoder" else name, rules)
        except KeyError:
            unknown.append(name)
            continue
        if ours in result:
            raise CheckpointError(f"{name} and {result[ours].names[0]} are the same tensor", where=path)
        if ours is not None:
            result[ours] = tensor
    if unknown:
        raise CheckpointError(
            f"{len(unknown)} tensors are not part of a CosyVoice 3 {stage}: {_some(unknown)}", where=path
        )
    return result


def _derived(
    tensors: dict[str, LazyTensor], stage: Stage, config: ModelConfig, path: Path, steps: tuple[int, ...]
) -> dict[str, LazyTensor]:
    """Fold what is fixed: weight norm of the vocoder, AdaLN of the flow."""
    if stage == "vocoder":
        try:
            return fold.folded(tensors, keep="f0_predictor.")
        except CheckpointError as error:
            raise CheckpointError(error.what, where=path) from None
    if stage == "flow":
        first = tensors.get("adaln.time.0.weight")
        width = first.shape[1] if first and len(first.shape) == 2 else 0
        sources = {name: t for name, t in tensors.items() if name.startswith("adaln.")}
        _require(path, fold.adaln_sources(config.flow, width), sources)
        kept = {name: t for name, t in tensors.items() if name not in sources}
        for n in steps:
            kept[f"adaln.{n}"] = LazyTensor(
                tuple(name for t in sources.values() for name in t.names),
                (n, config.flow.modulation_width),
                torch.float32,
                partial(fold.adaln_table, sources, config.flow, n),
            )
        return kept
    return tensors


def _require(path: Path, expected: dict[str, tuple[int, ...]], found: dict[str, LazyTensor]) -> None:
    missing = [name for name in expected if name not in found]
    if missing:
        raise CheckpointError(f"{len(missing)} tensors are missing: {_some(missing)}", where=path)
    extra = [found[name].names[0] for name in found if name not in expected]
    if extra:
        raise CheckpointError(f"{len(extra)} tensors too many: {_some(extra)}", where=path)
    for name, shape in expected.items():
        if found[name].shape != shape:
            names = " and ".join(found[name].names)
            raise CheckpointError(
                f"tensor {names} has shape {list(found[name].shape)}, expected {list(shape)}", where=path
            )


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more
