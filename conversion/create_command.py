"""The command `m3-create --vision-tower A --language-model B DST`."""

import sys
from collections.abc import Sequence
from typing import Annotated, Literal

import typer

from .__main__ import VERSION, _chat_template, _one_line, _show_notices, _size, _stop
from .chat_templates import CHAT_TEMPLATES
from .signals import handling_signals
from .written_numbers import parse_numbers


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command. Returns its exit status: 0, or 1 where one line on stderr says what is wrong (2 for usage)."""
    try:
        app(args=arguments, prog_name="m3-create")
    except SystemExit as end:
        return end.code or 0


def _scales(text: str) -> list[int]:
    try:
        return parse_numbers(text, "--scales")
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of numbers of visual tokens, as 1,9,36,144,576") from None


@app.command()
def create(
    destination: Annotated[str, typer.Argument(metavar="DST", help="The folder to write.")],
    vision_tower: Annotated[
        str,
        typer.Option(metavar="A", help="A CLIP or SigLIP, or an M3 whose vision tower is taken: a folder or a Hub id."),
    ],
    language_model: Annotated[
        str, typer.Option(metavar="B", help="A causal language model: a folder, a Hub id or a GGUF file.")
    ],
    scales: Annotated[
        str | None,
        typer.Option(metavar="N,N,...", help="Numbers of visual tokens; the halvings of the tower's grid by default."),
    ] = None,
    anyres: Annotated[bool, typer.Option("--anyres", help="Cut pictures into tiles, as LLaVA-NeXT does.")] = False,
    vision_feature_layer: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Whose output of the tower is taken; -2 by default, or as in the M3 it comes from."
        ),
    ] = None,
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"] | None,
        typer.Option(help="Store all weights in this type; in the language model's by default."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the projector's random weights.")] = 0,
    chat_template: Annotated[
        str | None,
        typer.Option(
            parser=_chat_template,
            metavar="|".join(CHAT_TEMPLATES),
            help="The language model's own by default; vicuna_v1 where it has none.",
        ),
    ] = None,
    max_shard_size: Annotated[int, typer.Option(parser=_size, metavar="SIZE", help="Of a weight file.")] = "5GB",
    license: Annotated[str | None, typer.Option(help="For the card; that of B's own card by default.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DST where it exists.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback where something is wrong.")] = False,
    show_version: Annotated[bool, VERSION] = False,
) -> None:
    """Make an M3 of a vision tower and a language model. Its projector is random: train it before you ask about pictures."""
    numbers = None if scales is None else _scales(scales)
    import torch  # here, so that --help and usage errors come at once

    from . import create as creation

    _show_notices("m3-create")
    try:
        with handling_signals(_stop):
            print(
                creation.create(
                    vision_tower,
                    language_model,
                    destination,
                    scales=numbers,
                    anyres=anyres,
                    vision_feature_layer=vision_feature_layer,
                    dtype=None if dtype is None else getattr(torch, dtype),
                    seed=seed,
                    chat_template=chat_template,
                    max_shard_size=max_shard_size,
                    license=license,
                    overwrite=overwrite,
                )
            )
    except KeyboardInterrupt as stop:
        print("m3-create: stopped, nothing was written", file=sys.stderr)
        raise typer.Exit(128 + stop.args[0]) from stop
    except (ValueError, OSError) as error:
        if debug:
            raise
        print(f"m3-create: {_one_line(error)}", file=sys.stderr)
        raise typer.Exit(1) from error


if __name__ == "__main__":
    sys.exit(main())
