"""`m3-train-tiny FOLDER`: the whole recipe of m3-tiny, from nothing to the measured counts and their page.

Processes have one thread each: for so small a model two of them are faster than one with two threads. The stages up to
m3-tiny go one after the other, each in all processes; the runs that it is compared with go side by side.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import torch
import typer

from m3_conversion.__main__ import VERSION
from m3_conversion.json_files import write_json

from .recipe import BASES, RUNS, measure, prepare, train, train_tower
from .report import write_page
from .vision_training import number_of_processes


TOWER = "vision-tower"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def train_tiny(
    folder: Annotated[Path, typer.Argument(help="Where runs and results go. Finished runs found there are kept.")],
    only: Annotated[str | None, typer.Option(help=f"One: {', '.join((TOWER, *RUNS))}.")] = None,
    processes: Annotated[
        int | None,
        typer.Option(help="One for every GPU, or 2, by default. Another number gives another result.", min=1),
    ] = None,
    show_version: Annotated[bool, VERSION] = False,
) -> None:
    """Trains m3-tiny and what it is compared with, and counts the right answers of each."""
    if only == TOWER:
        train_tower(folder)
    elif only in RUNS:
        train(folder, only)
        if only not in BASES and number_of_processes() == 1:
            measure(folder, only)
    elif only is not None:
        raise typer.BadParameter(f"{only} is none of {', '.join((TOWER, *RUNS))}", param_hint="--only")
    else:
        _all(folder, processes or torch.cuda.device_count() or 2)


def _all(folder: Path, processes: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    _launch(folder, TOWER, processes)
    prepare(folder)
    for name in (*BASES, "m3-tiny"):
        _launch(folder, name, processes)

    names = [name for name in RUNS if name not in BASES]
    with ThreadPoolExecutor(processes) as pool:
        list(pool.map(lambda name: _launch(folder, name, 1), names))
    counts = {name: measure(folder, name) for name in names}
    write_json(folder / "results.json", counts)
    write_page(folder / "results.json", folder / "results.md")
    print(f"m3-tiny is in {folder / 'm3-tiny' / 'final'}, what was counted in {folder / 'results.md'}")


def _launch(folder: Path, name: str, processes: int) -> None:
    """One run, in processes of its own; a single one measures it too."""
    several = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    )
    command = [sys.executable, *several, "-m", __package__, str(folder), "--only", name]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def main() -> None:
    """Runs the command."""
    app(prog_name="m3-train-tiny")


if __name__ == "__main__":
    main()
