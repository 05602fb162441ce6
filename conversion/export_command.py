"""The command `m3-export FOLDER OUT`: a checkpoint as ONNX graphs."""

import sys
from typing import Annotated

import typer

from .__main__ import VERSION, _one_line, _stop
from .signals import handling_signals


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def main() -> None:
    app(prog_name="m3-export")


@app.command()
def export(
    source: Annotated[str, typer.Argument(metavar="FOLDER", help="The M3 checkpoint: a folder or a Hub id.")],
    destination: Annotated[str, typer.Argument(metavar="OUT", help="The folder to write.")],
    check: Annotated[
        bool,
        typer.Option("--check/--no-check", help="Compare logits with the model's at every number of visual tokens."),
    ] = True,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback where something is wrong.")] = False,
    show_version: Annotated[bool, VERSION] = False,
) -> None:
    """Export an M3 checkpoint to ONNX graphs, in float32, that onnxruntime runs at every number of visual tokens."""
    from . import export as exporting  # here, so that --help and usage errors come at once

    try:
        with handling_signals(_stop):
            written = exporting.export(source, destination, check=check, report=_report)
    except KeyboardInterrupt as stop:
        print("m3-export: stopped, nothing was written", file=sys.stderr)
        raise typer.Exit(128 + stop.args[0]) from stop
    except (ValueError, OSError) as error:
        if debug:
            raise
        print(f"m3-export: {_one_line(error)}", file=sys.stderr)
        raise typer.Exit(1) from error
    print(written)


def _report(scales: str, difference: float) -> None:
    print(f"{scales} visual tokens: largest difference {difference:.1e}", flush=True)
