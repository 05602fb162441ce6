"""Prefill and decoding against transformers' own LLaVA classes with the same weights: `python -m benchmarks.peers`.

M3 at its finest scale is what transformers calls `LlavaForConditionalGeneration` ("flat") or `LlavaNextForConditionalGeneration`
("anyres"). Both classes hold the same tensors, must give the same logits and the same greedy tokens, and take turns.

A prefill is one picture and 64 tokens of text per prompt, from pixels to the logits of the last token. Tokens are decoded
after such a prefill, from its cache, which is cut back afterwards: by calling the model in a loop, which is what the classes
themselves cost, and by `generate`, which adds what each of them prepares for a step. With `--compile` there are prefills by
graphs too: ours by `compile_for`, the other class by `torch.compile`, which needs more than one graph for it.
"""

import statistics
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn
from transformers import (
    DynamicCache,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)

from modeling_m3 import M3LlavaConfig, M3LlavaForConditionalGeneration
from modeling_m3.outputs_m3 import CACHE_NAME

from .measure import Device, in_turn, markdown_table, milliseconds, save, spread
from .random_checkpoint import SHAPES, build, prompt, random_config


# Ours may take at most this much of the time of transformers' own class, as the issue of this measurement demands.
BARS = {"prefill": 1.00, "decode, forward": 1.02, "decode, generate": 1.02}
COMPILED = "prefill, compiled"
CLASSES = ("M3", "transformers")
TEXT = 64  # tokens of a prompt besides the picture's
# In tiles, (rows, columns): LLaVA-NeXT's. A picture of one of these shapes fills its tiles, so that nothing is cut off as
# padding: there the original, which ours follows, and transformers round differently.
GRIDS = [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)]
PICTURE_IN_TILES = (1, 2)
# What the largest difference of logits may be, relative to the largest logit: both do the same operations.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}

Size = Enum("Size", {name: name for name in SHAPES}, type=str)
Kind = Enum("Kind", {name: name for name in ("flat", "anyres")}, type=str)
Precision = Enum("Precision", {name: name for name in ("float32", "bfloat16", "float16")}, type=str)


def make_config(size: str, kind: str) -> M3LlavaConfig:
    """LLaVA-1.5 ("flat") or LLaVA-NeXT ("anyres") with a language model of a shape of `SHAPES`."""
    return as_kind(random_config(size), kind)


def as_kind(config: M3LlavaConfig, kind: str) -> M3LlavaConfig:
    if kind == "flat":
        return config
    tile = config.vision_config.image_size
    return M3LlavaConfig(
        vision_config=config.vision_config,
        text_config=config.text_config,
        image_token_id=config.image_token_id,
        patch_merge_type="spatial_unpad",
        image_grid_pinpoints=[[rows * tile, columns * tile] for rows, columns in GRIDS],
    )


def twin(model: M3LlavaForConditionalGeneration) -> nn.Module:
    """transformers' own class around the tensors of `model`: nothing is held twice.

    Raises `RuntimeError` if the classes do not have the same weights by the same names.
    """
    config = model.config
    settings = {
        "vision_config": config.vision_config.to_dict(),
        "text_config": config.text_config.to_dict(),
        "image_token_id": config.image_token_id,
        "projector_hidden_act": config.projector_hidden_act,
        "vision_feature_layer": config.vision_feature_layer,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "tie_word_embeddings": config.tie_word_embeddings,
    }
    with torch.device("meta"):
        if config.image_grid_pinpoints is None:
            other = LlavaForConditionalGeneration(LlavaConfig(**settings))
        else:
            settings["image_grid_pinpoints"] = config.image_grid_pinpoints
            other = LlavaNextForConditionalGeneration(LlavaNextConfig(**settings))
    other.load_state_dict(model.state_dict(), assign=True)
    for name, buffer in model.named_buffers():  # those that are not saved: positions and rotary frequencies
        place, _, leaf = name.rpartition(".")
        setattr(other.get_submodule(place), leaf, buffer)
    empty = [name for name, tensor in (*other.named_parameters(), *other.named_buffers()) if tensor.is_meta]
    if empty:
        raise RuntimeError(f"transformers' class has tensors that ours lacks: {empty}")
    return other.eval()


def make_inputs(model: M3LlavaForConditionalGeneration, batch: int) -> dict[str, torch.Tensor]:
    """Prompts of one picture each at the finest scale, as either class takes them."""
    config = model.config
    size = tuple(config.vision_config.image_size * tiles for tiles in PICTURE_IN_TILES)
    inputs = prompt(model, max(config.visual_token_scales), TEXT - 1, batch, image_size=size)
    del inputs["num_visual_tokens"]  # which transformers' classes do not know
    return inputs


class Decoder:
    """Greedy tokens after a prompt, again and again from the cache of one prefill."""

    def __init__(self, model: nn.Module, inputs: dict[str, torch.Tensor], new_tokens: int):
        self.model, self.new_tokens = model, new_tokens
        outputs = model(**inputs, logits_to_keep=1, use_cache=True)
        self.logits, self.cache = outputs.logits[:, -1].float(), getattr(outputs, CACHE_NAME)
        self.first = self.logits.argmax(-1, keepdim=True)
        self.ids = torch.cat([inputs["input_ids"], self.first], dim=1)
        self.length = self.cache.get_seq_length()

    def forward(self) -> torch.Tensor:
        """By calling the model, (b, 1 + new tokens)."""
        tokens = [self.first]
        for _ in range(self.new_tokens):
            outputs = self.model(input_ids=tokens[-1], **{CACHE_NAME: self.cache}, use_cache=True)
            tokens.append(outputs.logits[:, -1:].argmax(-1))
        self._cut_back()
        return torch.cat(tokens, dim=1)

    def generate(self) -> torch.Tensor:
        """By `generate`, (b, 1 + new tokens)."""
        length = {"max_new_tokens": self.new_tokens, "min_new_tokens": self.new_tokens}
        ids = self.model.generate(
            self.ids,
            attention_mask=torch.ones_like(self.ids),
            do_sample=False,
            pad_token_id=0,
            **length,
            **{CACHE_NAME: self.cache},
        )
        self._cut_back()
        return ids[:, self.ids.shape[1] - 1 :]

    def _cut_back(self) -> None:
        self.cache.crop(self.length - self.cache.get_seq_length())


def difference(ours: Decoder, theirs: Decoder, dtype: torch.dtype) -> float:
    """The largest difference of logits after the prompt, relative to the largest logit.

    Raises `RuntimeError` if it is not what rounding can explain, or if greedy tokens differ in float32: then it would not
    be the same work whose time is compared.
    """
    largest = ((ours.logits - theirs.logits).abs().max() / theirs.logits.abs().max()).item()
    if not largest <= TOLERANCE[dtype]:
        raise RuntimeError(f"Both classes must give the same logits, but the largest differs by {largest:.1e} of it.")
    if dtype == torch.float32 and not torch.equal(ours.forward(), theirs.forward()):
        raise RuntimeError("Both classes must decode the same tokens, but do not.")
    return largest


@torch.no_grad()
def measure(
    config: M3LlavaConfig,
    dtype: torch.dtype,
    device: str,
    batch: int,
    new_tokens: int,
    repeats: int,
    compiled: bool = False,
) -> dict:
    """Seconds of every run, `{name of BARS: {class: [seconds]}}`, of a token where tokens are decoded; and ratios."""
    ours = build(config, dtype, device)
    inputs = make_inputs(ours, batch)
    decoders = {name: Decoder(model, inputs, new_tokens) for name, model in zip(CLASSES, (ours, twin(ours)))}
    largest = difference(*decoders.values(), dtype)
    runs: dict[tuple[str, str], Callable[[], object]] = {}
    for name, decoder in decoders.items():
        model = decoder.model
        runs["prefill", name] = lambda model=model: model(**inputs, logits_to_keep=1, use_cache=True)
        runs["decode, forward", name] = decoder.forward
        runs["decode, generate", name] = decoder.generate
    bars = BARS
    if compiled:
        bars = {"prefill": BARS["prefill"], COMPILED: BARS["prefill"], **BARS}
        theirs = torch.compile(decoders["transformers"].model, dynamic=False)
        runs[COMPILED, "M3"] = compiled_prefill(ours, inputs, max(config.visual_token_scales), TEXT)
        runs[COMPILED, "transformers"] = lambda: theirs(**inputs, logits_to_keep=1, use_cache=True)
    ordered = {(bar, name): runs[bar, name] for bar in bars for name in CLASSES}  # compared runs follow each other
    seconds: dict[str, dict[str, list[float]]] = {bar: {} for bar in bars}
    for (bar, name), taken in in_turn(ordered, repeats).items():
        steps = 1 if bar.startswith("prefill") else new_tokens
        seconds[bar][name] = [value / steps for value in taken]
    return {
        "tokens": {"prompt": inputs["input_ids"].shape[1], "decoded": new_tokens, "batch": batch},
        "largest_difference_of_logits": largest,
        "seconds": seconds,
        "ratios": {
            bar: statistics.median(values["M3"]) / statistics.median(values["transformers"])
            for bar, values in seconds.items()
        },
        "bars": bars,
    }


def compiled_prefill(
    model: M3LlavaForConditionalGeneration, inputs: dict[str, torch.Tensor], scale: int, max_text: int
) -> Callable[[], object]:
    """A prefill by a graph, as `generate` has it, with an empty cache. Raises `RuntimeError` if there is none."""
    model.compile_for(scale, max_text, like=inputs, progress=False)
    return graph_prefill(model, inputs)


def graph_prefill(model: M3LlavaForConditionalGeneration, inputs: dict[str, torch.Tensor]) -> Callable[[], object]:
    graphs = model._prefill_graphs
    arguments = {name: value for name, value in inputs.items() if name != "input_ids"}

    @torch.no_grad()
    def run() -> object:
        model._prefill_graphs = graphs
        outputs = model._prefill_by_graph(inputs["input_ids"], {**arguments, CACHE_NAME: DynamicCache()})
        if outputs is None:
            raise RuntimeError("There is no graph for this prompt.")
        return outputs

    return run


def table(result: dict[str, Any]) -> str:
    """What was measured, in Markdown."""
    rows = []
    for bar, values in result["seconds"].items():
        rounds = [a / b for a, b in zip(values["M3"], values["transformers"])]
        cells = [milliseconds(values[name], 1) for name in CLASSES]
        rows.append([bar, *cells, f"{result['ratios'][bar]:.3f}", spread(rounds, 3), f"{result['bars'][bar]:.2f}"])
    header = ["", *(f"{name}, ms" for name in CLASSES), "ratio of medians", "ratios of rounds", "at most"]
    tokens = result["tokens"]
    kind = ", ".join(result[key] for key in ("size", "kind", "dtype"))
    return (
        f"{kind}: {tokens['batch']} prompt(s) of {tokens['prompt']} tokens; decoding is per token, {tokens['decoded']} at a time. "
        f"Medians and ranges. Logits differ by at most {result['largest_difference_of_logits']:.1e} of the largest.\n\n"
        + markdown_table(header, rows)
    )


def main(
    size: Annotated[Size, typer.Option(help="Which language model.")] = Size["1b"],
    kind: Annotated[Kind, typer.Option(help="LLaVA-1.5 (flat) or LLaVA-NeXT (anyres).")] = Kind["flat"],
    dtype: Annotated[Precision, typer.Option(help="The type of weights.")] = Precision["float32"],
    device: Device = "cpu",
    batch: Annotated[int, typer.Option(min=1, help="Prompts at once.")] = 1,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens that are decoded in a run.")] = 8,
    repeats: Annotated[int, typer.Option(min=1, help="Runs that are timed.")] = 5,
    compiled: Annotated[bool, typer.Option("--compile", help="Compiled prefills too.")] = False,
    output: Annotated[Path | None, typer.Option(help="A JSON file for all that was measured.")] = None,
) -> None:
    """Measures prefill and decoding of M3 and of transformers' own class, in turn."""
    config = make_config(size.value, kind.value)
    result = measure(config, getattr(torch, dtype.value), device, batch, new_tokens, repeats, compiled)
    result |= {"size": size.value, "kind": kind.value, "dtype": dtype.value, "device": device}
    print(table(result))
    save(result, output)


if __name__ == "__main__":
    typer.run(main)
