"""What weights of fewer bits cost in right answers, on m3-tiny: `python -m benchmarks.quantized_answers`.

The questions are those of its results page, about fewer pictures; every precision answers the same ones.
"""

from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForImageTextToText, AutoProcessor

from m3_training.m3_tiny.data import held_out_easy_vqa, held_out_scenes
from m3_training.m3_tiny.evaluate import evaluate
from modeling_m3 import default_checkpoint

from .measure import markdown_table, save
from .quantization import VARIANTS


def measure(pictures: int) -> dict[str, dict[str, Any]]:
    """By precision and kind of question: how many there are, and how many are answered to the letter at each scale."""
    processor = AutoProcessor.from_pretrained(default_checkpoint(), backend="pil")
    counts = {}
    for name, kwargs in VARIANTS.items():
        model = AutoModelForImageTextToText.from_pretrained(default_checkpoint(), **{"dtype": torch.float32, **kwargs})
        counts[name] = {}
        for questions in (held_out_scenes(pictures), islice(held_out_easy_vqa(), pictures)):
            answers = evaluate(model.eval(), processor, questions, processor.visual_token_scales)
            counts[name] |= answers["average"].summary()
    return counts


def table(result: dict[str, Any]) -> str:
    """Percentages of right answers, averaged over kinds of questions."""
    rows = []
    for name, kinds in result["counts"].items():
        shares: dict[str, list[float]] = {}
        for counted in kinds.values():
            for scale, correct in counted["correct"].items():
                shares.setdefault(scale, []).append(100 * correct / counted["questions"])
        rows.append([name, *(f"{sum(values) / len(values):.1f}" for values in reversed(shares.values()))])
    pictures = (
        f"m3-tiny, {result['pictures']} generated pictures and as many of easy-vqa, {len(kinds)} kinds of questions."
    )
    return f"{pictures}\n\n{markdown_table(['weights', *(f'{scale} tokens' for scale in reversed(shares))], rows)}"


def main(
    pictures: Annotated[int, typer.Option(min=1, help="Of either set.")] = 200,
    output: Annotated[Path | None, typer.Option(help="A JSON file for all that was measured.")] = None,
) -> None:
    """Counts right answers of m3-tiny in float32, bfloat16, int8 and nf4."""
    result = {"pictures": pictures, "counts": measure(pictures)}
    print(table(result))
    save(result, output)


if __name__ == "__main__":
    typer.run(main)
