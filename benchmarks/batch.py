"""What a second worker brings, and what memory a long job takes: `python -m benchmarks.batch`, where Ray is installed.

`m3-batch --ray local` with one worker of one thread and with two, in turn, over generated pictures. Rates are those between the
first shard and the last, so that starting Ray and loading models do not count.
"""

import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import typer
from PIL import Image

import modeling_m3

from .measure import markdown_table, save


BAR = 1.7  # of two workers over one


def draw(folder: Path, pictures: int) -> None:
    for number in range(pictures):
        drawn = np.random.default_rng(number)
        pixels = drawn.integers(0, 256, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((640, 480)).save(folder / f"{number:05}.jpg")


def run(folder: Path, output: Path, arguments: list[str]) -> tuple[float, list[float]]:
    """Rows per second after the first shard of each worker, and megabytes of memory of all processes, shard by shard."""
    command = [sys.executable, "-m", "m3_serving.batch_command", "--input", str(folder), "--output", str(output)]
    process = subprocess.Popen([*command, "--question", "Which shape?", *arguments], stderr=subprocess.DEVNULL)
    memory: list[float] = []
    while process.poll() is None:
        time.sleep(0.2)
        if len(list(output.glob("answers-*.parquet"))) > len(memory):
            family = psutil.Process().children(recursive=True) + _workers()
            memory.append(sum(_held(member) for member in set(family)) / 1e6)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
    done = sorted(file.stat().st_mtime for file in output.glob("answers-*.parquet"))
    settled = done[len(done) // 5 :]
    return (len(settled) - 1) / (settled[-1] - settled[0]), memory


def _workers() -> list[psutil.Process]:
    return [process for process in psutil.process_iter(["name"]) if (process.info["name"] or "").startswith("ray::")]


def _held(process: psutil.Process) -> int:
    try:
        return process.memory_full_info().uss
    except psutil.Error:  # it has ended
        return 0


def main(
    model: Annotated[str | None, typer.Option(help="A checkpoint; m3-tiny if left out.")] = None,
    pictures: Annotated[int, typer.Option(help="To answer.")] = 600,
    number: Annotated[int, typer.Option(help="Of visual tokens.")] = 36,
    repeats: Annotated[int, typer.Option(help="Of each.")] = 2,
    output: Annotated[Path | None, typer.Option(help="JSON to write.")] = None,
) -> None:
    """Measures, and prints a table."""
    rates: dict[int, list[float]] = {1: [], 2: []}
    memories: dict[int, list[list[float]]] = {1: [], 2: []}
    size = 20
    with tempfile.TemporaryDirectory() as place:
        (folder := Path(place) / "pictures").mkdir()
        draw(folder, pictures)
        common = ["--model", model or str(modeling_m3.default_checkpoint()), "--num-visual-tokens", str(number)]
        common += ["--engine", "generate", "--max-new-tokens", "4", "--shard-size", str(size), "--ray", "local"]
        for repeat, workers in itertools.product(range(repeats), (1, 2)):
            into = Path(place) / f"{workers}-{repeat}"
            rate, memory = run(folder, into, [*common, "--workers", str(workers)])
            rates[workers].append(rate * size)
            memories[workers].append(memory)
            print(
                workers,
                f"{rate * size:.1f} rows/s",
                f"{memory[len(memory) // 5]:.0f} to {memory[-1]:.0f} MB",
                flush=True,
            )
    result = {"pictures": pictures, "num_visual_tokens": number, "rates": rates, "megabytes": memories}
    print(table(result))
    save(result, output)


def table(result: dict[str, Any]) -> str:
    """Markdown: medians of rates; memory after a fifth of the pictures, and at the end."""
    rates = {int(workers): statistics.median(found) for workers, found in result["rates"].items()}
    rows = []
    for workers, rate in sorted(rates.items()):
        found = result["megabytes"].get(str(workers)) or result["megabytes"][workers]
        early, late = (statistics.median(memory[at] for memory in found) for at in (len(found[0]) // 5, -1))
        rows.append([workers, f"{rate:.1f}", f"{rate / rates[1]:.2f}", f"{early:.0f}", f"{late:.0f}"])
    about = f"{result['pictures']:,} pictures at {result['num_visual_tokens']} visual tokens."
    return f"{about}\n\n{markdown_table(['workers', 'rows/s', 'of one', 'MB, early', 'MB, at the end'], rows)}"


if __name__ == "__main__":
    typer.run(main)
