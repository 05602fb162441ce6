"""`python -m training.m3_tiny FOLDER`: the whole recipe of m3-tiny, from nothing to the measured counts.

Runs that do not depend on each other go side by side, one thread each: two of them on two cores are faster than one after
the other on both.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import torch
import typer

from .recipe import BASES, RUNS, measure, prepare, train


def main(
    folder: Annotated[Path, typer.Argument(help="Where runs and results go. Finished runs found there are kept.")],
    only: Annotated[str | None, typer.Option(help=f"One run: {', '.join(RUNS)}.")] = None,
    jobs: Annotated[int, typer.Option(help="Runs at a time.")] = os.cpu_count() or 1,
    threads: Annotated[int, typer.Option(help="Threads of a run that has the machine to itself.")] = os.cpu_count()
    or 1,
) -> None:
    """Trains m3-tiny and what it is compared with, and counts the right answers of each."""
    torch.set_num_threads(threads)
    folder.mkdir(parents=True, exist_ok=True)
    if only is not None:
        if only not in RUNS:
            raise typer.BadParameter(f"{only} is none of {', '.join(RUNS)}", param_hint="--only")
        train(folder, only)
        measure(folder, only)
        return
    prepare(folder)
    for name in BASES:
        train(folder, name)

    def run(name: str) -> None:
        command = [sys.executable, "-m", __package__, str(folder), "--only", name, "--threads", "1"]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(run, [name for name in RUNS if name not in BASES]))
    counts = {name: measure(folder, name) for name in RUNS if name not in BASES}
    (folder / "results.json").write_text(json.dumps(counts, indent=1) + "\n", encoding="utf-8")
    print(f"m3-tiny is in {folder / 'm3-tiny' / 'final'}, the counts are in {folder / 'results.json'}")


typer.run(main)
