"""What one encoding saves where a picture is asked about at every scale: `python -m benchmarks.one_encoding`.

Compares five answers from one `encode_images` with the sum of its parts, which it should not exceed by more than a tenth,
and with five answers from pixels.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

from .random_checkpoint import SHAPES, prompt, random_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SHAPES, default="1b")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--max-new-tokens", type=int, default=8)
    parser.add_argument("--runs", type=int, default=3, help="the fastest of so many counts")
    options = parser.parse_args()
    model = random_model(options.size, getattr(torch, options.dtype)).to(options.device)
    prompts = {scale: prompt(model, scale) for scale in model.config.visual_token_scales}
    pixels = prompts[1]["pixel_values"]
    texts = {scale: {k: v for k, v in inputs.items() if k != "pixel_values"} for scale, inputs in prompts.items()}

    def answer(inputs: dict[str, torch.Tensor], **images: Any) -> torch.Tensor:
        length = {"max_new_tokens": options.max_new_tokens, "min_new_tokens": options.max_new_tokens}
        return model.generate(**inputs, **images, **length, do_sample=False).cpu()

    def from_one_encoding() -> None:
        encoded = model.encode_images(pixels)
        for inputs in texts.values():
            answer(inputs, encoded_images=encoded)

    def from_pixels() -> None:
        for inputs in prompts.values():
            answer(inputs)

    with torch.no_grad():
        encoded = model.encode_images(pixels)
        encoding = seconds(lambda: model.encode_images(pixels).tile_features.cpu(), options.runs)
        alone = {
            scale: seconds(lambda inputs=inputs: answer(inputs, encoded_images=encoded), options.runs)
            for scale, inputs in texts.items()
        }
        together, repeated = seconds(from_one_encoding, options.runs), seconds(from_pixels, options.runs)
    parts = encoding + sum(alone.values())
    print(f"one encoding: {encoding:.3f} s")
    for scale, taken in alone.items():
        print(f"answer at {scale:>3} tokens, encoded before: {taken:.3f} s")
    print(f"all five from one encoding: {together:.3f} s, {together / parts:.2f}x the sum of the above")
    print(f"all five from pixels: {repeated:.3f} s, {repeated / together:.2f}x that from one encoding")


def seconds(run: Callable[[], object], runs: int) -> float:
    run()  # the first call is slower
    taken = []
    for _ in range(runs):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return min(taken)


if __name__ == "__main__":
    main()
