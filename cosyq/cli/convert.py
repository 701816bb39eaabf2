"""cosyq convert: a recording, said in another voice."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cosyq.cli.console import ArtifactOption, Device, Json, choose_artifact, emit, note, peak_memory
from cosyq.cli.voice import Source, encoders_folder


def convert(
    audio: Annotated[Path, typer.Argument(help="1 to 30 seconds of speech.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="A wav, flac, ogg or mp3 file.")],
    voice: Annotated[str | None, typer.Option("-v", "--voice", help="A voice's name or file.")] = None,
    artifact: ArtifactOption = None,
    source: Source = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Say what a recording says, in another voice."""
    folder = choose_artifact(artifact)

    import torch

    from cosyq.artifact.reader import open_artifact
    from cosyq.audio.features import SPEECH_RATE
    from cosyq.audio.recording import read_recording
    from cosyq.audio.sinks import check_suffix, file_sink
    from cosyq.runtime.synthesizer import find_voice, load
    from cosyq.voices.enrol import Encoders

    check_suffix(output, raw=False)
    opened = open_artifact(folder)
    chosen = find_voice(opened, voice)
    recording = read_recording(audio)
    tokens = Encoders(encoders_folder(opened, source)).speech_tokens(torch.from_numpy(recording.at(SPEECH_RATE)))
    tts = load(opened, device=device)
    spoken = tts.convert(tokens.tolist(), voice=chosen)
    with file_sink(output, tts.sample_rate, raw=False) as file:
        file.write(spoken.samples)
    timings = spoken.timings
    if as_json:
        emit({"output": str(output), "peak_memory_bytes": peak_memory(tts.engine.device)} | timings.to_dict())
        return
    note(f"{timings.audio_seconds:.2f} s of audio in {timings.total_seconds:.2f} s")
    print(output)
