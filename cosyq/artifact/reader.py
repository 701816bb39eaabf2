"""Reading an artifact: check first, then build networks on the meta device and put the tensors in.

Opening checks what is cheap: the manifest's digest, every file's size, every safetensors header against the
manifest and against the model it describes, and the full hash of small files. `verify` hashes everything.
Nothing from an artifact is executed. yaml, bitsandbytes and the source checkpoint are not needed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from cosyq.artifact.ahead import taken
from cosyq.artifact.manifest import (
    FILE_NAME,
    STAGE_FILES,
    TOKENIZER_FILE,
    VOICE_FOLDER,
    FileRecord,
    Manifest,
    NewerSchemaError,
)
from cosyq.artifact.stagefile import DTYPES, read_header, views
from cosyq.errors import ArtifactError
from cosyq.model.inventory import STAGES, Module, Stage, inventory, skeleton
from cosyq.quantize.formats import Format, Specs, dequantize, dequantize_rows, module_tensors
from cosyq.quantize.linear import Matmul, PackedEmbedding, packed_linear
from cosyq.text.apart import Tokenizer, tokenizer_of

HASHED_ALWAYS = 16 << 20  # files up to this size are hashed whenever an artifact is opened
MAX_MANIFEST = 64 << 20
DAMAGED = "it was damaged or changed: quantize or download it again"


@dataclass(frozen=True)
class Artifact:
    """An artifact whose files are there and are what its manifest says."""

    folder: Path
    manifest: Manifest

    @cached_property
    def formats(self) -> dict[str, Format]:
        return {record.name: record.format for record in self.manifest.modules}

    def modules(self, stage: Stage) -> tuple[Module, ...]:
        return inventory(stage, self.manifest.model, steps=self.manifest.flow_steps)

    def voice_files(self) -> dict[str, Path]:
        """The voices that came with the artifact or were put beside them, by name."""
        return {path.stem: path for path in sorted((self.folder / VOICE_FOLDER).glob("*.safetensors"))}

    def tokenizer(self) -> Tokenizer:
        path, rows = self.folder / TOKENIZER_FILE, self.manifest.model.llm.text_rows
        try:
            tokenizer = tokenizer_of(path)
        except (OSError, ValueError) as error:
            raise ArtifactError(f"unusable tokenizer ({error})", where=path) from None
        if len(tokenizer) > rows:
            raise ArtifactError(f"has {len(tokenizer)} entries, the text embedding {rows} rows", where=path)
        return tokenizer


def read_manifest(folder: Path) -> Manifest:
    """The manifest alone, of a folder whose other files need not be there.

    Raises:
        ArtifactError: it is missing, damaged or too new, or names no whole artifact.
    """
    path = folder / FILE_NAME
    if not folder.is_dir():
        raise ArtifactError("no such artifact", where=folder, remedy="`cosyq quantize RECIPE` makes one")
    try:
        if path.stat().st_size > MAX_MANIFEST:
            raise ArtifactError("too large for a manifest", where=path)
        manifest = Manifest.from_json(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"holds no {FILE_NAME}", where=folder, remedy="is it an artifact of cosyq?") from None
    except NewerSchemaError as error:
        raise ArtifactError(str(error), where=path, remedy="upgrade cosyq") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"not a usable manifest ({error})", where=path, remedy=DAMAGED) from None
    needed = {*STAGE_FILES.values(), TOKENIZER_FILE}
    if missing := needed - manifest.files.keys():
        raise ArtifactError(f"does not list {', '.join(sorted(missing))}", where=path, remedy=DAMAGED)
    return manifest


def open_artifact(folder: Path) -> Artifact:
    """Read the manifest and check the files against it.

    Raises:
        ArtifactError: something is missing, damaged, out of place or too new.
    """
    artifact = Artifact(folder, read_manifest(folder))
    for name, record in artifact.manifest.files.items():
        check_file(folder / name, record, full=record.bytes <= HASHED_ALWAYS)
    for stage in STAGES:
        _check_stage(artifact, stage)
    return artifact


def check_file(path: Path, record: FileRecord, *, full: bool) -> None:
    """Raises ArtifactError unless the file has the recorded size and, when `full`, the recorded sha256."""
    try:
        size = path.stat().st_size
    except OSError:
        raise ArtifactError("missing", where=path, remedy=DAMAGED) from None
    if size != record.bytes:
        raise ArtifactError(f"has {size} bytes, expected {record.bytes}", where=path, remedy=DAMAGED)
    if full:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != record.sha256:
            raise ArtifactError(
                f"sha256 is {found[:12]}.., expected {record.sha256[:12]}..", where=path, remedy=DAMAGED
            )


def stage_tensors(modules: Iterable[Module], formats: dict[str, Format]) -> Specs:
    """Every tensor of a stage's file: name -> (dtype, shape)."""
    return {
        _tensor_name(module, name): spec
        for module in modules
        for name, spec in module_tensors(module, formats[module.name]).items()
    }


def _tensor_name(module: Module, tensor: str) -> str:
    return f"{module.path}.{tensor}" if module.path else tensor


def stage_metadata(stage: str, schema: int, recipe_sha256: str, revision: str | None) -> dict[str, str]:
    """What a stage file says about itself, so that a stray one can be placed."""
    return {
        "format": "pt",  # what other loaders look for
        "cosyq_schema": str(schema),
        "cosyq_stage": stage,
        "cosyq_recipe": recipe_sha256,
        "cosyq_source_revision": revision or "",
    }


def _check_stage(artifact: Artifact, stage: Stage) -> None:
    """The header must be the recorded one, of this stage and recipe, and describe exactly this model's tensors."""
    manifest = artifact.manifest
    path = artifact.folder / STAGE_FILES[stage]
    try:
        header, digest = read_header(path)
        formats, modules = artifact.formats, artifact.modules(stage)
        expected = stage_tensors(modules, formats)
    except KeyError as error:
        raise ArtifactError(f"the manifest does not say how {error} is stored", where=path, remedy=DAMAGED) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"unreadable ({error})", where=path, remedy=DAMAGED) from None
    metadata = header.pop("__metadata__", {})
    wanted = stage_metadata(stage, manifest.schema, manifest.recipe_sha256, manifest.source.revision)
    for key, value in wanted.items():
        if metadata.get(key) != value:
            raise ArtifactError(f"says {key} {metadata.get(key)!r}, expected {value!r}", where=path, remedy=DAMAGED)
    if digest != manifest.files[path.name].header_sha256:
        raise ArtifactError("its header does not hash to what the manifest says", where=path, remedy=DAMAGED)
    found = {name: (entry.get("dtype"), entry.get("shape")) for name, entry in header.items()}
    for name, (dtype, shape) in expected.items():
        if found.get(name) != (DTYPES[dtype], list(shape)):
            raise ArtifactError(
                f"tensor {name} is {found.get(name)}, expected {DTYPES[dtype]} {list(shape)}", where=path
            )
    if extra := found.keys() - expected.keys():
        raise ArtifactError(f"tensors that the model has no place for: {sorted(extra)[:5]}", where=path)


class StageFile:
    """The tensors of one stage, mapped, read one module at a time.

    placed: those that are on a device already.
    """

    def __init__(self, artifact: Artifact, stage: Stage, placed: Mapping[str, Tensor] = {}):
        self.path = artifact.folder / STAGE_FILES[stage]
        self.artifact, self._placed = artifact, placed
        try:
            self._handle: Any = safe_open(self.path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ArtifactError(f"unreadable ({error})", where=self.path, remedy=DAMAGED) from None

    def read(self, module: Module) -> dict[str, Tensor]:
        """A module's stored tensors, those on the host views of the mapped file."""
        names = module_tensors(module, self.artifact.formats[module.name])
        return {name: self._tensor(_tensor_name(module, name)) for name in names}

    def _tensor(self, name: str) -> Tensor:
        placed = self._placed.get(name)
        return self._handle.get_tensor(name) if placed is None else placed


def load_stage(
    artifact: Artifact, stage: Stage, *, device: torch.device, dtype: torch.dtype, matmul: Matmul
) -> nn.Module:
    """The stage's network on `device`, its matrix products in `dtype`, packed layers multiplied by `matmul`.

    Raises:
        ArtifactError: a packed tensor contradicts itself.
    """
    network = skeleton(stage, artifact.manifest.model, steps=artifact.manifest.flow_steps, dtype=dtype)
    file = StageFile(artifact, stage, _read_ahead(artifact, stage, device))
    for module in artifact.modules(stage):
        if module.name == "llm.text_embedding":
            continue  # looked up on the host
        fmt = artifact.formats[module.name]
        tensors = file.read(module)
        try:
            _install(network, module, fmt, tensors, device, dtype, matmul)
        except ValueError as error:
            raise ArtifactError(f"{module.name}: {error}", where=file.path, remedy=DAMAGED) from None
    return network.eval()


def _read_ahead(artifact: Artifact, stage: Stage, device: torch.device) -> dict[str, Tensor]:
    """What is on the device already, read with the header that was checked; states are read on the host."""
    path = artifact.folder / STAGE_FILES[stage]
    record, there = artifact.manifest.files[path.name], taken(path)
    if there is None or device.type != "cuda" or there.whole != record.bytes:
        return {}
    with suppress(ValueError):
        found = views(torch.as_tensor(there, device=device), there.header, record.header_sha256)
        return {name: tensor for name, tensor in found.items() if "quant_state" not in name}
    return {}


def _install(
    network: nn.Module,
    module: Module,
    fmt: Format,
    tensors: dict[str, Tensor],
    device: torch.device,
    dtype: torch.dtype,
    matmul: Matmul,
) -> None:
    target = network.get_submodule(module.path)
    if fmt.is_float:
        for name, tensor in tensors.items():
            # Rows of an embedding are looked up, not multiplied: they stay as stored.
            kept = module.kind == "exact" or isinstance(target, nn.Embedding)
            value = tensor.to(device, tensor.dtype if kept else dtype, copy=True)
            target.register_parameter(name, nn.Parameter(value, requires_grad=False))
        return
    bias = tensors.pop("bias").to(device, dtype, copy=True) if "bias" in tensors else None
    # The state's JSON is read once, on the host; everything else is multiplied with.
    placed = {name: t if "quant_state" in name else t.to(device, copy=True) for name, t in tensors.items()}
    if isinstance(target, nn.Embedding):
        replacement: nn.Module = PackedEmbedding(placed)
    else:
        out, width = module.parameters["weight"]
        replacement = packed_linear(fmt, (out, width), placed, bias, matmul=matmul, dtype=dtype)
    parent, _, leaf = module.path.rpartition(".")
    setattr(network.get_submodule(parent), leaf, replacement)


def text_rows(artifact: Artifact) -> Callable[[list[int]], Tensor]:
    """A look-up of text ids -> [n, hidden] float32, from the mapped file: only the rows asked for are read."""
    module = artifact.modules("llm")[0]
    tensors = StageFile(artifact, "llm").read(module)
    weight, scales = tensors["weight"], tensors.get("SCB")

    def look_up(ids: list[int]) -> Tensor:
        index = torch.tensor(ids, dtype=torch.int64)
        return weight[index].float() if scales is None else dequantize_rows(weight[index], scales[index])

    return look_up


def unpacked(artifact: Artifact, file: StageFile, module: Module) -> dict[str, Tensor]:
    """A module's parameters as stored, on the host, the weight dequantized to float32."""
    tensors = file.read(module)
    fmt = artifact.formats[module.name]
    if module.kind == "exact" or fmt.is_float:
        return tensors
    weight = dequantize(fmt, tensors, module.parameters["weight"])
    return {name: weight if name == "weight" else tensors[name] for name in module.parameters}
