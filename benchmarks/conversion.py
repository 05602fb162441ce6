"""Conversion at a real size against `cp -r` of the same bytes, and loading what it wrote.

`python -m benchmarks.conversion FOLDER --size 7b --output FILE.json` writes checkpoints in the original's format
(`original_checkpoint.py`) to FOLDER, measures, prints tables, and keeps the checkpoints for the next run.

`cp -r` copies the folders whose weights a conversion reads; both run in turn, as commands of their own, from disk to the
same disk, and what they wrote is removed again. Time is counted until the command has ended, and until all that it wrote
is on the disk (`fsync` of every file). Before each run, what was written before is on the disk, and unless `--warm` is given the
source is dropped from the system's cache; the share of it that is still there is recorded.

Peak memory is what the process has held at most since its start: "resident" counts pages of files that it has mapped, which the
system takes back when it needs room (`VmHWM` of Linux); "anonymous" does not (`RssAnon`, read a hundred times a second).
Loading is `from_pretrained` on the CPU in a fresh process, as bfloat16 and as nf4; imports are not in its time.
"""

import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer
from tqdm import tqdm

from .measure import in_a_fresh_process, markdown_table, save, spread
from .original_checkpoint import LAYOUTS, Original, check_converted, original_shapes, weight_bytes, write_original
from .page_cache import cached_share, flush, forget, size_of
from .random_checkpoint import SHAPES


BARS = {"seconds / cp -r": 1.3, "GB resident": 1.0}  # as the issue of this measurement demands: at most so much
COPY, CONVERSION = "cp -r", "conversion"
LOADED_AS = ("bfloat16", "nf4")
_ROOT = Path(__file__).resolve().parents[1]
_SECONDS_BETWEEN_READINGS = 0.01

Size = Enum("Size", {name: name for name in SHAPES}, type=str)
LayoutName = Enum("LayoutName", {name: name for name in LAYOUTS}, type=str)
Run = dict[str, Any]


@contextmanager
def peak_memory(process: int) -> Iterator[dict[str, int]]:
    """Bytes that a process has held at most when the block ends, "resident" and "anonymous"; Linux.

    Of a process that ends within the block, the last hundredth of a second is not seen.
    """
    peaks = {"resident": 0, "anonymous": 0}
    ended = threading.Event()

    def watch() -> None:
        last = False
        while not last:
            last = ended.wait(_SECONDS_BETWEEN_READINGS)  # one more reading after the end
            held = _status(process)
            for name, field in (("resident", "VmHWM"), ("anonymous", "RssAnon")):
                peaks[name] = max(peaks[name], held.get(field, 0))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peaks
    finally:
        ended.set()
        thread.join()


def _status(process: int) -> dict[str, int]:
    """Bytes by the names of `/proc/PID/status`; none of a process that has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    fields = (line.split() for line in lines)
    return {field[0].rstrip(":"): 1024 * int(field[1]) for field in fields if field[-1] == "kB"}


def copy(original: Original, destination: Path) -> dict[str, int]:
    """Copies what a conversion reads."""
    destination.mkdir()
    subprocess.run(["cp", "-r", *original.read, destination], check=True)
    return {}


def convert(original: Original, destination: Path) -> dict[str, int]:
    """Converts with the command, as a user does. Returns the command's peak memory.

    Raises:
        RuntimeError: the command failed, with what it said.
    """
    command = [
        sys.executable,
        "-m",
        "m3_conversion",
        original.checkpoint,
        destination,
        "--vision-tower",
        original.tower,
    ]
    with subprocess.Popen(
        command, cwd=_ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:  # a path is absolute, so that it means the same there
        with peak_memory(process.pid) as peaks:
            _, said = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{original.checkpoint} was not converted: {said.strip()}")
    return peaks


def measure_run(run: Callable[[], dict[str, int]], read: tuple[Path, ...], written: Path, warm: bool) -> Run:
    """Seconds of a run that reads and writes folders, and what it returns. An older `written` is removed before."""
    shutil.rmtree(written, ignore_errors=True)
    os.sync()
    if not warm:
        forget(*read)
    cached = cached_share(*read)
    start = time.perf_counter()
    found = run()
    ended = time.perf_counter()
    flush(written)
    on_disk = time.perf_counter()
    return {
        "seconds": ended - start,
        "seconds_to_disk": on_disk - start,
        "cached_before": cached,
        "bytes_read": size_of(*read),
        "bytes_written": size_of(written),
        **found,
    }


def conversion_runs(original: Original, converted: Path, repeats: int, warm: bool) -> Iterator[tuple[str, Run]]:
    """Copies and conversions in turn; each round begins with the other. The last conversion is left."""
    copied = original.checkpoint.with_name(f"{original.checkpoint.name}-copy")
    for repeat in tqdm(range(repeats), desc=f"{original.checkpoint.name}: rounds", disable=None):
        for way in (COPY, CONVERSION) if repeat % 2 == 0 else (CONVERSION, COPY):
            if way == CONVERSION:
                yield way, measure_run(lambda: convert(original, converted), original.read, converted, warm)
                continue
            yield way, measure_run(lambda: copy(original, copied), original.read, copied, warm)
            shutil.rmtree(copied)


def load(folder: Path, loaded_as: str, warm: bool) -> Run:
    """Seconds and peak memory of `from_pretrained`, and the bytes of the loaded weights. To be called in a fresh process."""
    from transformers import AutoModelForImageTextToText

    import modeling_m3  # noqa: F401 - registers the classes

    from .quantization import VARIANTS

    if loaded_as == "nf4":
        import bitsandbytes  # noqa: F401 - an import, which is not to be timed
    if not warm:
        forget(folder)
    cached = cached_share(folder)
    with peak_memory(os.getpid()) as peaks:
        start = time.perf_counter()
        model = AutoModelForImageTextToText.from_pretrained(folder, **VARIANTS[loaded_as])
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "cached_before": cached, "bytes_loaded": model.get_memory_footprint(), **peaks}


def loading_runs(folder: Path, repeats: int, warm: bool) -> Iterator[tuple[str, Run]]:
    """Loads in turn, each in a process of its own."""
    for repeat in tqdm(range(repeats), desc="loading: rounds", disable=None):
        for loaded_as in LOADED_AS if repeat % 2 == 0 else LOADED_AS[::-1]:
            yield loaded_as, in_a_fresh_process(load, folder, loaded_as, warm)


def ratios(runs: dict[str, list[Run]], key: str) -> list[float]:
    """Of a conversion's seconds to those of the copy of the same round."""
    return [conversion[key] / copy[key] for copy, conversion in zip(runs[COPY], runs[CONVERSION])]


def summarize(result: dict[str, Any]) -> dict[str, Any]:
    """What the bars are about, by layout: the ratio of the medians of the seconds, and the largest peak."""
    summary = {}
    for layout, runs in result["conversion"].items():
        if not all(runs.get(way) for way in (COPY, CONVERSION)):
            continue
        medians = {
            key: {way: statistics.median(run[key] for run in runs[way]) for way in (COPY, CONVERSION)}
            for key in ("seconds", "seconds_to_disk")
        }
        summary[layout] = {
            "seconds / cp -r": medians["seconds"][CONVERSION] / medians["seconds"][COPY],
            "seconds to disk / cp -r": medians["seconds_to_disk"][CONVERSION] / medians["seconds_to_disk"][COPY],
            "GB resident": max(run["resident"] for run in runs[CONVERSION]) / 1e9,
        }
    return summary


def tables(result: dict[str, Any]) -> str:
    """What was measured, in Markdown."""
    parts = []
    for layout, summary in result["summary"].items():
        runs = result["conversion"][layout]
        rows = []
        for way, of_way in runs.items():
            rows.append([way, *(_cell(of_way, key) for key in ("seconds", "seconds_to_disk")), *_memory_cells(of_way)])
        by_round = (spread(ratios(runs, key)) for key in ("seconds", "seconds_to_disk"))
        rows.append(["conversion / cp -r of the same round", *by_round, "", ""])
        cached = [run["cached_before"] for of_way in runs.values() for run in of_way]
        parts += [
            f"{result['size']}, {layout}: {runs[COPY][0]['bytes_read'] / 1e9:.2f} GB. Medians and ranges of {len(runs[COPY])} "
            f"runs each, in turn; {min(cached):.0%} to {max(cached):.0%} of the source in the system's cache before.",
            markdown_table(["", "seconds", "seconds until on the disk", "GB resident", "GB anonymous"], rows),
            markdown_table(
                [CONVERSION, "measured", "at most"],
                [[name, f"{value:.2f}", BARS.get(name, "")] for name, value in summary.items()],
            ),
        ]
    if result["loading"]:
        rows = [
            [name, _cell(runs, "seconds"), *_memory_cells(runs), _cell(runs, "bytes_loaded", 1e9)]
            for name, runs in result["loading"].items()
        ]
        cached = [run["cached_before"] for runs in result["loading"].values() for run in runs]
        parts += [
            f"from_pretrained on the CPU; {min(cached):.0%} to {max(cached):.0%} of the folder in the system's cache before.",
            markdown_table(["loaded as", "seconds", "GB resident", "GB anonymous", "GB of weights"], rows),
        ]
    return "\n\n".join(parts)


def _cell(runs: list[Run], key: str, unit: float = 1) -> str:
    return spread([run[key] / unit for run in runs])


def _memory_cells(runs: list[Run]) -> list[str]:
    return [_cell(runs, key, 1e9) if key in runs[0] else "" for key in ("resident", "anonymous")]


def check_room(folder: Path, size: str, layouts: list[str]) -> None:
    """Raises `OSError` where the disk has no room for the checkpoints that are not there yet, a copy and a conversion."""
    sizes = {layout: weight_bytes(original_shapes(size, LAYOUTS[layout])) for layout in layouts}
    missing = sum(nbytes for layout, nbytes in sizes.items() if not (folder / f"{size}-{layout}").exists())
    needed = int(1.05 * (missing + 2 * max(sizes.values())))  # with the vision tower in its own folder
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"{folder}: {needed / 1e9:.0f} GB are needed for {', '.join(layouts)} at size {size}, but {free / 1e9:.0f} GB "
            "are free: make room, name another folder, or fewer layouts"
        )


def environment() -> dict[str, Any]:
    """What these measurements depend on besides what `measure.machine` tells."""
    versions = {}
    for package in ("safetensors", "accelerate", "bitsandbytes"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    cp = subprocess.run(["cp", "--version"], stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[0]
    return {"cp": cp, "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), **versions}


def main(
    folder: Annotated[Path, typer.Argument(help="Where checkpoints are made; on the disk to be measured.")],
    size: Annotated[Size, typer.Option(help="Shape of the language model.")] = "7b",
    layout: Annotated[
        list[LayoutName], typer.Option(help="How the original is stored. Repeat the option for several.")
    ] = (*LAYOUTS,),
    repeats: Annotated[int, typer.Option(min=1, help="Runs of everything.")] = 3,
    conversion: Annotated[bool, typer.Option(help="Measure conversion.")] = True,
    loading: Annotated[bool, typer.Option(help="Measure loading, of what the last conversion wrote.")] = True,
    warm: Annotated[bool, typer.Option("--warm", help="Leave in the system's cache what is there.")] = False,
    clean: Annotated[bool, typer.Option("--clean", help="Remove every checkpoint that was made, at the end.")] = False,
    output: Annotated[Path | None, typer.Option(help="A JSON file, written anew after each run.")] = None,
) -> None:
    """Measures conversion against cp -r, and loading.

    The default needs 60 GB of disk and 18 GB of memory, and about an hour where the disk reads 200 MB/s.
    """
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    size, layouts = Size(size).value, [LayoutName(name).value for name in layout]
    converted = folder / f"{size}-converted"
    if conversion:
        check_room(folder, size, layouts)
    elif loading and not (converted / "config.json").exists():
        raise typer.BadParameter(f"{converted} is not there to be loaded: leave out --no-conversion")
    result: dict[str, Any] = {"size": size, "warm": warm, "environment": environment(), "bars": BARS}
    result |= {"summary": {}, "checked_tensors": {}, "conversion": {}, "loading": {}}

    def keep(part: str, name: str, run: Run, of: dict) -> None:
        of.setdefault(name, []).append(run)
        result["summary"] = summarize(result)
        save(result, output)
        typer.echo(f"{part}: {name}: {run['seconds']:.2f} s", err=True)

    for name in layouts if conversion else ():
        original = write_original(size, name, folder)
        runs = result["conversion"].setdefault(name, {})
        for way, run in conversion_runs(original, converted, repeats, warm):
            keep(name, way, run, runs)
        result["checked_tensors"][name] = check_converted(converted, size, name)
    for loaded_as, run in loading_runs(converted, repeats, warm) if loading else ():
        keep("loading", loaded_as, run, result["loading"])
    if clean:
        for made in (*layouts, "converted", "vision-tower"):
            shutil.rmtree(folder / f"{size}-{made}", ignore_errors=True)
    save(result, output)
    print(tables(result))


if __name__ == "__main__":
    typer.run(main)
