"""cosyq synth: text in, audio out."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cosyq.cli.console import (
    ArtifactOption,
    Device,
    DtypeOption,
    EngineOption,
    Json,
    choose_artifact,
    emit,
    note,
    peak_memory,
)
from cosyq.cli.reading import arriving_stdin, open_input, read_text
from cosyq.cli.voice import Source, make_voice
from cosyq.errors import UsageError

if TYPE_CHECKING:
    from cosyq.audio.sinks import Sink
    from cosyq.runtime.synthesizer import Audio


def synth(
    text: Annotated[str | None, typer.Argument(help="What to say, or - to read it from stdin.")] = None,
    file: Annotated[Path | None, typer.Option(help="Read it from a file.")] = None,
    output: Annotated[
        str | None, typer.Option("-o", "--output", help="A wav, flac, ogg or mp3 file, or -; a folder with --jsonl.")
    ] = None,
    artifact: ArtifactOption = None,
    voice: Annotated[str | None, typer.Option("-v", "--voice", help="A voice's name or file.")] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Write audio as it is made; of stdin, as it comes.")] = False,
    raw: Annotated[bool, typer.Option("--raw", help="16-bit little-endian samples without a header.")] = False,
    srt: Annotated[Path | None, typer.Option(help="Write subtitles too, timed as spoken.")] = None,
    jsonl: Annotated[bool, typer.Option("--jsonl", help="The text is JSON lines: id, text, voice, out, ...")] = False,
    force: Annotated[bool, typer.Option("--force", help="With --jsonl: make again what is there.")] = False,
    seed: Annotated[int | None, typer.Option(help="Same seed, same audio.")] = None,
    speed: Annotated[float, typer.Option(help="0.5 to 2.")] = 1.0,
    instruct: Annotated[str | None, typer.Option(help="How to say it, as in 'speak slowly'.")] = None,
    cross_lingual: Annotated[bool, typer.Option("--cross-lingual", help="The voice speaks another language.")] = False,
    normalize: Annotated[bool, typer.Option(help="Read numbers and symbols in words.")] = True,
    prompt_audio: Annotated[Path | None, typer.Option(help="A recording to speak like, once.")] = None,
    prompt_text: Annotated[str, typer.Option(help="What is said in it.")] = "",
    source: Source = None,
    flow_steps: Annotated[int | None, typer.Option(help="Euler steps, if the artifact has several.")] = None,
    engine: EngineOption = "auto",
    device: Device = "auto",
    dtype: DtypeOption = "auto",
    as_json: Json = False,
) -> None:
    """Speak a text from an artifact."""
    if (text is None) == (file is None):
        raise UsageError("give a text, or - for stdin, or --file, and one of them", where="synth")
    if jsonl:
        others = {"--stream": stream, "--raw": raw, "--srt": srt, "--json": as_json, "a TEXT": text not in (None, "-")}
        _refuse([name for name, given in others.items() if given])
    target = _target_folder(output) if jsonl else _target(output, raw=raw, as_json=as_json)
    arriving = stream and text == "-"
    words = None if jsonl or arriving else read_text(text, file)
    folder = choose_artifact(artifact)

    from cosyq.cli.starting import starting

    with starting(folder, device, dtype, engine):
        from cosyq.artifact.reader import open_artifact
        from cosyq.audio.sinks import check_suffix
        from cosyq.runtime.synthesizer import find_voice, load
        from cosyq.text.engine import engine_name
        from cosyq.text.prompt import speakable

        # Whatever can be wrong is said before seconds go into loading.
        if words is not None:
            speakable(words)
        if target is not None and not jsonl:
            check_suffix(target, raw=raw)
        if srt is not None:
            _check_srt(srt)
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
    if jsonl:
        from cosyq.cli.batch import speak_lines

        assert isinstance(target, Path)
        with open_input(file) as lines:
            speak_lines(tts, lines, target, options, size=file.stat().st_size if file else None, force=force)
        return
    if words is None:
        chunks = tts.stream_text(arriving_stdin(), **options)
    else:
        chunks = tts.stream(words, **options) if stream else tts.utterances(words, **options)
    last = _write(chunks, target, tts.sample_rate, raw=raw, srt=srt)
    timings = last.timings
    if as_json:
        place = tts.engine.device
        about = {"output": str(target), "seed": last.seed, "engine": tts.engine.name, "device": str(place)}
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


def _write(chunks: Iterator[Audio], target: Path | None, sample_rate: int, *, raw: bool, srt: Path | None) -> Audio:
    """Write the audio and its subtitles; returns the last chunk."""
    from cosyq.audio.sinks import PipeSink, file_sink
    from cosyq.files import whole_file
    from cosyq.text.subtitles import Subtitles

    subtitles = Subtitles(sample_rate)
    first = last = next(chunks)  # what is wrong with a text that arrives is said before a header is written
    with ExitStack() as stack:
        if target is None:
            out: Sink = PipeSink(sys.stdout.buffer, sample_rate, raw=raw)
        else:
            out = stack.enter_context(file_sink(target, sample_rate, raw=raw))
        for last in chain([first], chunks):
            out.write(last.samples)
            subtitles.add(last.utterance, last.text, len(last.samples), last.pause)
    if srt is not None:
        with whole_file(srt) as partial:
            partial.write_text(subtitles.to_srt(), "utf-8")
    return last


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


def _target_folder(output: str | None) -> Path:
    """The folder for the files of --jsonl."""
    if output is None or output == "-":
        raise UsageError("no output folder given", where="--jsonl", remedy="use -o FOLDER")
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise UsageError("not a folder", where=folder)
    return folder


def _refuse(others: list[str]) -> None:
    if others:
        raise UsageError(f"does not go with {', '.join(others)}", where="--jsonl")


def _check_srt(path: Path) -> None:
    if path.suffix.lower() != ".srt":
        raise UsageError("subtitles are a .srt file", where=path)
    if not path.parent.is_dir():
        raise UsageError("no such folder", where=path.parent)
