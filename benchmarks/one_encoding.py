"""What one encoding saves where a picture is asked about at every scale: `python -m benchmarks.one_encoding`.

Compares five answers from one `encode_images` with the sum of its parts, which it should not exceed by more than a tenth,
and with five answers from pixels.
"""

import statistics
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from .measure import Device, in_turn, markdown_table, save, spread
from .random_checkpoint import SHAPES, prompt, random_model


BAR = 1.1
Size = Enum("Size", {name: name for name in SHAPES}, type=str)


def measure(size: str, dtype: str, device: str, new_tokens: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of the encoding, of every answer from it, and of all answers both ways, in turn."""
    model = random_model(size, getattr(torch, dtype), device=device)
    prompts = {scale: prompt(model, scale) for scale in model.config.visual_token_scales}
    pixels = prompts[1]["pixel_values"]
    texts = {scale: {k: v for k, v in inputs.items() if k != "pixel_values"} for scale, inputs in prompts.items()}
    encoded = model.encode_images(pixels)

    def answer(inputs: dict[str, torch.Tensor], **images: Any) -> None:
        model.generate(**inputs, **images, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False).cpu()

    def from_one_encoding() -> None:
        together = model.encode_images(pixels)
        for inputs in texts.values():
            answer(inputs, encoded_images=together)

    def from_pixels() -> None:
        for inputs in prompts.values():
            answer(inputs)

    runs: dict[str, Callable] = {"encoding": lambda: model.encode_images(pixels)}
    for scale, inputs in texts.items():
        runs[f"answer at {scale}, encoded before"] = lambda inputs=inputs: answer(inputs, encoded_images=encoded)
    runs |= {"all five from one encoding": from_one_encoding, "all five from pixels": from_pixels}
    return in_turn(runs, repeats)


def table(result: dict[str, Any]) -> str:
    """What was measured, in Markdown, and the ratio the bar is about."""
    seconds = result["seconds"]
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    together, pixels = medians["all five from one encoding"], medians["all five from pixels"]
    parts = sum(medians.values()) - together - pixels
    return (
        f"{result['size']}, {result['dtype']}, {result['new_tokens']} new tokens; medians of "
        f"{len(seconds['encoding'])}, least to most.\n\n"
        + markdown_table(["", "seconds"], [[name, spread(times, 3)] for name, times in seconds.items()])
        + f"\n\nAll five from one encoding take {together / parts:.2f}x the sum of its parts (at most {BAR}); "
        f"all five from pixels take {pixels / together:.2f}x that."
    )


def main(
    size: Annotated[Size, typer.Option(help="Which language model; the vision tower is CLIP-L/336.")] = Size["1b"],
    dtype: Annotated[str, typer.Option(help="One of torch's types.")] = "float32",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 8,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    device: Device = "cpu",
    output: Annotated[Path | None, typer.Option(help="A JSON file for all that was measured.")] = None,
) -> None:
    """Measures what one encoding saves where a picture is asked about at every scale."""
    with torch.no_grad():
        seconds = measure(size.value, dtype, device, max_new_tokens, repeats)
    result = {"size": size.value, "dtype": dtype, "new_tokens": max_new_tokens, "seconds": seconds}
    print(table(result))
    save(result, output)


if __name__ == "__main__":
    typer.run(main)
