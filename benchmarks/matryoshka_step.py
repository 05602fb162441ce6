"""A training step over five scales: the objective against the plain way, and against a step at 576 tokens alone.

`python -m benchmarks.matryoshka_step --shape m3-tiny --output FILE.json` prints a table and writes what it is made from.

A step is forward, backward and AdamW, in float32, of a model with random weights on random inputs. The plain way encodes and
runs each scale separately and takes one backward of the sum; it and 576 tokens alone are measured with an ordinary forward,
which computes logits everywhere, and once more with logits only where there is a label, as the objective does it. Time is taken with the
ways of doing it interleaved in one process, after one step of each to warm up. Memory is what the process holds at most
during a step (`VmHWM` of Linux) beyond what it held before (`VmRSS`: weights, inputs, the optimizer's state), each step in
a fresh process whose allocator returns what is freed at once: gradients and activations, and the allocator's own
temporaries, but not its hoards.
"""

import gc
import math
import os
import statistics
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from modeling_m3 import M3LlavaConfig, M3LlavaForConditionalGeneration

from .measure import forget_peak_memory, in_a_fresh_process, in_turn, memory, save, spread


SCALES = [1, 9, 36, 144, 576]
# As the issue of this measurement demands: five scales cost at most this much of the plain way, or of 576 tokens alone.
BARS = {"time / plain way": 0.7, "memory / plain way": 0.5, "memory / 576 alone": 1.25}
TEXT_BEFORE, TEXT_AFTER, LABELLED = 16, 64, 40  # tokens of a prompt, and how many of the last are an answer

SHAPES: dict[str, dict[str, Any]] = {
    # The checkpoint that ships with the package. The last layer of a vision tower is not used, as in LLaVA.
    "m3-tiny": {
        "batch": 8,
        "vision": {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 7, "num_attention_heads": 4},
        "text": {
            "vocab_size": 512,
            "hidden_size": 192,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
        },
    },
    # 31 M parameters of vision tower and 71 M of language model, whose vocabulary is Llama's.
    "100m": {
        "batch": 4,
        "vision": {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 10, "num_attention_heads": 8},
        "text": {
            "vocab_size": 32000,
            "hidden_size": 512,
            "intermediate_size": 1408,
            "num_hidden_layers": 12,
            "num_attention_heads": 8,
        },
    },
}
Shape = Enum("Shape", {name: name for name in SHAPES}, type=str)


def build(shape: dict[str, Any]) -> M3LlavaForConditionalGeneration:
    """A model of one of `SHAPES`, weights random but the same in every process."""
    config = M3LlavaConfig(
        vision_config={**shape["vision"], "image_size": 336, "patch_size": 14},
        text_config={**shape["text"], "bos_token_id": 1, "eos_token_id": 2},
        image_token_id=shape["text"]["vocab_size"] - 1,
    )
    torch.manual_seed(0)
    return M3LlavaForConditionalGeneration(config).train()


def make_batch(config: M3LlavaConfig, size: int, scale: int) -> dict[str, torch.Tensor]:
    """Prompts with one picture each, as a processor makes them for a scale; text and pictures are the same for each."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(3, config.image_token_id, (size, TEXT_BEFORE + TEXT_AFTER), generator=generator)
    placeholders = torch.full((size, scale), config.image_token_id)
    ids = torch.cat([text[:, :TEXT_BEFORE], placeholders, text[:, TEXT_BEFORE:]], dim=1)
    labels = ids.clone()
    labels[:, :-LABELLED] = -100
    return {
        "input_ids": ids,
        "labels": labels,
        "pixel_values": torch.randn(size, 3, 336, 336, generator=generator),
        "num_visual_tokens": torch.full((size,), scale),
    }


def five_scales(model: M3LlavaForConditionalGeneration, batches: dict[int, dict]) -> torch.Tensor:
    return model(**batches[576], matryoshka_scales=SCALES).loss


def plain_way(model: M3LlavaForConditionalGeneration, batches: dict[int, dict]) -> torch.Tensor:
    return torch.stack([model(**batches[scale]).loss for scale in SCALES]).mean()


def plain_way_with_few_logits(model: M3LlavaForConditionalGeneration, batches: dict[int, dict]) -> torch.Tensor:
    return torch.stack([model(**batches[scale], matryoshka_scales=[scale]).loss for scale in SCALES]).mean()


def alone(model: M3LlavaForConditionalGeneration, batches: dict[int, dict]) -> torch.Tensor:
    return model(**batches[576]).loss


def alone_with_few_logits(model: M3LlavaForConditionalGeneration, batches: dict[int, dict]) -> torch.Tensor:
    return model(**batches[576], matryoshka_scales=[576]).loss


WAYS: dict[str, Callable] = {
    "five scales": five_scales,
    "plain way": plain_way,
    "plain way, logits at labels": plain_way_with_few_logits,
    "576 alone": alone,
    "576 alone, logits at labels": alone_with_few_logits,
}


class Steps:
    """A model in training, and steps to take with it."""

    def __init__(self, shape: dict[str, Any]):
        self.model = build(shape)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5)
        self.batches = {scale: make_batch(self.model.config, shape["batch"], scale) for scale in SCALES}

    def __call__(self, way: str) -> float:
        loss = WAYS[way](self.model, self.batches)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


def measure_times(shape: dict[str, Any], repeats: int) -> dict[str, list[float]]:
    """Seconds of every way, in turn; each round begins with another."""
    steps = Steps(shape)
    return in_turn({way: lambda way=way: steps(way) for way in WAYS}, repeats)


def measure_memory(shape: dict[str, Any], way: str) -> tuple[int, float]:
    """Bytes that a step holds at most beyond what was held before, and the loss of the first step.

    To be called in a fresh process, under Linux.
    """
    steps = Steps(shape)
    loss = steps(way)
    gc.collect()
    before = memory()
    forget_peak_memory()
    steps(way)
    return memory("VmHWM") - before, loss


def summarize(measured: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Ratios of the medians: the objective's to every other way's."""
    seconds, memory = (
        {way: statistics.median(values[quantity]) for way, values in measured.items()}
        for quantity in ("seconds", "bytes")
    )
    ratios = {}
    for way in list(WAYS)[1:]:
        ratios[f"time / {way}"] = seconds["five scales"] / seconds[way]
        ratios[f"memory / {way}"] = memory["five scales"] / memory[way]
    return ratios


def table(result: dict[str, Any]) -> str:
    """What was measured, in Markdown."""
    lines = [
        f"{result['shape']}: {result['parameters']['vision'] / 1e6:.1f} M parameters of vision tower and "
        f"{result['parameters']['language'] / 1e6:.1f} M of language model, batch {result['settings']['batch']}, "
        f"{result['threads']} thread(s). Medians and ranges of "
        f"{len(result['measured']['plain way']['seconds'])} steps for time, {len(result['measured']['plain way']['bytes'])} "
        "for memory.",
        "",
        "| step | seconds | MiB |",
        "|---|---|---|",
    ]
    for way, values in result["measured"].items():
        cells = []
        for numbers, digits in ((values["seconds"], 2), ([number / 2**20 for number in values["bytes"]], 0)):
            cells.append(spread(numbers, digits))
        lines.append(f"| {way} | {' | '.join(cells)} |")
    lines += ["", "| five scales | measured | at most |", "|---|---|---|"]
    lines += [f"| {name} | {ratio:.2f} | {BARS.get(name, '')} |" for name, ratio in result["ratios"].items()]
    return "\n".join(lines)


def measure(name: str, repeats: int) -> dict[str, Any]:
    """Everything about one shape: the machine, the model, every measurement, and the ratios of their medians."""
    shape = SHAPES[name]
    model = build(shape)
    counts = {
        "vision": sum(p.numel() for p in model.model.vision_tower.parameters()),
        "language": sum(p.numel() for p in (*model.model.language_model.parameters(), *model.lm_head.parameters())),
    }
    del model
    seconds = in_a_fresh_process(measure_times, shape, repeats)
    measured = {way: {"seconds": seconds[way], "bytes": [], "loss": None} for way in WAYS}
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # of glibc, for new processes
    for _ in range(min(repeats, 3)):
        for way in WAYS:
            peak, measured[way]["loss"] = in_a_fresh_process(measure_memory, shape, way)
            measured[way]["bytes"].append(peak)
    if not math.isclose(measured["five scales"]["loss"], measured["plain way"]["loss"], rel_tol=1e-5):
        raise RuntimeError(f"Both ways to train at five scales must have the same loss: {measured}")
    return {
        "shape": name,
        "settings": shape,
        "text_tokens": {"before": TEXT_BEFORE, "after": TEXT_AFTER, "labelled": LABELLED},
        "parameters": counts,
        "threads": torch.get_num_threads(),
        "measured": measured,
        "ratios": summarize(measured),
        "bars": BARS,
    }


def main(
    shape: Annotated[Shape, typer.Option(help="Which model.")],
    repeats: Annotated[int, typer.Option(min=1, help="Steps of each way that are timed.")] = 10,
    output: Annotated[Path | None, typer.Option(help="A JSON file for all that was measured.")] = None,
) -> None:
    """Measures a training step over five scales."""
    result = measure(shape.value, repeats)
    print(table(result))
    save(result, output)


if __name__ == "__main__":
    typer.run(main)
