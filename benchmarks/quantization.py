"""Bytes, memory, load and prefill time in float32, bfloat16, int8 and nf4: `python -m benchmarks.quantization`.

Every row is measured in a process of its own. Prints a Markdown table.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

import modeling_m3  # noqa: F401 - registers the classes

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where checkpoints are made, and kept for the next run")
    parser.add_argument("--size", choices=SHAPES, default="1b")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--runs", type=int, default=3, help="the fastest of so many prefills counts")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.folder, options.device, options.runs)))
        return
    base = options.folder / f"{options.size}-float32"
    save_random_checkpoint(options.size, base)
    print("| weights | on disk, GB | in memory, GB | peak while loading, GB | load, s | prefill at 576, s | at 36, s |")
    print("| --- | --: | --: | --: | --: | --: | --: |")
    for name, kwargs in VARIANTS.items():
        folder = options.folder / f"{options.size}-{name}"
        if not (folder / "config.json").exists():
            AutoModelForImageTextToText.from_pretrained(base, **kwargs).save_pretrained(folder)
        command = [sys.executable, "-m", "benchmarks.quantization", "--measure", "--device", options.device]
        result = subprocess.run(
            [*command, "--runs", str(options.runs), str(folder)], stdout=subprocess.PIPE, text=True, check=True
        )
        row = json.loads(result.stdout.splitlines()[-1])
        disk = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        numbers = [disk / 1e9, row["memory"] / 1e9, row["peak"] / 1e9, row["load"], *row["prefill"]]
        print(f"| {name} | {' | '.join(f'{number:.2f}' for number in numbers)} |", flush=True)


def measure(folder: Path, device: str, runs: int) -> dict:
    """Seconds, and bytes above what the process took before the model."""
    before = _memory("VmRSS")
    start = time.perf_counter()
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto", device_map=device)
    load, peak = time.perf_counter() - start, _memory("VmHWM") - before
    prefill = [min(_prefill_seconds(model, scale) for _ in range(runs)) for scale in SCALES]
    on_gpu = model.device.type == "cuda"
    memory = torch.cuda.max_memory_allocated() if on_gpu else _memory("VmRSS") - before
    return {"load": load, "peak": peak, "memory": memory, "prefill": prefill}


@torch.no_grad()
def _prefill_seconds(model: torch.nn.Module, scale: int) -> float:
    """With the vision tower, up to the first token's logits."""
    inputs, start = prompt(model, scale), time.perf_counter()
    model(**inputs, logits_to_keep=1).logits.cpu()
    return time.perf_counter() - start


def _memory(name: str) -> int:
    return 1024 * int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


if __name__ == "__main__":
    main()
