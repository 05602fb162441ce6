"""What M3 costs at every number of visual tokens, computed: FLOPs, bytes, time at best, memory.

`python -m benchmarks.roofline --model 7b --device A100` needs neither weights nor a GPU. Time is by the roofline: an operation
takes as long as moving its bytes or computing its FLOPs at the device's peak, whichever is longer. `--table-9` compares with
the paper's Table 9. See docs/roofline.md.
"""

import importlib.util
import math
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers import AutoConfig

from m3_evaluation import operations
from m3_evaluation.devices import DEVICES, find_device
from modeling_m3 import M3LlavaConfig, default_checkpoint
from modeling_m3.visual_tokens import (
    check_num_visual_tokens,
    possible_scales,
    tile_grid,
)

from . import paper_table9
from .measure import markdown_table, save
from .memory_held import activation_bytes, cache_bytes, model_without_weights, weight_bytes
from .random_checkpoint import random_config


# (height, width), LLaVA-NeXT's own: an image becomes 2x2, 1x2, 2x1, 1x3 or 3x1 tiles of 336 pixels.
PINPOINTS = [[672, 336], [336, 672], [672, 672], [336, 1008], [1008, 336]]
VICUNA_13B = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
PRESETS = {
    "7b": lambda: random_config("7b"),
    "13b": lambda: M3LlavaConfig(text_config={**VICUNA_13B, "vocab_size": 32064}),
    "next-7b": lambda: M3LlavaConfig(image_grid_pinpoints=PINPOINTS, patch_merge_type="spatial_unpad"),
    "1b": lambda: random_config("1b"),
    "tiny": lambda: AutoConfig.from_pretrained(default_checkpoint()),
}
Attention = Enum("Attention", {name: name for name in operations.ATTENTIONS}, type=str)


def load_config(model: str) -> M3LlavaConfig:
    """Of a preset, or of a converted checkpoint's folder.

    Raises:
        ValueError: it is neither.
    """
    if model in PRESETS:
        return PRESETS[model]()
    if not (Path(model) / "config.json").is_file():
        raise ValueError(
            f"model={model!r} is neither a folder with a config.json nor one of {', '.join(PRESETS)}. A checkpoint in the "
            "original format is converted first: m3-convert."
        )
    config = AutoConfig.from_pretrained(model)
    if not isinstance(config, M3LlavaConfig):
        raise ValueError(f"model={model!r} is of type {config.model_type!r}, not 'm3_llava'. Convert it: m3-convert.")
    return config


def parse_image_size(text: str | None, config: M3LlavaConfig) -> tuple[int, int] | None:
    """(height, width) from WIDTHxHEIGHT; None where the model sees every image as one square.

    Raises:
        ValueError: the text is no size, or the model has no use for it.
    """
    if config.image_grid_pinpoints is None:
        if text is not None:
            raise ValueError(f"image_size={text!r}: this model sees every image as one square view. Leave it out.")
        return None
    width, _, height = (text or "672x672").partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise ValueError(f"image_size={text!r}: give WIDTHxHEIGHT in pixels, as 640x480.")
    return int(height), int(width)


def analyze(
    config: M3LlavaConfig,
    device: str,
    num_visual_tokens: Sequence[int] | None = None,
    precisions: Sequence[str] = ("fp16",),
    prompt_tokens: int = 30,
    new_tokens: int = 100,
    batch: int = 1,
    image_size: tuple[int, int] | None = None,
    attention: str = "sdpa",
    vision: bool = True,
) -> dict[str, Any]:
    """Every figure: of one encoding of the images by precision, and of prefill, decode and memory by number of tokens too.

    Args:
        config: of the model.
        device: a name of `DEVICES`.
        num_visual_tokens: per tile; the configuration's by default.
        precisions: of the weights; activations, keys and values have 16 bits. Of `operations.PRECISIONS`.
        prompt_tokens: of text.
        new_tokens: the length of the answer.
        batch: prompts with one image each.
        image_size: (height, width) in pixels, where the model cuts images into tiles.
        attention: "sdpa", or "eager", which writes every score to memory.
        vision: whether vision tower and projector are counted.

    Raises:
        ValueError: for a value that is not offered; it is named, and what is offered.
    """
    for name, value in (("prompt_tokens", prompt_tokens), ("new_tokens", new_tokens), ("batch", batch)):
        if value < 1:
            raise ValueError(f"{name}={value!r}: it must be 1 or more.")
    for precision in precisions:
        if precision not in operations.PRECISIONS:
            raise ValueError(f"precision={precision!r}: choose from {', '.join(operations.PRECISIONS)}.")
    offered = config.visual_token_scales
    if config.vision_feature_select_strategy == "default":
        offered = possible_scales(config.grid_side)
    scales = list(num_visual_tokens or sorted(config.visual_token_scales, reverse=True))
    check_num_visual_tokens(scales, offered, len(scales))
    grid = None
    if config.image_grid_pinpoints is not None:
        grid = tile_grid(image_size, config.image_grid_pinpoints, config.vision_config.image_size)
    layout = config.image_layout(grid, image_size)
    tiles, model, gpu = layout.num_tiles, model_without_weights(config), find_device(device)
    result: dict[str, Any] = {
        "device": {"name": next(name for name, known in DEVICES.items() if known is gpu), **vars(gpu)},
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "batch": batch,
        "image_size": image_size,
        "tiles": tiles,
        "attention": attention,
        "vision": vision,
        "precisions": {},
    }
    for precision in precisions:
        gpu, rows, weights = find_device(device, precision), [], weight_bytes(model, precision)
        ways = precision, attention, gpu.nf4_rows
        if not vision:
            weights = {"language model": weights["language model"]}
        encoding = operations.totals(operations.vision(config, batch * tiles, attention) if vision else [], gpu)
        for scale in scales:
            count = layout.count(scale)
            length = prompt_tokens + count
            prefill = operations.language_model(config, batch, length, length, *ways)
            if vision:
                prefill += operations.pooling(config, batch * tiles, batch * count)
            decode = [  # the first of the new tokens is the prefill's
                operations.totals(operations.language_model(config, batch, 1, length + n, *ways), gpu)
                for n in range(1, new_tokens + 1)
            ]
            shapes = (batch, length, batch * tiles if vision else 0, batch * count)
            held = {
                "weights": sum(weights.values()),
                "kv_cache": cache_bytes(config.text_config, batch, length + new_tokens),
                "activations": activation_bytes(config, *shapes, *ways),
            }
            sums = operations.totals(prefill, gpu)
            first = encoding["seconds"] + sums["seconds"]
            rows.append(
                {
                    "num_visual_tokens": scale,
                    "visual_tokens": count,
                    "prefill": sums,
                    "first_token_seconds": first,
                    "decode": {"context": length + new_tokens, **decode[-1]},
                    "answer_seconds": first + sum(token["seconds"] for token in decode[:-1]),
                    "held_bytes": {**held, "all": sum(held.values())},
                    "fits": sum(held.values()) <= gpu.memory,
                }
            )
        result["precisions"][precision] = {"weight_bytes": weights, "vision": encoding, "scales": rows}
    return result


def tables(result: dict[str, Any], title: str) -> str:
    """The analysis in Markdown: bytes moved and time, then memory held."""
    device, new = result["device"], result["new_tokens"]
    time_header = [
        "precision, visual tokens",
        "prefill, TFLOPs",
        "bytes moved, GB",
        "prefill, ms",
        "of it bound by memory, %",
        "first token, ms",
        f"each token at the end of {new}, ms",
        f"answer of {new}, s",
    ]
    held_header = ["precision, visual tokens", "weights", "KV-cache", "activations", "all", f"fits {device['name']}"]
    times, held = [], []
    for precision, figures in result["precisions"].items():
        if result["vision"]:
            sums = figures["vision"]
            times.append([f"{precision}, vision tower and projector", *_costs(sums), *[""] * 3])
        for row in figures["scales"]:
            name = f"{precision}, {row['num_visual_tokens']}"
            if result["tiles"] > 1:
                name += f" per tile, {row['visual_tokens']} in all"
            milliseconds = 1e3 * row["first_token_seconds"], 1e3 * row["decode"]["seconds"]
            times.append([name, *_costs(row["prefill"]), *map(readable, milliseconds), readable(row["answer_seconds"])])
            cells = [readable(value / 1e9) for value in row["held_bytes"].values()]
            held.append([name, *cells, "yes" if row["fits"] else "no"])
    return "\n".join(
        [
            f"{title} on {device['name']}: {device['bandwidth'] / 1e9:.0f} GB/s, {device['peak'] / 1e12:.0f} TFLOPS in 16 bits "
            f"({device['source']}).",
            f"{result['batch']} prompt(s) of {result['prompt_tokens']} tokens and an image of {result['tiles']} tile(s), "
            f"attention {result['attention']!r}, {'with' if result['vision'] else 'without'} vision tower. Time is what the "
            "device's peaks allow at best.",
            "",
            markdown_table(time_header, times),
            "",
            "Memory held at once, GB:",
            "",
            markdown_table(held_header, held),
        ]
    )


def _costs(sums: dict[str, float]) -> list[str]:
    values = sums["flops"] / 1e12, sums["bytes"] / 1e9, 1e3 * sums["seconds"]
    return [*map(readable, values), f"{100 * sums['memory_bound_share']:.0f}"]


def readable(value: float) -> str:
    """Two decimals; of what is smaller, two digits."""
    return f"{value:.{max(2, 1 - math.floor(math.log10(value)))}f}"


def plot(result: dict[str, Any], title: str, file: Path) -> None:
    """Visual tokens against prefill FLOPs, and against milliseconds to the first and to each further token."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, (flops, time) = pyplot.subplots(1, 2, figsize=(12, 4), layout="constrained")
    for index, (precision, figures) in enumerate(result["precisions"].items()):
        rows = sorted(figures["scales"], key=lambda row: row["num_visual_tokens"])
        tokens = [row["num_visual_tokens"] for row in rows]
        if index == 0:  # the same for every precision
            flops.plot(tokens, [row["prefill"]["flops"] / 1e12 for row in rows], marker="o", label="prefill")
            if result["vision"]:
                encoding = figures["vision"]["flops"] / 1e12
                flops.axhline(encoding, linestyle=":", color="gray", label="vision tower and projector")
        first = [1e3 * row["first_token_seconds"] for row in rows]
        (line,) = time.plot(tokens, first, marker="o", label=f"{precision}, first token")
        later = [1e3 * row["decode"]["seconds"] for row in rows]
        time.plot(
            tokens, later, marker=".", linestyle="--", color=line.get_color(), label=f"{precision}, each further token"
        )
    for axes, name in ((flops, "TFLOPs"), (time, "milliseconds at best")):
        axes.set(xscale="log", yscale="log", xlabel="visual tokens per tile", ylabel=name)
        axes.set_xticks(tokens, [str(number) for number in tokens])
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
    flops.legend()
    time.legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle(f"{title} on {result['device']['name']}")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def table_9() -> dict[str, dict[int, tuple]]:
    """The paper's Table 9: as printed, by the rules of its tool, and by this one, on both devices."""
    config, own = PRESETS["7b"](), {}
    for name in (paper_table9.PRINTED_DEVICE, paper_table9.FITTING_DEVICE):
        own[name] = {}
        for scale in paper_table9.PRINTED:
            length = scale + paper_table9.PROMPT_TOKENS
            prefill = operations.language_model(config, 1, length, length, attention="eager")
            own[name][scale] = paper_table9.figures(operations.totals(prefill, find_device(name)))
    return paper_table9.comparison(config.text_config, own)


def split_commas(values: Sequence[str] | None) -> list[str]:
    return [part.strip() for value in values or () for part in value.split(",") if part.strip()]


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def main(
    model: Annotated[
        str, typer.Option(help=f"One of {', '.join(PRESETS)} (tiny: m3-tiny), or a converted checkpoint's folder.")
    ] = "7b",
    device: Annotated[str, typer.Option(help="One of evaluation/devices.py, as V100, A100, H100, RTX4090.")] = "A100",
    num_visual_tokens: Annotated[
        list[str] | None, typer.Option(help="Per tile, as 576,36; or repeat the option. The model's own if left out.")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of text.")] = 30,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the answer.")] = 100,
    batch: Annotated[int, typer.Option(min=1, help="Prompts at once, an image each.")] = 1,
    image_size: Annotated[
        str | None,
        typer.Option(help="WIDTHxHEIGHT in pixels, for models that cut images into tiles. 672x672 if left out."),
    ] = None,
    precision: Annotated[
        list[str] | None,
        typer.Option(
            help=f"{', '.join(operations.PRECISIONS)}; several as fp16,nf4, or repeat the option. fp16 if left out."
        ),
    ] = None,
    attention: Annotated[Attention, typer.Option(help="As transformers names it.")] = Attention.sdpa,
    vision: Annotated[bool, typer.Option(help="Count vision tower and projector.")] = True,
    table_9_only: Annotated[
        bool, typer.Option("--table-9", help="Compare with the paper's Table 9, and only that.")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="A JSON file for every figure.")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="A PNG of tokens against FLOPs and time.")] = None,
) -> None:
    """What M3 costs at every number of visual tokens: FLOPs, bytes moved, time at best, memory."""
    if table_9_only:
        compared = table_9()
        print(paper_table9.table(compared))
        save({"columns": paper_table9.COLUMNS, "rows": compared}, output)
        return
    if plot_file is not None and importlib.util.find_spec("matplotlib") is None:
        raise typer.BadParameter("--plot needs matplotlib: pip install matplotlib")
    try:
        numbers = [int(text) if text.isdecimal() else text for text in split_commas(num_visual_tokens)]
        config = load_config(model)
        size = parse_image_size(image_size, config)
        result = analyze(
            config,
            device,
            numbers,
            split_commas(precision) or ["fp16"],
            prompt_tokens,
            new_tokens,
            batch,
            size,
            attention.value,
            vision,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    title = model if model in PRESETS else Path(model).name
    print(tables(result, title))
    save({"model": model, **result}, output)
    if plot_file is not None:
        plot(result, title, plot_file)


if __name__ == "__main__":
    app()
