"""Prefill and time to first token at every number of visual tokens: `python -m benchmarks.prefill --output FILE.json`.

A prefill is one `forward` with pictures, vision tower included, up to the logits of the last position. The time to the
first token begins with a picture and a text: processor, then `generate`. Beside them stand the floating-point operations
of the same work, counted by torch on the meta device, and how far the measured ratio to the finest scale exceeds theirs.

With `--compile`, each is measured by the graphs of `compile_for` too, in turn with those without, and what memory they add.
"""

import statistics
import time
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot as plt
import torch
import typer
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoProcessor

from modeling_m3 import M3LlavaConfig, M3LlavaForConditionalGeneration, default_checkpoint

from .measure import Device, forget_peak_memory, in_turn, markdown_table, memory, milliseconds, save
from .peers import graph_prefill
from .random_checkpoint import SHAPES, prompt, random_model


DTYPES, BATCHES = ["float32", "bfloat16"], [1, 4]
M3_TINY = "m3-tiny"  # the checkpoint that ships with the package, in place of a shape
BAR = 1.10  # measured ratio to the finest scale, at most this much of the ratio of FLOPs
TEXT = "<|user|><image>\nWhat does the sign say?<|assistant|>"
Size = Enum("Size", {name: name for name in (*SHAPES, M3_TINY)}, type=str)


def prefill_flops(config: M3LlavaConfig, inputs: dict[str, torch.Tensor]) -> dict[str, int]:
    """Floating-point operations of a prefill with these inputs, counted by torch; no weight is allocated.

    Multiplications and additions count one each; what is not a matrix product or attention does not count.

    Returns:
        "total", and "attention": those between tokens, which grow with the square of their number.
    """
    with torch.device("meta"):
        model = M3LlavaForConditionalGeneration(config).eval()
    batch, length = inputs["input_ids"].shape
    scales = inputs["num_visual_tokens"].tolist()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        encoded = model.encode_images(
            inputs["pixel_values"].to("meta"), inputs.get("image_sizes"), inputs["image_tile_grids"]
        )
        model.get_visual_tokens(encoded, scales)
        embeddings = torch.empty(batch, length, config.text_config.hidden_size, device="meta")
        model(inputs_embeds=embeddings, logits_to_keep=1)
    by_operation = counter.get_flop_counts()["Global"]
    between_tokens = (torch.ops.aten.bmm, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu)
    return {
        "total": counter.get_total_flops(),
        "attention": sum(count for operation, count in by_operation.items() if operation in between_tokens),
    }


@torch.no_grad()
def prefill(model: M3LlavaForConditionalGeneration, inputs: dict[str, torch.Tensor]) -> None:
    model(**inputs, logits_to_keep=1).logits.cpu()


def measure(
    size: str,
    dtype: str,
    batch: int,
    text: int,
    repeats: int,
    device: str,
    compiled: bool = False,
    scales: list[int] | None = None,
    prefill_only: bool = False,
) -> dict[str, Any]:
    """One case: seconds of every scale's prefill and first token, in turn, and FLOPs.

    Args:
        size: of `SHAPES`.
        dtype: of weights and arithmetic, by torch's name.
        batch: prompts with one picture each.
        text: tokens of a prompt that are not visual ones.
        repeats: measurements of each.
        device: to run on.
        compiled: whether by graphs too.
        scales: numbers of visual tokens; all by default.
        prefill_only: leaves first tokens out.
    """
    if size == M3_TINY:
        model = M3LlavaForConditionalGeneration.from_pretrained(default_checkpoint()).to(device, getattr(torch, dtype))
    else:
        model = random_model(size, getattr(torch, dtype), device=device)
    processor = AutoProcessor.from_pretrained(default_checkpoint(), backend="pil")
    model.config.image_token_id = processor.image_token_id
    picture = Image.effect_mandelbrot((640, 480), (-2, -1.5, 1, 1.5), 100).convert("RGB")
    scales = sorted(scales or model.config.visual_token_scales, reverse=True)
    prompts = {scale: prompt(model, scale, text - 1, batch) for scale in scales}

    def first_token(scale: int) -> None:
        inputs = processor(
            images=[picture] * batch, text=[TEXT] * batch, num_visual_tokens=scale, return_tensors="pt"
        ).to(device, model.dtype)
        model.generate(**inputs, max_new_tokens=1, do_sample=False).cpu()

    runs: dict[str, Callable] = {
        f"prefill {scale}": lambda scale=scale: prefill(model, prompts[scale]) for scale in scales
    }
    if not prefill_only:
        runs |= {f"first token {scale}": lambda scale=scale: first_token(scale) for scale in scales}
    held, graphs = {}, None
    if compiled:
        held["without graphs"] = _peak_memory(device, [runs[f"prefill {scales[0]}"]])
        start = time.perf_counter()
        model.compile_for(scales, max_text=text, like=prompts[scales[0]])
        held["seconds to compile"], graphs = time.perf_counter() - start, model._prefill_graphs
        runs = {name: _with_graphs(model, None, run) for name, run in runs.items()}
        for scale in scales:
            runs[f"compiled prefill {scale}"] = graph_prefill(model, prompts[scale])
            if not prefill_only:
                by_first_token = _with_graphs(model, graphs, lambda scale=scale: first_token(scale))
                runs[f"compiled first token {scale}"] = by_first_token
        by_graph = [run for name, run in runs.items() if name.startswith("compiled")]
        held["with graphs"] = _peak_memory(device, by_graph)
    names = [f"{kind}{name}" for kind in ("", "compiled ") for name in ("prefill", "first token")]
    seconds = in_turn(_beside_each_other(runs), repeats)
    return {
        "size": size,
        "dtype": dtype,
        "batch": batch,
        "text_tokens": text,
        "parameters": sum(p.numel() for p in model.parameters()),
        "scales": [
            {
                "visual_tokens": scale,
                "flops": prefill_flops(model.config, prompts[scale])["total"],
                **{
                    name.replace(" ", "_"): seconds[f"{name} {scale}"] for name in names if f"{name} {scale}" in seconds
                },
            }
            for scale in scales
        ],
        **({"memory": held} if compiled else {}),
    }


def _with_graphs(model: M3LlavaForConditionalGeneration, graphs: Any, run: Callable) -> Callable:
    def with_graphs() -> None:
        model._prefill_graphs = graphs
        run()

    return with_graphs


def _beside_each_other(runs: dict[str, Callable]) -> dict[str, Callable]:
    """What is compared follows each other: with and without a graph."""
    return dict(sorted(runs.items(), key=lambda item: item[0].removeprefix("compiled ")))


def _peak_memory(device: str, runs: list[Callable]) -> int:
    """Bytes that the device, or this process, holds at most while these run once more than they need to be warm."""
    for run in runs:
        run()
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        forget_peak_memory()
    for run in runs:
        run()
    return torch.cuda.max_memory_reserved() if torch.device(device).type == "cuda" else memory("VmHWM")


def relative(case: dict[str, Any]) -> list[tuple[float, float]]:
    """For every scale: (median prefill time, FLOPs), as parts of the finest scale's."""
    times = [statistics.median(row["prefill"]) for row in case["scales"]]
    flops = [row["flops"] for row in case["scales"]]
    return [(time / times[0], count / flops[0]) for time, count in zip(times, flops)]


def table(result: dict[str, Any]) -> str:
    return "\n\n".join(case_table(case) for case in result["cases"])


def case_table(case: dict[str, Any]) -> str:
    rows = []
    for row, (part, flops) in zip(case["scales"], relative(case)):
        rows.append(
            [
                row["visual_tokens"],
                f"{row['flops'] / 1e12:.2f}",
                milliseconds(row["prefill"]),
                f"{part:.3f}",
                f"{flops:.3f}",
            ]
            + [f"{part / flops:.2f}", milliseconds(row["first_token"]) if "first_token" in row else ""]
            + _compiled_cells(row)
        )
    header = [
        "visual tokens",
        "TFLOPs",
        "prefill, ms",
        "of the finest",
        "FLOPs of the finest",
        "ratio",
        "first token, ms",
    ]
    graphs = ""
    if "memory" in case:
        header += ["compiled prefill, ms", "of without"]
        if "compiled_first_token" in case["scales"][0]:
            header += ["compiled first token, ms", "of without"]
        before, after = (case["memory"][f"{name} graphs"] / 1e9 for name in ("without", "with"))
        graphs = f" Most memory held {before:.2f} GB without graphs, {after:.2f} GB with."
    return (
        f"{case['size']}, {case['parameters'] / 1e9:.2f} B parameters, {case['dtype']}, batch {case['batch']}, "
        f"{case['text_tokens']} text tokens; medians of {len(case['scales'][0]['prefill'])}, least to most. "
        f"`ratio` should be at most {BAR}.{graphs}\n\n{markdown_table(header, rows)}"
    )


def _compiled_cells(row: dict[str, Any]) -> list[str]:
    cells = []
    for name in ("prefill", "first_token"):
        if (taken := row.get(f"compiled_{name}")) is not None:
            cells += [milliseconds(taken), f"{statistics.median(taken) / statistics.median(row[name]):.2f}"]
    return cells


def plot(cases: list[dict[str, Any]], file: Path) -> None:
    """Visual tokens against prefill time and FLOPs, both as parts of those of the finest scale."""
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for case in cases:
        tokens = [row["visual_tokens"] for row in case["scales"]]
        times = [time for time, _ in relative(case)]
        axes.plot(tokens, times, "o-", label=f"prefill time, {case['dtype']}, batch {case['batch']}")
    axes.plot(tokens, [flops for _, flops in relative(cases[0])], "k--", label="FLOPs")
    axes.set(xscale="log", xlabel="visual tokens per image", ylabel=f"part of that at {tokens[0]}", ylim=(0, 1.05))
    axes.set_xticks(tokens, [str(count) for count in tokens])
    axes.minorticks_off()
    axes.legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def main(
    size: Annotated[Size, typer.Option(help="Which language model; the vision tower is CLIP-L/336.")] = Size["1b"],
    dtype: Annotated[
        list[str], typer.Option(help="One or more of torch's types. Repeat the option for several.")
    ] = DTYPES,
    batch: Annotated[
        list[int], typer.Option(min=1, help="One or more numbers of prompts. Repeat the option for several.")
    ] = BATCHES,
    text: Annotated[int, typer.Option(min=2, help="Tokens of a prompt that are not visual ones.")] = 31,
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    device: Device = "cpu",
    compiled: Annotated[bool, typer.Option("--compile", help="By the graphs of compile_for too.")] = False,
    scale: Annotated[
        list[int] | None, typer.Option(help="Numbers of visual tokens; all if left out. Repeat the option for several.")
    ] = None,
    prefill_only: Annotated[bool, typer.Option("--prefill-only", help="Leave first tokens out.")] = False,
    output: Annotated[Path | None, typer.Option(help="A JSON file for all that was measured.")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="A PNG file.")] = None,
) -> None:
    """Measures prefill and time to first token at every number of visual tokens."""
    unknown = [name for name in dtype if name not in ("float32", "bfloat16", "float16")]
    if unknown:
        raise typer.BadParameter(f"--dtype {unknown[0]}: choose float32, bfloat16 or float16.")
    cases = []
    for name in dtype:
        for prompts in batch:
            cases.append(measure(size.value, name, prompts, text, repeats, device, compiled, scale, prefill_only))
            print(case_table(cases[-1]), end="\n\n", flush=True)
            save({"cases": cases}, output)
    if plot_file is not None:
        plot(cases, plot_file)


if __name__ == "__main__":
    typer.run(main)
