"""An artifact read by nothing but docs/artifact.md, json and safetensors."""

import hashlib
import json
from pathlib import Path

from safetensors import safe_open


def read_manifest(folder):
    manifest = json.loads(Path(folder, "manifest.json").read_text("utf-8"))
    assert manifest["minimum_reader"] <= 1, "a newer reader is needed"
    digest = manifest.pop("digest")
    canonical = json.dumps(manifest, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert hashlib.sha256(canonical.encode()).hexdigest() == digest, "the manifest was changed"
    for name, record in manifest["files"].items():
        data = Path(folder, name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (record["bytes"], record["sha256"]), name
        if "header_sha256" in record:
            header = data[: 8 + int.from_bytes(data[:8], "little")]
            assert hashlib.sha256(header).hexdigest() == record["header_sha256"], name
    return manifest


def read_modules(folder):
    """(name, {parameter: tensor}) of every module, its weight as numbers."""
    manifest = read_manifest(folder)
    for stage in ("llm", "flow", "vocoder"):
        with safe_open(Path(folder, f"{stage}.safetensors"), framework="pt") as file:
            about = file.metadata()
            assert (about["cosyq_stage"], about["cosyq_recipe"]) == (stage, manifest["recipe_sha256"])
            for module in manifest["modules"]:
                if module["name"].partition(".")[0] == stage:
                    yield module["name"], parameters(file, module)


def parameters(file, module):
    path = module["name"].partition(".")[2]
    prefix = f"{path}." if path else ""
    stored = {key.removeprefix(prefix): key for key in list(file.keys()) if key.startswith(prefix)}
    stored = {key: file.get_tensor(name) for key, name in stored.items() if "." not in key or key[:7] == "weight."}
    form, extra = module["format"]["name"], ("SCB", "weight_format")
    plain = {key: tensor for key, tensor in stored.items() if "." not in key and key not in extra}
    if form == "int8":
        plain["weight"] = stored["weight"] * stored["SCB"][:, None] * 7.874015718698502e-3
    if form in ("nf4", "fp4"):
        plain["weight"] = four_bits(stored, form).reshape(module["shape"])
    return plain


def four_bits(stored, form):
    state = json.loads(bytes(stored[f"weight.quant_state.bitsandbytes__{form}"].tolist()))
    scales = stored["weight.absmax"]
    if "nested_offset" in state:
        outer = stored["weight.nested_absmax"].repeat_interleave(state["nested_blocksize"])[: len(scales)]
        scales = stored["weight.nested_quant_map"][scales.int()] * outer + state["nested_offset"]
    bytes_ = stored["weight"].flatten().int()
    codes = (bytes_[:, None] >> bytes_.new_tensor([4, 0])).flatten() & 15
    return stored["weight.quant_map"][codes] * scales.repeat_interleave(state["blocksize"])[: len(codes)]
