"""The command `m3-convert SRC DST`; from a checkout, `python -m conversion` too."""

import logging
import re
import sys
import threading
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import typer

from .chat_templates import CHAT_TEMPLATES
from .read_ahead import read_ahead
from .signals import handling_signals


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def print_version(asked: bool) -> None:
    """Prints the version and ends, where asked to."""
    if asked:
        print(f"m3-hf {version('m3-hf')}")
        raise typer.Exit


VERSION = typer.Option("--version", callback=print_version, is_eager=True, help="Show the version and exit.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command. Returns its exit status: 0, or 1 where one line on stderr says what is wrong (2 for usage)."""
    try:
        app(args=arguments, prog_name="m3-convert")
    except SystemExit as end:
        return end.code or 0


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
    size = int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " ")) if match else 0
    if size < 1:
        raise typer.BadParameter(f"{text!r} is not a size, as 5GB or 200MB")
    return size


def _chat_template(name: str) -> str:
    if name not in CHAT_TEMPLATES:
        raise typer.BadParameter(f"{name!r} is not one of {', '.join(CHAT_TEMPLATES)}")
    return name


@app.command()
def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="The checkpoint: a folder or a Hub id.")],
    destination: Annotated[str, typer.Argument(metavar="DST", help="The folder to write.")],
    model_base: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Of a LoRA adapter or a projector alone: the folder or Hub id of what it was trained on.",
        ),
    ] = None,
    vision_tower: Annotated[
        str | None, typer.Option(metavar="DIR", help="CLIP folder or Hub id, in place of the config's mm_vision_tower.")
    ] = None,
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"] | None,
        typer.Option(help="Store weights in this type; as they are stored by default."),
    ] = None,
    quantize: Annotated[
        Literal["nf4", "int8"] | None,
        typer.Option(help="Store the language model's layers in 4 or 8 bits, as bitsandbytes has them."),
    ] = None,
    max_shard_size: Annotated[int, typer.Option(parser=_size, metavar="SIZE", help="Of a weight file.")] = "5GB",
    chat_template: Annotated[
        str | None,
        typer.Option(
            parser=_chat_template,
            metavar="|".join(CHAT_TEMPLATES),
            help="By the checkpoint's name and language model by default.",
        ),
    ] = None,
    tiling: Annotated[
        Literal["original", "transformers"],
        typer.Option(help="Of transformers' LLaVA-NeXT: cut pictures as the original does, or as transformers does."),
    ] = "original",
    model_id: Annotated[str | None, typer.Option(help="Hub id of the original, for the card; SRC by default.")] = None,
    license: Annotated[str | None, typer.Option(help="For the card; that of SRC's own card by default.")] = None,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="USER/NAME", help="Upload DST to this repository of the Hub.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make the repository a private one.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DST where it exists.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback where something is wrong.")] = False,
    show_version: Annotated[bool, VERSION] = False,
) -> None:
    """Convert a LLaVA or M3 checkpoint, the original's or transformers' own, to a folder that loads as M3."""
    if private and push_to_hub is None:
        raise typer.BadParameter("--private is about a repository: give --push-to-hub too")
    threading.Thread(target=read_ahead, args=(Path(source),), daemon=True).start()
    import torch  # here, so that --help and usage errors come at once

    from . import convert as conversion
    from .hub import check_repository, push

    _show_notices("m3-convert")
    written = None
    try:
        with handling_signals(_stop):
            if push_to_hub is not None:
                check_repository(push_to_hub)
            written = conversion.convert(
                source,
                destination,
                model_base=model_base,
                vision_tower=vision_tower,
                dtype=None if dtype is None else getattr(torch, dtype),
                quantize=quantize,
                max_shard_size=max_shard_size,
                chat_template=chat_template,
                tiling=tiling,
                model_id=model_id,
                license=license,
                hub_id=push_to_hub,
                overwrite=overwrite,
            )
            print(written)
            if push_to_hub is not None:
                print(f"uploaded {push(written.destination, push_to_hub, private)}")
    except KeyboardInterrupt as stop:
        left = "nothing was written" if written is None else f"{destination} is written, but not uploaded"
        print(f"m3-convert: stopped, {left}", file=sys.stderr)
        raise typer.Exit(128 + stop.args[0]) from stop
    except (ValueError, OSError) as error:
        if debug:
            raise
        print(f"m3-convert: {_one_line(error)}", file=sys.stderr)
        raise typer.Exit(1) from error


def _show_notices(command: str) -> None:
    notices = logging.StreamHandler()
    notices.setFormatter(logging.Formatter(f"{command}: %(message)s"))
    logger = logging.getLogger(__package__)
    logger.handlers, logger.propagate = [notices], False
    logger.setLevel(logging.INFO)


def _stop(signum: int, frame: object) -> None:
    raise KeyboardInterrupt(signum)  # ends the program through the blocks that clean up


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


if __name__ == "__main__":
    sys.exit(main())
