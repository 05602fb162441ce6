"""What an evaluation at every scale costs: `python -m benchmarks.evaluation`.

Compares `m3-eval`'s questions at all scales, with everything that it reads, records and keeps, with the sum of its parts, one
encoding of every picture and one run of the language model for each scale, and with an evaluation for each scale.
"""

import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image

import modeling_m3
from m3_evaluation.answering import Answerer, Chat
from m3_evaluation.asking import ask_all
from m3_evaluation.record import Record

from .measure import in_turn, markdown_table, save, spread


BAR = 1.15
QUESTION = "What color is the large circle?"


def measure(
    model: Any, processor: Any, folder: Path, pictures: int, batch_size: int, new_tokens: int, repeats: int
) -> dict[str, list[float]]:
    """Seconds of the parts and of whole evaluations, in turn, of pictures that are drawn into a folder."""
    generator = np.random.default_rng(0)
    files = [folder / f"{index}.png" for index in range(pictures)]
    for file in files:
        Image.fromarray(generator.integers(0, 256, (336, 336, 3), dtype=np.uint8)).save(file)
    chats: list[Chat] = [
        [{"role": "user", "content": [{"type": "image", "image": str(file)}, {"type": "text", "text": QUESTION}]}]
        for file in files
    ]
    scales = processor.visual_token_scales
    settings = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}

    def evaluate(scales: Sequence[int]) -> None:
        with tempfile.TemporaryDirectory(dir=folder) as run:
            record, questions = Record(Path(run, "answers.0.jsonl")), [(str(i), settings) for i in range(pictures)]
            asked = Answerer(model, processor), scales, questions, chats.__getitem__, record, Path(run), batch_size
            ask_all(*asked, desc="", quiet=True)

    def encode() -> None:
        for file in files:
            pixels = processor.image_processor([Image.open(file)], return_tensors="pt")["pixel_values"]
            model.encode_images(pixels.to(model.device))

    prompts, encoded = {}, []
    for start in range(0, pictures, batch_size):
        batch = chats[start : start + batch_size]
        for scale in scales:
            inputs = processor.apply_chat_template(
                batch,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"num_visual_tokens": scale, "padding": True},
            ).to(model.device)
            pixels = inputs.pop("pixel_values")
            prompts.setdefault(scale, []).append(inputs)
        encoded.append(model.encode_images(pixels))

    def answer(scale: int) -> None:
        for inputs, images in zip(prompts[scale], encoded):
            model.generate(**inputs, encoded_images=images, **settings)

    runs: dict[str, Callable] = {"one encoding of every picture": encode}
    runs |= {f"answers at {scale}, encoded before": lambda scale=scale: answer(scale) for scale in scales}
    runs |= {
        "m3-eval at all scales": lambda: evaluate(scales),
        "m3-eval for each scale": lambda: [evaluate([scale]) for scale in scales],
    }
    return in_turn(runs, repeats)


def table(result: dict[str, Any]) -> str:
    """What was measured, in Markdown, and the ratio the bar is about."""
    seconds = result["seconds"]
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    together, apart = medians.pop("m3-eval at all scales"), medians.pop("m3-eval for each scale")
    return (
        f"{result['pictures']} pictures in batches of {result['batch_size']}, {result['new_tokens']} new tokens; medians "
        f"of {result['repeats']}, least to most.\n\n"
        + markdown_table(["", "seconds"], [[name, spread(times, 2)] for name, times in seconds.items()])
        + f"\n\nAt all scales, m3-eval takes {together / sum(medians.values()):.2f}x the sum of the parts (at most {BAR}); "
        f"an evaluation for each scale takes {apart / together:.2f}x that."
    )


def main(
    checkpoint: Annotated[str, typer.Option(help="A folder, or an id on the Hub.")] = "modeling_m3/m3_tiny",
    pictures: Annotated[int, typer.Option(min=1)] = 16,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 8,
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    output: Annotated[Path | None, typer.Option(help="A JSON file for all that was measured.")] = None,
) -> None:
    """Measures what an evaluation at every scale costs."""
    model, processor = modeling_m3.load(checkpoint)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        seconds = measure(model.eval(), processor, Path(folder), pictures, batch_size, max_new_tokens, repeats)
    result = {
        "checkpoint": Path(checkpoint).name,
        "pictures": pictures,
        "batch_size": batch_size,
        "new_tokens": max_new_tokens,
        "repeats": repeats,
        "seconds": seconds,
    }
    print(table(result))
    save(result, output)


if __name__ == "__main__":
    typer.run(main)
