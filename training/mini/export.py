"""Put the checkpoint folder together: published layout, encoders as ONNX, and a voice of every speaker.

python -m training.mini.export --checkpoints DIR --output DIR [--no-onnx]
"""

from __future__ import annotations

import argparse
import math
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

from cosyq.checkpoint.reader import QWEN, QWEN_FILES, open_checkpoint
from cosyq.voices.voice import Voice
from training.mini import layout
from training.mini.config import MEL_BINS, MEL_HOP, MINI, SAMPLES_PER_TOKEN, SPEAKERS, Folders
from training.mini.data import Teacher
from training.mini.encode import load_encoders
from training.mini.features import WHISPER_HOP, acoustic_mel, speaker_fbank, to_16k, whisper_mel
from training.mini.networks.speaker import SpeakerEncoder
from training.mini.networks.tokenizer import SpeechTokenizer

WEIGHTS = ("llm", "flow", "hift")
TRANSCRIPTS = (
    "The old farmer carried a basket of fresh bread.",
    "My brother found a silver coin near the river.",
    "She opened the window and listened to the rain.",
    "Our teacher told the class a very long story.",
    "The children painted the fence behind the house.",
)
ONNX_OPSET = 17
SMALL_WEIGHT = 1024  # numbers; below it a cast costs more than it saves


@torch.inference_mode()
def enrol(
    name: str, speaker: int, transcript: str, teacher: Teacher, encoders: tuple[SpeechTokenizer, SpeakerEncoder]
) -> Voice:
    """A voice of about three seconds, as enrolment would make it of a recording."""
    wave = torch.from_numpy(teacher.read(transcript, speaker).wave).float()[None] / 32768
    low = to_16k(wave)
    feats = whisper_mel(low)
    tokens = encoders[0](feats, torch.tensor([low.shape[1] // WHISPER_HOP]))[0]
    mel = acoustic_mel(wave)[0].T
    count = min(len(tokens), len(mel) * MEL_HOP // SAMPLES_PER_TOKEN)
    return Voice(
        name=name,
        speaker=encoders[1](speaker_fbank(low))[0].clone(),
        prompt_tokens=tokens[:count].clone(),
        prompt_mel=mel[: count * SAMPLES_PER_TOKEN // MEL_HOP].contiguous().clone(),
        transcript=transcript,
    )


def store_half(path: Path) -> None:
    """Keep an ONNX file's weights in float16, each with a cast behind it: half the size, the same interface."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.load(path)
    casts = []
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and math.prod(tensor.dims) > SMALL_WEIGHT:
            name, values = tensor.name, numpy_helper.to_array(tensor)
            tensor.CopyFrom(numpy_helper.from_array(values.astype("float16"), f"{name}.half"))
            casts.append(helper.make_node("Cast", [f"{name}.half"], [name], to=TensorProto.FLOAT))
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*casts, *nodes])
    onnx.checker.check_model(model)
    onnx.save(model, path)


def write_onnx(folder: Path, encoders: tuple[SpeechTokenizer, SpeakerEncoder]) -> None:
    """speech_tokenizer_v3.onnx and campplus.onnx, with the published inputs and outputs."""
    tokenizer, speaker = encoders
    torch.onnx.export(
        tokenizer,
        (torch.randn(1, 128, 301), torch.tensor([301], dtype=torch.int32)),
        str(folder / "speech_tokenizer_v3.onnx"),
        input_names=["feats", "feats_length"],
        output_names=["indices"],
        dynamic_axes={"feats": {2: "frames"}, "indices": {1: "tokens"}},
        opset_version=ONNX_OPSET,
        dynamo=False,
    )
    torch.onnx.export(
        speaker,
        (torch.randn(1, 301, MEL_BINS),),
        str(folder / "campplus.onnx"),
        input_names=["input"],
        output_names=["output"],
        dynamic_axes={"input": {0: "batch", 1: "frames"}, "output": {0: "batch"}},
        opset_version=ONNX_OPSET,
        dynamo=False,
    )
    for name in ("speech_tokenizer_v3", "campplus"):
        store_half(folder / f"{name}.onnx")


def export(folders: Folders, output: Path, *, onnx: bool) -> None:
    """Raises FileNotFoundError when a stage has no checkpoint yet, CheckpointError when the result does not open."""
    shutil.rmtree(output, ignore_errors=True)
    (output / QWEN).mkdir(parents=True)
    for name in WEIGHTS:
        layout.write_weights(output, {name: load_file(folders.checkpoint(name))})
    for name in QWEN_FILES:
        shutil.copy(folders.text_tokenizer / name, output / QWEN / name)
    layout.write_yaml(output, MINI)
    encoders = load_encoders(folders, torch.device("cpu"))
    teacher = Teacher()
    (output / "voices").mkdir()
    for number, ((name, _, _), transcript) in enumerate(zip(SPEAKERS, TRANSCRIPTS, strict=True)):
        voice = enrol(name, number, transcript, teacher, encoders)
        voice.check(MINI.flow, name)
        (output / "voices" / f"{name}.safetensors").write_bytes(voice.to_bytes())
    if onnx:
        write_onnx(output, encoders)
    open_checkpoint(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--no-onnx", action="store_true", help="leave the two encoders out")
    args = parser.parse_args()
    export(Folders(args.output, args.checkpoints), args.output, onnx=not args.no_onnx)
    for file in sorted(path for path in args.output.rglob("*") if path.is_file()):
        print(f"{file.stat().st_size:12,} {file.relative_to(args.output)}")
    print(f"{sum(path.stat().st_size for path in args.output.rglob('*') if path.is_file()):12,} in all")


if __name__ == "__main__":
    main()
