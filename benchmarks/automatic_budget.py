"""What the automatic budget costs in time: `python -m benchmarks.automatic_budget`.

A language model of random weights is led along the paths that m3-tiny's choice takes on its test pictures, each in its share.
Compared, to the first token of the final answer: `generate` with "auto", and plain calls of the same passes from one encoding,
where an answer that is looked at is answered as far as that.
"""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from transformers.generation import BaseStreamer

from modeling_m3.automatic_budget_m3 import AutomaticBudget, Network

from .measure import Device, in_turn, markdown_table, save, spread
from .one_encoding import Size
from .random_checkpoint import prompt, random_model


BAR, DECISION_BAR = 1.15, 0.01
PATHS = Path(__file__).parents[1] / "model_cards" / "m3-tiny" / "automatic_budget.json"
SCALES = [1, 9, 36, 144, 576]


class _FirstToken(BaseStreamer):
    """Ends a generation at its first token after the prompt."""

    def __init__(self) -> None:
        self.calls = 0

    def put(self, value: torch.Tensor) -> None:
        self.calls += 1
        if self.calls == 2:
            raise StopIteration

    def end(self) -> None:
        pass


class _Led:
    """A choice that takes one path, after it has decided as the fitted one does."""

    keep = 0.99

    def __init__(self, path: str, choice: AutomaticBudget):
        self.passes = [(int(step.rstrip("?")), step.endswith("?")) for step in path.split()]
        self.choice, self.scales, self.probe_tokens = choice, choice.scales, choice.probe_tokens
        self.start = self.passes[0][0]
        self.seconds = 0.0

    def first_choice(self, signals: torch.Tensor, keep: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        begin = time.perf_counter()
        logits, _, _ = self.choice.first_choice(signals, keep)
        self.seconds = time.perf_counter() - begin
        stays = len(self.passes) == 1 or self.passes[0][1]
        scale, looked = self.passes[0] if stays else self.passes[1]
        return logits, np.array([scale]), np.array([looked])

    def next_choice(self, scale: int, logits: np.ndarray, confidence: torch.Tensor, keep: float) -> np.ndarray:
        self.choice.next_choice(scale, logits, confidence, keep)
        index = [number for number, _ in self.passes].index(scale)
        return np.array([self.passes[min(index + 1, len(self.passes) - 1)][0]])


def measure(
    size: str, dtype: str, device: str, paths: dict[str, float], repeats: int
) -> tuple[dict[str, list[float]], list[float]]:
    """Seconds by path, "auto" and plain, in turn; and of the decision."""
    model = random_model(size, getattr(torch, dtype), device=device)
    model.generation_config.eos_token_id = None  # answers are looked at as far as may be
    width = 2 * model.config.text_config.hidden_size
    choice = _any_choice(width, _start(paths))
    prompts = {scale: prompt(model, scale) for scale in SCALES}
    automatic = {**prompts[576], "num_visual_tokens": torch.tensor([0])}
    decisions: list[float] = []

    def first_token(inputs: dict[str, Any]) -> None:
        try:
            model.generate(**inputs, do_sample=False, max_new_tokens=2, streamer=_FirstToken())
        except StopIteration:
            pass

    def by_auto(path: str) -> None:
        model.automatic_budget = led = _Led(path, choice)
        first_token(automatic)
        decisions.append(led.seconds)

    def by_plain_calls(path: str) -> None:
        passes = _Led(path, choice).passes
        encoded = model.encode_images(prompts[576]["pixel_values"])
        for index, (scale, looked) in enumerate(passes):
            inputs = {name: value for name, value in prompts[scale].items() if name != "pixel_values"}
            inputs["encoded_images"] = encoded
            if looked:
                tokens = choice.probe_tokens
                model.generate(**inputs, do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens)
            elif index + 1 < len(passes):
                model.generate(**inputs, do_sample=False, max_new_tokens=1)
            else:
                first_token(inputs)

    runs: dict[str, Callable] = {}
    for path in paths:
        runs[f"auto: {path}"] = lambda path=path: by_auto(path)
        runs[f"plain: {path}"] = lambda path=path: by_plain_calls(path)
    return in_turn(runs, repeats), decisions


def table(result: dict[str, Any]) -> str:
    """What was measured, in Markdown, and the ratios the bars are about."""
    seconds, shares = result["seconds"], result["paths"]
    mean = {
        way: sum(share * statistics.median(seconds[f"{way}: {path}"]) for path, share in shares.items())
        / sum(shares.values())
        for way in ("auto", "plain")
    }
    decision = statistics.median(result["decisions"]) / statistics.median(seconds[f"auto: {min(shares, key=len)}"])
    rows = [
        [path, f"{share:.1%}", spread(seconds[f"auto: {path}"], 3), spread(seconds[f"plain: {path}"], 3)]
        for path, share in shares.items()
    ]
    return (
        f"{result['size']}, {result['dtype']}; seconds to the first token of the final answer, medians of {result['repeats']}, "
        "least to most. A question mark: the answer was looked at.\n\n"
        + markdown_table(["passes", "share", "auto", "plain calls"], rows)
        + f"\n\nIn the mean {mean['auto']:.3f} s by auto and {mean['plain']:.3f} s by plain calls of the same passes: "
        f"{mean['auto'] / mean['plain']:.2f}x (at most {BAR}). The decision takes {decision:.2%} of the first pass (below "
        f"{DECISION_BAR:.0%})."
    )


def main(
    size: Annotated[Size, typer.Option(help="Which language model; the vision tower is CLIP-L/336.")] = Size["1b"],
    dtype: Annotated[str, typer.Option(help="One of torch's types.")] = "float32",
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    paths: Annotated[int, typer.Option(help="So many, the most frequent.", min=1)] = 6,
    device: Device = "cpu",
    output: Annotated[Path | None, typer.Option(help="A JSON file for all that was measured.")] = None,
) -> None:
    """Measures what the automatic budget costs in time."""
    taken = json.loads(PATHS.read_text(encoding="utf-8"))["test pictures"]["automatic"]
    [shares] = [point["paths"] for point in taken if point["keep"] == 0.99]
    most = dict(sorted(shares.items(), key=lambda entry: -entry[1])[:paths])
    with torch.no_grad():
        seconds, decisions = measure(size.value, dtype, device, most, repeats)
    result = {
        "size": size.value,
        "dtype": dtype,
        "repeats": repeats,
        "paths": most,
        "seconds": seconds,
        "decisions": decisions,
    }
    print(table(result))
    save(result, output)


def _start(paths: dict[str, float]) -> int:
    return int(next(iter(paths)).split()[0].rstrip("?"))


def _any_choice(width: int, start: int) -> AutomaticBudget:
    """Networks of the fitted sizes and random weights."""
    draw = np.random.default_rng(0).standard_normal

    def network(inputs: int, hidden: int) -> Network:
        sizes = (inputs,), (inputs,), (inputs, hidden), (hidden,), (hidden, len(SCALES)), (len(SCALES),)
        return Network(*(np.abs(draw(size)).astype(np.float32) + 0.1 for size in sizes))

    after = {scale: network(len(SCALES) + 9, 96) for scale in SCALES[1:-1]}
    return AutomaticBudget(
        SCALES, 9, width, 8, 0.97, 0.99, [(0.9, 1.0, 1.0), (1.0, 0.1, 0.1)], network(width, 144), after
    )


if __name__ == "__main__":
    typer.run(main)
