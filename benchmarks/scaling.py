"""How the cost of a prefill grows with images, tiles, prompts and text: `python -m benchmarks.scaling --output FILE.json`.

One of them grows at a time. Where time per unit rises with FLOPs per unit, attention between tokens is why; where it falls,
so does the share of what is paid once; where it rises alone, the machine is why, and the rate shows it.
"""

import statistics
from collections.abc import Callable, Iterable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from modeling_m3 import M3LlavaForConditionalGeneration

from .measure import Device, in_turn, markdown_table, save, spread
from .prefill import prefill, prefill_flops
from .random_checkpoint import SHAPES, prompt, random_model


# What grows: (unit, whether images are cut into tiles, {number of units: arguments of `prompt`}).
NUMBERS = [36, 576]
SWEEPS: dict[str, tuple[str, bool, dict[int, dict[str, Any]]]] = {
    "images": ("image", False, {count: {"images": count} for count in (1, 2, 4, 8, 16)}),
    "tiles": (
        "tile, base view included",
        True,
        {
            1 + rows * columns: {"image_size": (336 * rows, 336 * columns)}
            for rows, columns in ((1, 2), (1, 3), (2, 2), (3, 3))
        },
    ),
    "batch": ("prompt", False, {count: {"batch": count} for count in (1, 2, 4, 8)}),
    "text": ("text token", False, {count: {"text": count - 1} for count in (32, 128, 512, 1024)}),
}
Size = Enum("Size", {name: name for name in SHAPES}, type=str)


def measure(
    model: M3LlavaForConditionalGeneration, name: str, scale: int, repeats: int, most: int | None = None
) -> dict[str, Any]:
    """One sweep: seconds and FLOPs of prefills, in turn.

    Args:
        model: of the kind that the sweep needs.
        name: of `SWEEPS`.
        scale: visual tokens per image or tile.
        repeats: measurements of each.
        most: units at most, where the machine is too small for all.
    """
    unit, _, steps = SWEEPS[name]
    prompts = {
        count: prompt(model, scale, **{"text": 31, **arguments})
        for count, arguments in steps.items()
        if most is None or count <= most
    }
    runs: dict[str, Callable] = {str(n): lambda n=n: prefill(model, prompts[n]) for n in prompts}
    seconds = in_turn(runs, repeats)
    rows = [
        {
            "units": count,
            "sequence": inputs["input_ids"].shape[1],
            "flops": prefill_flops(model.config, inputs),
            "seconds": seconds[str(count)],
        }
        for count, inputs in prompts.items()
    ]
    return {"sweep": name, "unit": unit, "visual_tokens": scale, "rows": rows}


def table(result: dict[str, Any]) -> str:
    kind = f"{result['size']}, {result['dtype']}; medians, least to most."
    return "\n\n".join([kind, *(sweep_table(sweep) for sweep in result["sweeps"])])


def sweep_table(sweep: dict[str, Any]) -> str:
    rows = []
    for row in sweep["rows"]:
        time, flops = statistics.median(row["seconds"]), row["flops"]["total"]
        cells = [row["units"], row["sequence"], spread(row["seconds"]), f"{1e3 * time / row['units']:.1f}"]
        share = row["flops"]["attention"] / flops
        rows.append([*cells, f"{flops / 1e9 / row['units']:.1f}", f"{share:.1%}", f"{flops / 1e9 / time:.0f}"])
    unit = sweep["unit"].split(",")[0]
    header = [
        f"{unit}s",
        "sequence",
        "prefill, s",
        f"ms per {unit}",
        f"GFLOPs per {unit}",
        "of them attention",
        "GFLOP/s",
    ]
    return (
        f"{sweep['sweep']}, {sweep['visual_tokens']} visual tokens per image or tile\n\n{markdown_table(header, rows)}"
    )


def models(size: str, dtype: str, device: str, sweeps: Iterable[str]):
    """(sweep, a model of its kind); a model is made anew only where the kind changes."""
    made = None
    for name in sorted(sweeps, key=lambda name: SWEEPS[name][1]):
        cut = SWEEPS[name][1]
        if made is None or cut != (made.config.image_grid_pinpoints is not None):
            made = None  # the old one's memory is free before the new one takes some
            made = random_model(size, getattr(torch, dtype), cut, device)
        yield name, made


def main(
    size: Annotated[Size, typer.Option(help="Which language model; the vision tower is CLIP-L/336.")] = Size["1b"],
    sweep: Annotated[
        list[str], typer.Option(help=f"One or more of {', '.join(SWEEPS)}. Repeat the option for several.")
    ] = list(SWEEPS),  # noqa: B006
    num_visual_tokens: Annotated[
        list[int], typer.Option(help="Per image or tile. Repeat the option for several.")
    ] = NUMBERS,
    dtype: Annotated[str, typer.Option(help="One of torch's types.")] = "bfloat16",
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    most: Annotated[int | None, typer.Option(help="Images, tiles or prompts at most.")] = None,
    device: Device = "cpu",
    output: Annotated[Path | None, typer.Option(help="A JSON file for all that was measured.")] = None,
) -> None:
    """Measures how the cost of a prefill grows."""
    unknown = [name for name in sweep if name not in SWEEPS]
    if unknown:
        raise typer.BadParameter(f"--sweep {unknown[0]}: choose from {', '.join(SWEEPS)}.")
    results = []
    for name, model in models(size.value, dtype, device, sweep):
        for scale in num_visual_tokens:
            results.append(measure(model, name, scale, repeats, None if name == "text" else most))
            print(sweep_table(results[-1]), end="\n\n", flush=True)
            save({"size": size.value, "dtype": dtype, "sweeps": results}, output)


if __name__ == "__main__":
    typer.run(main)
