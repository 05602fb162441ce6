"""Pictures per second of the processors, M3's and transformers' own: `python -m benchmarks.processors`.

LLaVA-1.5's ("flat": the picture is padded to a square and resized) and LLaVA-NeXT's ("anyres": it is also cut into tiles),
on the same pictures, with the backend PIL and, where it can be imported, torchvision; the image processors alone, then with
a prompt, by the same tokenizer. Both must give the same pixels and token ids, and take turns.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import transformers
import typer
from PIL import Image
from transformers import AutoTokenizer, LlavaNextProcessor, LlavaProcessor

import modeling_m3
from modeling_m3 import M3LlavaProcessor, default_checkpoint

from .measure import in_turn, markdown_table, save, spread


BAR = 1.0  # ours takes at most this much of the time of transformers' own
CLASSES = ("M3", "transformers")
KINDS = ("flat", "anyres")
SIZES = [
    (336, 336),
    (640, 480),
    (480, 640),
    (1000, 300),
    (97, 53),
    (1920, 1080),
]  # (width, height), as pictures are named
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
PROMPT = "USER: <image>\nWhat is shown in this picture? ASSISTANT:"
# The classes of a backend: ours, LLaVA-1.5's, LLaVA-NeXT's.
BACKENDS = {
    "PIL": ("M3LlavaImageProcessorPil", "LlavaImageProcessorPil", "LlavaNextImageProcessorPil"),
    "torchvision": ("M3LlavaImageProcessor", "LlavaImageProcessor", "LlavaNextImageProcessor"),
}
# The largest difference of pixels: none, or 2/255 divided by CLIP's smallest deviation (torchvision resizes in one pass
# where PIL, and ours, round in between).
TOLERANCE = {"PIL": 0.0, "torchvision": 2 / 255 / 0.26}


def why_not(backend: str) -> str | None:
    """Why a backend cannot be measured here; None where it can."""
    if backend == "torchvision":
        try:
            import torchvision  # noqa: F401
        except Exception as error:  # a build for another torch raises anything
            return f"torchvision cannot be imported: {error}"
    return None


def make_picture(width: int, height: int) -> Image.Image:
    """Coarse noise, the same in every run."""
    noise = np.random.default_rng(0).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height))


def image_processors(kind: str, backend: str) -> dict[str, Any]:
    """Ours and transformers' own, with the same settings."""
    ours, flat, anyres = BACKENDS[backend]
    settings: dict[str, Any] = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    if kind == "flat":
        settings["do_pad"] = True
        classes = getattr(modeling_m3, ours), getattr(transformers, flat)
    else:
        settings["image_grid_pinpoints"] = PINPOINTS
        classes = getattr(modeling_m3, ours), getattr(transformers, anyres)
    return {name: make(**settings) for name, make in zip(CLASSES, classes)}


def processors(kind: str, image_processors: dict[str, Any]) -> dict[str, Any]:
    """The processors around image processors, with the same tokenizer."""
    # A large picture in tiles has more tokens than the small checkpoint, whose tokenizer this is, warns of.
    tokenizer = AutoTokenizer.from_pretrained(default_checkpoint(), model_max_length=8192)
    merge_type, theirs = ("flat", LlavaProcessor) if kind == "flat" else ("spatial_unpad", LlavaNextProcessor)
    ours, other = (image_processors[name] for name in CLASSES)
    return {
        "M3": M3LlavaProcessor(ours, tokenizer, patch_size=14, patch_merge_type=merge_type),
        "transformers": theirs(
            other,
            tokenizer,
            patch_size=14,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,  # the class token, which "default" takes away again
        ),
    }


def check_agreement(outputs: dict[str, Any], tolerance: float) -> None:
    """Raises `RuntimeError` unless both have the same token ids and, within `tolerance`, the same pixels."""
    ours, theirs = (outputs[name] for name in CLASSES)
    for name in ("input_ids", "pixel_values"):
        if ours[name].shape != theirs[name].shape:
            raise RuntimeError(f"{name} differ in shape: {tuple(ours[name].shape)} and {tuple(theirs[name].shape)}.")
    if not torch.equal(ours["input_ids"], theirs["input_ids"]):
        raise RuntimeError("Both processors must give the same input_ids, but do not.")
    largest = (ours["pixel_values"] - theirs["pixel_values"]).abs().max().item()
    if largest > tolerance:
        raise RuntimeError(f"Pixels differ by up to {largest:.2g}, which is more than {tolerance:.2g}.")


def counted(call: Callable[[], object], seconds: list[float]) -> Callable[[], None]:
    """The call, which also notes what processor time it took: less noisy than time where other programs run."""

    def run() -> None:
        start = time.process_time()
        call()
        seconds.append(time.process_time() - start)

    return run


def measure(kind: str, backend: str, sizes: list[tuple[int, int]], batch: int, repeats: int) -> list[dict[str, Any]]:
    """A row per size and for pixels alone, or pixels and text: seconds, and seconds of processor time, of every call."""
    with_pixels = image_processors(kind, backend)
    with_text = processors(kind, with_pixels)
    rows = []
    for size in sizes:
        pictures, prompts = [make_picture(*size) for _ in range(batch)], [PROMPT] * batch
        calls: dict[tuple[str, str], Callable[[], object]] = {}
        for name in CLASSES:
            calls["pixels", name] = partial(with_pixels[name], pictures, return_tensors="pt")
            calls["pixels and text", name] = partial(
                with_text[name], images=pictures, text=prompts, return_tensors="pt"
            )
        check_agreement({name: calls["pixels and text", name]() for name in CLASSES}, TOLERANCE[backend])
        cpu: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
        runs = {key: counted(calls[key], cpu[key]) for key in sorted(calls)}
        seconds = in_turn(runs, repeats)
        for what in ("pixels", "pixels and text"):
            row: dict[str, Any] = {"kind": kind, "backend": backend, "size": list(size), "what": what, "batch": batch}
            row["seconds"] = {name: seconds[what, name] for name in CLASSES}
            row["cpu_seconds"] = {name: cpu[what, name][1:] for name in CLASSES}  # without the one to warm up
            row["ratio"], row["cpu_ratio"] = (
                statistics.median(row[clock]["M3"]) / statistics.median(row[clock]["transformers"])
                for clock in ("seconds", "cpu_seconds")
            )
            rows.append(row)
    return rows


def table(result: dict[str, Any]) -> str:
    """What was measured, in Markdown, and which backends were not."""
    rows, lines = result["rows"], []
    for row in rows:
        per_second = [spread([row["batch"] / taken for taken in row["seconds"][name]], 1) for name in CLASSES]
        ratios = [f"{row[ratio]:.2f}" for ratio in ("ratio", "cpu_ratio")]
        width, height = row["size"]
        lines.append([f"{row['kind']}, {row['backend']}, {width}x{height}, {row['what']}", *per_second, *ratios])
    header = ["", *(f"{name}, pictures/s" for name in CLASSES), "time, M3 / transformers", "CPU time"]
    worst, of_cpu = (max(row[ratio] for row in rows) for ratio in ("ratio", "cpu_ratio"))
    verdict = f"The largest ratio of times is {worst:.2f}, of CPU times {of_cpu:.2f}; at most {BAR:.2f} is wanted."
    skipped = [f"Not measured here: {backend}. {reason}" for backend, reason in result["skipped"].items()]
    return "\n\n".join([markdown_table(header, lines), verdict, *skipped])


def main(
    batch: Annotated[int, typer.Option(min=1, help="Pictures in a call.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Calls that are timed.")] = 20,
    threads: Annotated[int, typer.Option(min=1, help="Threads that torch may use.")] = 1,
    output: Annotated[Path | None, typer.Option(help="A JSON file for all that was measured.")] = None,
) -> None:
    """Measures the processors of M3 and transformers' own, in turn."""
    torch.set_num_threads(threads)
    rows, skipped = [], {}
    for backend in BACKENDS:
        skipped[backend] = why_not(backend)
        if skipped[backend] is None:
            rows += [row for kind in KINDS for row in measure(kind, backend, SIZES, batch, repeats)]
    result = {"rows": rows, "skipped": {name: reason for name, reason in skipped.items() if reason}, "bar": BAR}
    print(table(result))
    save(result, output)


if __name__ == "__main__":
    typer.run(main)
