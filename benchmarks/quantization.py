"""Bytes, memory, load and prefill time in float32, bfloat16, int8 and nf4: `python -m benchmarks.quantization FOLDER`.

Every precision is measured in processes of its own, in turn.
"""

import time
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

import modeling_m3  # noqa: F401 - registers the classes

from .measure import Device, forget_peak_memory, in_a_fresh_process, markdown_table, memory, save, spread
from .prefill import prefill
from .random_checkpoint import SHAPES, prompt, save_random_checkpoint


VARIANTS = {
    "float32": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "int8": {"dtype": torch.bfloat16, "quantization_config": BitsAndBytesConfig(load_in_8bit=True)},
    "nf4": {
        "dtype": torch.bfloat16,
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        ),
    },
}
SCALES = (576, 36)
Size = Enum("Size", {name: name for name in SHAPES}, type=str)


def make_checkpoints(folder: Path, size: str) -> dict[str, Path]:
    """A folder for every precision. What is there already is kept."""
    folders = {name: folder / f"{size}-{name}" for name in VARIANTS}
    save_random_checkpoint(size, folders["float32"])
    for name, kwargs in VARIANTS.items():
        if not (folders[name] / "config.json").exists():
            AutoModelForImageTextToText.from_pretrained(folders["float32"], **kwargs).save_pretrained(folders[name])
    return folders


def measure(folder: Path, device: str) -> dict[str, float]:
    """Seconds, and bytes above what the process took before the model; to be called in a fresh process."""
    before = memory()
    forget_peak_memory()
    start = time.perf_counter()
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto", device_map=device)
    measured = {"load": time.perf_counter() - start}
    for scale in SCALES:
        inputs = prompt(model, scale)
        prefill(model, inputs)
        start = time.perf_counter()
        prefill(model, inputs)
        measured[f"prefill {scale}"] = time.perf_counter() - start
    measured["peak"] = memory("VmHWM") - before
    on_gpu = model.device.type == "cuda"
    measured["memory"] = torch.cuda.max_memory_allocated() if on_gpu else memory() - before
    return measured


def table(result: dict[str, Any]) -> str:
    """What was measured, in Markdown."""
    rows = []
    for name, values in result["measured"].items():
        gigabytes = [spread([number / 1e9 for number in values[key]]) for key in ("memory", "peak")]
        seconds = [spread(values[key]) for key in ("load", *(f"prefill {scale}" for scale in SCALES))]
        rows.append([name, f"{result['disk'][name] / 1e9:.2f}", *gigabytes, *seconds])
    header = ["weights", "on disk, GB", "in memory, GB", "peak, GB", "load, s"]
    return markdown_table([*header, *(f"prefill at {scale}, s" for scale in SCALES)], rows)


def main(
    folder: Annotated[Path, typer.Argument(help="Where checkpoints are made, and kept for the next run.")],
    size: Annotated[Size, typer.Option(help="Which language model; the vision tower is CLIP-L/336.")] = Size["1b"],
    repeats: Annotated[int, typer.Option(min=1, help="Processes for each precision.")] = 3,
    device: Device = "cpu",
    output: Annotated[Path | None, typer.Option(help="A JSON file for all that was measured.")] = None,
) -> None:
    """Measures bytes, memory, load and prefill time in float32, bfloat16, int8 and nf4."""
    folders = in_a_fresh_process(make_checkpoints, folder, size.value)
    measured: dict[str, dict[str, list[float]]] = {name: {} for name in VARIANTS}
    for _ in range(repeats):
        for name, path in folders.items():
            for key, value in in_a_fresh_process(measure, path, device).items():
                measured[name].setdefault(key, []).append(value)
    disk = {name: sum(file.stat().st_size for file in path.glob("*.safetensors")) for name, path in folders.items()}
    result = {"size": size.value, "disk": disk, "measured": measured}
    print(table(result))
    save(result, output)


if __name__ == "__main__":
    typer.run(main)
