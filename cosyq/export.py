"""The language model of an artifact as a folder that transformers loads, its packed layers by bitsandbytes.

Qwen2 with the speech ids as its vocabulary. Text is not among them: it comes in as embeddings, and the table of those
lies beside the model as the artifact has it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from cosyq.artifact.manifest import TOKENIZER_FILE, Manifest
from cosyq.artifact.reader import DAMAGED, Artifact, StageFile, unpacked
from cosyq.artifact.stagefile import StageFileWriter
from cosyq.artifact.writer import check_room, new_folder
from cosyq.errors import ArtifactError
from cosyq.model.inventory import Module
from cosyq.quantize.formats import Format, Specs, module_tensors, stored_bytes

MODEL_FILE, TEXT_FILE = "model.safetensors", "text_embedding.safetensors"
TEXT = "llm.text_embedding"
NAMES = {"llm.speech_embedding": "model.embed_tokens", "llm.norm": "model.norm", "llm.head": "lm_head"}
POSITIONS = 32_768  # of Qwen2-0.5B
DTYPE_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
README = """# The language model of Fun-CosyVoice3, exported by cosyq

Text in, speech ids out, 25 a second; flow and vocoder, which make sound of them, are not here. The ids are the model's
vocabulary. Text comes in as embeddings: rows of `text_embedding.safetensors`, after a start id, before a task id.

```python
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

llm = AutoModelForCausalLM.from_pretrained(".")
table = load_file("text_embedding.safetensors")
text = "You are a helpful assistant.<|endofprompt|>Hello there."
ids = torch.tensor(AutoTokenizer.from_pretrained(".")(text)["input_ids"])
rows = table["weight"][ids].float()
if "SCB" in table:  # in eight bits, with a scale a row
    rows = rows * table["SCB"][ids, None] / 127
start, task = llm.get_input_embeddings()(
    torch.tensor([llm.config.cosyq["start_of_speech"], llm.config.cosyq["task"]], device=llm.device)
)
prompt = torch.stack([start, *rows.to(start), task])[None]
speech = llm.generate(inputs_embeds=prompt, max_new_tokens=200)
```

Packed layers are bitsandbytes' own, as `quantization_config` says. Eight bits: transformers has bitsandbytes round the
activations to eight bits too, which cosyq's own engines do not.
"""


@dataclass(frozen=True)
class _Layer:
    """A module and how it is written: packed as it is stored, or as a float."""

    module: Module
    stored: Format
    written: Format

    @property
    def name(self) -> str:
        return NAMES.get(self.module.name, self.module.name.replace("llm.", "model.", 1))

    @property
    def specs(self) -> Specs:
        return {f"{self.name}.{key}": spec for key, spec in module_tensors(self.module, self.written).items()}


def export_llm(artifact: Artifact, output: Path) -> None:
    """Write the folder; it appears whole or not at all.

    transformers knows one packed format a model: that of most layers goes along, and what is packed otherwise is
    unpacked to float32. A language model in 16 bits stays in them.

    Raises:
        ArtifactError: the folder exists or cannot be written, or a packed tensor contradicts itself.
    """
    layers = _layers(artifact)
    specs = {name: spec for layer in layers for name, spec in layer.specs.items()}
    file = StageFile(artifact, "llm")
    text = next(module for module in artifact.modules("llm") if module.name == TEXT)
    table = module_tensors(text, artifact.formats[TEXT])
    check_room(output, stored_bytes(specs) + stored_bytes(table))
    metadata = {"format": "pt"}
    with new_folder(output, force=False) as folder:
        with StageFileWriter(folder / MODEL_FILE, specs, metadata) as model:
            for layer in layers:
                for key, tensor in _tensors(file, layer):
                    model.write(f"{layer.name}.{key}", tensor)
        with StageFileWriter(folder / TEXT_FILE, table, metadata) as rows:
            for key, tensor in file.read(text).items():
                rows.write(key, tensor)
        (folder / TOKENIZER_FILE).write_bytes((artifact.folder / TOKENIZER_FILE).read_bytes())
        (folder / "README.md").write_text(README, "utf-8")
        for name, content in _configuration(artifact.manifest, layers).items():
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def _layers(artifact: Artifact) -> list[_Layer]:
    modules = [module for module in artifact.modules("llm") if module.name != TEXT]
    packed = Counter(
        artifact.formats[module.name].name
        for module in modules
        if module.kind == "matrix" and not artifact.formats[module.name].is_float
    )
    kept = packed.most_common(1)[0][0] if packed else None
    layers = []
    for module in modules:
        stored = artifact.formats[module.name]
        stays = stored.is_float or (module.kind == "matrix" and stored.name == kept)
        layers.append(_Layer(module, stored, stored if stays else Format("fp32")))
    return layers


def _tensors(file: StageFile, layer: _Layer) -> Iterator[tuple[str, Tensor]]:
    if layer.written == layer.stored:
        yield from file.read(layer.module).items()
        return
    try:
        yield from unpacked(file.artifact, file, layer.module).items()
    except ValueError as error:
        raise ArtifactError(f"{layer.module.name}: {error}", where=file.path, remedy=DAMAGED) from None


def _configuration(manifest: Manifest, layers: list[_Layer]) -> dict[str, dict[str, Any]]:
    llm = manifest.model.llm
    matrices = [layer for layer in layers if layer.module.kind == "matrix"]
    packing = next((layer.written for layer in matrices if not layer.written.is_float), None)
    floats = {layer.written.name for layer in matrices if layer.written.is_float}
    computed = DTYPE_NAMES[floats.pop()] if packing is None and len(floats) == 1 else "float32"
    ends = list(range(llm.speech_vocab, llm.speech_rows))
    config: dict[str, Any] = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": llm.speech_rows,
        "hidden_size": llm.hidden_size,
        "intermediate_size": llm.intermediate_size,
        "num_hidden_layers": llm.num_layers,
        "num_attention_heads": llm.num_heads,
        "num_key_value_heads": llm.num_kv_heads,
        "head_dim": llm.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": llm.rms_norm_eps,
        "rope_theta": llm.rope_theta,
        "max_position_embeddings": POSITIONS,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": ends,
        "dtype": computed,
        "torch_dtype": computed,  # as releases before the fifth call it
        "cosyq": {
            "artifact": manifest.name,
            "recipe_sha256": manifest.recipe_sha256,
            "source": {"repo": manifest.source.repo, "revision": manifest.source.revision},
            "start_of_speech": llm.sos,
            "task": llm.task_id,
        },
    }
    if packing is not None:
        unpacked_ = [layer.name for layer in matrices if layer.written.is_float]
        config["quantization_config"] = _quantization(packing, unpacked_)
    return {
        "config.json": config,
        "generation_config.json": {"eos_token_id": ends, "do_sample": True},
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"},
    }


def _quantization(fmt: Format, unpacked_: list[str]) -> dict[str, Any]:
    common = {"quant_method": "bitsandbytes", "llm_int8_skip_modules": unpacked_}
    if not fmt.is_four_bit:
        return {**common, "load_in_8bit": True, "load_in_4bit": False, "llm_int8_threshold": 6.0}
    return {
        **common,
        "load_in_8bit": False,
        "load_in_4bit": True,
        "bnb_4bit_quant_type": fmt.name,
        "bnb_4bit_use_double_quant": fmt.double_quant,
        "bnb_4bit_compute_dtype": "float32",
        "bnb_4bit_quant_storage": "uint8",
    }
