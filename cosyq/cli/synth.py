"""cosyq synth: text in, audio out."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from cosyq.cli.console import ArtifactOption, Device, Json, choose_artifact, emit, note, peak_memory
from cosyq.cli.voice import Source, make_voice
from cosyq.errors import UsageError

MAX_STDIN = 1 << 20


def synth(
    text: Annotated[str, typer.Argument(help="What to say, or - to read it from stdin.")],
    output: Annotated[str | None, typer.Option("-o", "--output", help="A wav, flac, ogg or mp3 file, or -.")] = None,
    artifact: ArtifactOption = None,
    voice: Annotated[str | None, typer.Option("-v", "--voice", help="A voice's name or file.")] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Write audio as it is made.")] = False,
    raw: Annotated[bool, typer.Option("--raw", help="16-bit little-endian samples without a header.")] = False,
    seed: Annotated[int | None, typer.Option(help="Same seed, same audio.")] = None,
    speed: Annotated[float, typer.Option(help="0.5 to 2.")] = 1.0,
    instruct: Annotated[str | None, typer.Option(help="How to say it, as in 'speak slowly'.")] = None,
    cross_lingual: Annotated[bool, typer.Option("--cross-lingual", help="The voice speaks another language.")] = False,
    normalize: Annotated[bool, typer.Option(help="Read numbers and symbols in words.")] = True,
    prompt_audio: Annotated[Path | None, typer.Option(help="A recording to speak like, once.")] = None,
    prompt_text: Annotated[str, typer.Option(help="What is said in it.")] = "",
    source: Source = None,
    flow_steps: Annotated[int | None, typer.Option(help="Euler steps, if the artifact has several.")] = None,
    engine: Annotated[Literal["reference", "bnb"], typer.Option(help="What multiplies.")] = "reference",
    device: Device = "auto",
    dtype: Annotated[Literal["auto", "bf16", "fp16", "fp32"], typer.Option(help="Of matrix products.")] = "auto",
    as_json: Json = False,
) -> None:
    """Speak a text from an artifact."""
    words = _read_stdin() if text == "-" else text
    target = _target(output, raw=raw, as_json=as_json)
    folder = choose_artifact(artifact)

    from cosyq.artifact.reader import open_artifact
    from cosyq.audio.sinks import PipeSink, check_suffix, file_sink
    from cosyq.runtime.synthesizer import find_voice, load
    from cosyq.text.engine import engine_name
    from cosyq.text.prompt import speakable

    # Whatever can be wrong is said before seconds go into loading.
    speakable(words)
    if target is not None:
        check_suffix(target, raw=raw)
    opened = open_artifact(folder)
    if prompt_audio is not None and voice is not None:
        raise UsageError("give a voice or a recording, not both", where="--prompt-audio")
    if prompt_audio is not None:
        chosen = make_voice(opened, "prompt", prompt_audio, prompt_text, source)
    else:
        chosen = find_voice(opened, voice)
    options: dict[str, Any] = {
        "voice": chosen,
        "seed": seed,
        "steps": flow_steps,
        "speed": speed,
        "instruct": instruct,
        "cross_lingual": cross_lingual,
        "normalize": normalize,
    }
    tts = load(opened, device=device, dtype=dtype, engine=engine)
    chunks = tts.stream(words, **options) if stream else tts.utterances(words, **options)

    @contextmanager
    def sink() -> Iterator[Any]:
        if target is None:
            yield PipeSink(sys.stdout.buffer, tts.sample_rate, raw=raw)
        else:
            with file_sink(target, tts.sample_rate, raw=raw) as file:
                yield file

    last = None
    with sink() as out:
        for last in chunks:
            out.write(last.samples)
    assert last is not None
    timings = last.timings
    if as_json:
        place = tts.engine.device
        about = {"output": str(target), "seed": last.seed, "engine": engine, "device": str(place)}
        about["normalizer"] = engine_name() if normalize else "none"
        emit(about | {"peak_memory_bytes": peak_memory(place)} | timings.to_dict())
        return
    note(
        f"{timings.audio_seconds:.2f} s of audio in {timings.total_seconds:.2f} s (real-time factor "
        f"{timings.real_time_factor:.3f}, first audio {timings.first_audio_seconds:.2f} s, seed {last.seed})"
    )
    if timings.finish == "length":
        note("the voice did not end by itself: cut at the longest speech for this text")
    if target is not None:
        print(target)


def _read_stdin() -> str:
    data = sys.stdin.buffer.read(MAX_STDIN + 1)
    if len(data) > MAX_STDIN:
        raise UsageError(f"more than {MAX_STDIN} bytes", where="stdin", remedy="give it sentence by sentence")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise UsageError("not valid UTF-8", where="stdin") from None


def _target(output: str | None, *, raw: bool, as_json: bool) -> Path | None:
    """The file to write, or None for stdout."""
    if output is not None and output != "-":
        return Path(output)
    if output is None and sys.stdout.isatty():
        raise UsageError("no output given", where="synth", remedy="use -o FILE, or -o - into a pipe")
    if sys.stdout.isatty():
        raise UsageError("audio does not go to a terminal", where="-o -", remedy="use -o FILE or a pipe")
    if as_json:
        raise UsageError("stdout cannot hold both the audio and --json", where="-o -", remedy="use -o FILE")
    return None
