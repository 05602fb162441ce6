"""What every measurement shares: runs in turn, memory of a process, what machine it was, and how results are kept."""

import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from tqdm import tqdm


def _usable(device: str) -> str:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter from a build of torch without CUDA
        raise typer.BadParameter(f"torch cannot use {device} here: {str(error).splitlines()[0]}") from error
    return device


Device = Annotated[str, typer.Option(callback=_usable, help="Where it runs, by torch's name: cpu, cuda, ...")]


def in_turn(runs: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every run, `repeats` each, after one of each to warm up; each round begins with another.

    A machine that slows down for a while then slows all of them.
    """
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        runs[name]()
        _wait_for_device()
    for repeat in tqdm(range(repeats), desc="rounds", disable=None):
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            runs[name]()
            _wait_for_device()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def memory(name: str = "VmRSS") -> int:
    """Bytes that this process holds ("VmRSS") or has held at most ("VmHWM"); Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def forget_peak_memory() -> None:
    """Lets "VmHWM" start anew from what is held now."""
    Path("/proc/self/clear_refs").write_text("5")


def in_a_fresh_process(function: Callable, *arguments: Any) -> Any:
    """The result of a call in a new interpreter, whose memory and caches owe nothing to this one."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        result = pool.apply(function, arguments)
        pool.close()
        pool.join()  # lets the process clean up after itself
    return result


def machine() -> dict[str, Any]:
    """What a result depends on besides the code."""
    names = [line.split(": ", 1)[1] for line in _read("/proc/cpuinfo").splitlines() if line.startswith("model name")]
    found = {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def spread(numbers: Sequence[float], digits: int = 2) -> str:
    """'median (least to most)'."""
    middle, least, most = (f"{function(numbers):.{digits}f}" for function in (statistics.median, min, max))
    return f"{middle} ({least} to {most})"


def milliseconds(seconds: Sequence[float], digits: int = 0) -> str:
    """'median (least to most)' of seconds, in thousandths."""
    return spread([1000 * number for number in seconds], digits)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """The first column to the left, the others, which are numbers, to the right."""
    lines = [header, ["---", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def save(result: dict[str, Any], file: Path | None) -> None:
    """Writes a result as JSON, with the machine and the command; nothing where there is no file to write."""
    if file is None:
        return
    command = f"python -m benchmarks.{Path(sys.argv[0]).stem} {' '.join(sys.argv[1:])}"
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"command": command.strip(), "machine": machine(), **result}, indent=1)
    file.write_text(text + "\n", encoding="utf-8")


def _read(path: str) -> str:
    return Path(path).read_text() if Path(path).exists() else ""
