"""`m3-cache list | clear [NAME]`: what converted checkpoints are kept for `m3-ask` and `load`, and freeing them.

Not part of a checkpoint: no file that travels with one imports this.
"""

from typing import Annotated

import typer

import modeling_m3

from .cache import CachedCheckpoint, cache_folder, cached_checkpoints, clear


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, no_args_is_help=True)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"m3-hf {modeling_m3.__version__}")
        raise typer.Exit


@app.callback()
def _cache(
    show_version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    """Shows and frees the checkpoints that m3-ask and load have converted."""


@app.command("list")
def show() -> None:
    """Name, revision, precision, size and place of every checkpoint that is kept."""
    found = cached_checkpoints()
    for checkpoint in found:
        print(_row(checkpoint))
    print(f"{len(found)} checkpoint(s), {sum(c.nbytes for c in found) / 1e9:.2f} GB, in {cache_folder()}")


@app.command("clear")
def free(name: Annotated[str | None, typer.Argument(metavar="NAME", help="All, if left out.")] = None) -> None:
    """Removes what is kept of a name, or all. What is being converted just now stays."""
    sizes = {checkpoint.folder: checkpoint.nbytes for checkpoint in cached_checkpoints()}
    removed = clear(name)
    if name is not None and not removed:
        raise typer.BadParameter(f"nothing is kept of {name!r}: m3-cache list shows what is")
    print(f"removed {len(removed)} checkpoint(s), {sum(sizes[c.folder] for c in removed) / 1e9:.2f} GB")


def _row(checkpoint: CachedCheckpoint) -> str:
    size = f"{checkpoint.nbytes / 1e9:.2f} GB"
    return f"{checkpoint.name}  {checkpoint.revision[:12]}  {checkpoint.precision}  {size}  {checkpoint.folder}"


def main() -> None:
    app(prog_name="m3-cache")
