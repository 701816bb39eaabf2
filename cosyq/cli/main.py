"""The program: its commands, and how a failure becomes one line and an exit code."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from cosyq import __version__
from cosyq.cli import (
    bench,
    checkpoint,
    convert,
    diff,
    doctor,
    eval,
    export,
    inspect,
    pull,
    push,
    quantize,
    recipes,
    serve,
    synth,
    tune,
    verify,
    voice,
)
from cosyq.cli.console import expect
from cosyq.errors import ReaderGoneError

INTERRUPTED = 130

app = typer.Typer(
    name="cosyq",
    help="Quantize Fun-CosyVoice3 once, keep a small packed artifact, speak from it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("quantize")(quantize.quantize)
app.command("synth")(synth.synth)
app.command("serve")(serve.serve)
app.command("convert")(convert.convert)
app.command("inspect")(inspect.inspect)
app.command("verify")(verify.verify)
app.command("diff")(diff.diff)
app.command("eval")(eval.evaluate)
app.command("tune")(tune.tune)
app.command("push")(push.push)
app.command("pull")(pull.pull)
app.command("bench")(bench.bench)
app.command("doctor")(doctor.doctor)
app.add_typer(voice.app, name="voice")
app.add_typer(export.app, name="export")
app.add_typer(recipes.app, name="recipes")
app.add_typer(checkpoint.app, name="checkpoint")


def _version(asked: bool) -> None:
    if asked:
        print(f"cosyq {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    pass


def main() -> None:
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command line; returns its exit code."""
    # A build pipeline stops a job with SIGTERM: leave by way of the same clean-up as Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        result: Any = app(args=list(arguments), standalone_mode=False)
        if result == INTERRUPTED:  # what typer makes of a KeyboardInterrupt
            return _fail("interrupted", INTERRUPTED, arguments)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", INTERRUPTED, arguments)
    except ReaderGoneError as error:
        return error.exit_code
    except Exception as error:
        if callable(show := getattr(error, "show", None)):  # a usage error of click's, which typer vendors or imports
            show()
            return getattr(error, "exit_code", 2)
        expected = expect(error)
        return _fail(str(expected), expected.exit_code, arguments)


def _fail(message: str, code: int, arguments: Sequence[str]) -> int:
    print(f"error: {message}", file=sys.stderr)
    if "--json" in arguments:
        print(json.dumps({"error": {"message": message, "exit_code": code}}, ensure_ascii=False))
    return code
