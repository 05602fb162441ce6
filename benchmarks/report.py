"""Everything that was measured, on one page: `python -m benchmarks.report benchmarks/results`.

Reads the JSON files that the other commands wrote there and writes `README.md` beside them.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from . import (
    automatic_budget,
    backend,
    batch,
    conversion,
    evaluation,
    matryoshka_step,
    one_encoding,
    peers,
    prefill,
    processors,
    quantization,
    quantized_answers,
    scaling,
    serving,
    video,
)


# Which command writes which files (the beginning of their name), and how they are shown.
SECTIONS: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "prefill": ("Prefill and time to first token", prefill.table),
    "peers": ("Against transformers' own classes", peers.table),
    "processors": ("Processors against transformers' own", processors.table),
    "conversion": ("Conversion at real size, and loading", conversion.tables),
    "scaling": ("How cost grows", scaling.table),
    "one_encoding": ("One encoding for all budgets", one_encoding.table),
    "automatic_budget": ("What the automatic budget costs in time", automatic_budget.table),
    "evaluation": ("An evaluation at every scale", evaluation.table),
    "reading_video": ("Reading and encoding videos", video.table),
    "serving": ("What a budget buys on a server", serving.table),
    "backend": ("What vLLM's Transformers backend costs", backend.table),
    "batch": ("Batch jobs on Ray", batch.table),
    "quantization": ("Precision of weights", quantization.table),
    "quantized_answers": ("Right answers by precision", quantized_answers.table),
    "matryoshka_step": ("A training step over five scales", matryoshka_step.table),
}


def report(folder: Path) -> str:
    """The page, in Markdown. Raises `ValueError` for a file that no command here writes."""
    results = {file: json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))}
    unknown = [file.name for file in results if not any(file.stem.startswith(name) for name in SECTIONS)]
    if unknown or not results:
        raise ValueError(
            f"{folder} holds {unknown or 'no results'}: expected files called {', '.join(SECTIONS)}....json."
        )
    parts = ["# Measured\n\nMade from the JSON files beside it by `python -m benchmarks.report benchmarks/results`."]
    for name, (title, table) in SECTIONS.items():
        for file, result in results.items():
            if not file.stem.startswith(name):
                continue
            machine = ", ".join(f"{key} {value}" for key, value in result["machine"].items())
            parts += [f"## {title}", f"`{result['command']}`", table(result), f"<sub>{machine}</sub>"]
            picture = file.with_suffix(".png")
            if picture.exists():
                parts.append(f"![{title}]({picture.name})")
    return "\n\n".join(parts) + "\n"


def main(folder: Annotated[Path, typer.Argument(help="Where the results are.", exists=True, file_okay=False)]) -> None:
    """Writes one page of all results."""
    (folder / "README.md").write_text(report(folder), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
