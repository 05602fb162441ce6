"""M3 as two graphs, by torch.export and in ONNX: pixels to visual tokens at every scale, and tokens to logits with a cache.

One pair of graphs answers at every number of visual tokens: all lengths are dynamic. Shapes use: t tiles, b prompts, s sequence
length, p tokens in the cache, v visual tokens of all prompts, k positions whose logits are wanted, d hidden size of the language
model.
"""

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_map
from transformers import DynamicCache

from modeling_m3 import M3LlavaConfig, M3LlavaForConditionalGeneration
from modeling_m3.outputs_m3 import CACHE_NAME
from modeling_m3.visual_tokens import pool_tiles

from .original import ConversionError


LANGUAGE_MODELS = ("llama", "mistral", "qwen2")
ROPE_TYPES = ("default", "linear", "llama3")  # whose frequencies do not change with the length
VISION_TOWERS = ("clip_vision_model",)


def export_vision(model: M3LlavaForConditionalGeneration) -> ExportedProgram:
    """Vision tower, projector and pooling, by torch.export.

    Takes `pixel_values`, (t, channels, height, width). Returns the visual tokens of every tile, a (t, scale, d) for each of the
    configuration's scales, the coarsest first; with the class token, where the checkpoint keeps it, (t, scale + 1, d).

    Raises:
        ConversionError: for a model that is not known to be exported rightly.
    """
    check_exportable(model.config)
    vision = model.config.vision_config
    pixels = torch.zeros(2, vision.num_channels, vision.image_size, vision.image_size).to(model.device, model.dtype)
    with torch.no_grad():
        return torch.export.export(_Vision(model).eval(), (pixels,), dynamic_shapes=_dims(_VISION_AXES), strict=False)


def export_language(model: M3LlavaForConditionalGeneration) -> ExportedProgram:
    """The placing of visual tokens, the language model and its head, by torch.export.

    Takes `input_ids`, (b, s); `visual_tokens`, (v, d), in the order of their placeholders, none in a step that has no
    placeholder; `attention_mask`, (b, p + s), 0 for padding; `position_ids`, (b, s); `logits_to_keep`, (k,), indices into the
    sequence; and a list with a (keys, values) pair for every layer, each (b, heads, p, head size), where p may be 0. Returns
    logits, (b, k, vocabulary), and the list with this sequence's keys and values added.

    Raises:
        ConversionError: for a model that is not known to be exported rightly.
    """
    check_exportable(model.config)
    text = model.config.text_config
    b, s, p, v = 2, 5, 3, 4
    ids = torch.zeros(b, s, dtype=torch.long)
    ids[:, : v // b] = model.config.image_token_id
    cached = torch.zeros(b, text.num_key_value_heads, p, _head_size(text)).to(model.device, model.dtype)
    arguments = (
        ids.to(model.device),
        torch.zeros(v, text.hidden_size).to(model.device, model.dtype),
        torch.ones(b, p + s, dtype=torch.long, device=model.device),
        torch.arange(p, p + s, device=model.device).repeat(b, 1),
        torch.tensor([0, s - 1], device=model.device),
        [(cached.clone(), cached.clone()) for _ in range(text.num_hidden_layers)],
    )
    shapes = _dims(_language_axes(text))
    with torch.no_grad():
        return torch.export.export(_Language(model).eval(), arguments, dynamic_shapes=shapes, strict=False)


def write_vision(model: M3LlavaForConditionalGeneration, file: Path) -> None:
    """`export_vision` in ONNX: input `pixel_values`, an output `visual_tokens_SCALE` for every scale."""
    outputs = [visual_tokens_name(scale) for scale in model.config.visual_token_scales]
    _write(export_vision(model), file, ["pixel_values"], outputs, _VISION_AXES)


def write_language(model: M3LlavaForConditionalGeneration, file: Path) -> None:
    """`export_language` in ONNX: its inputs by name, the cache's as `past_key_values.LAYER.key` and `.value`; outputs `logits`
    and `present.LAYER.key`, `present.LAYER.value`."""
    text = model.config.text_config
    layers = [f"{layer}.{part}" for layer in range(text.num_hidden_layers) for part in ("key", "value")]
    inputs = ["input_ids", "visual_tokens", "attention_mask", "position_ids", "logits_to_keep"]
    past, present = ([f"{name}.{layer}" for layer in layers] for name in ("past_key_values", "present"))
    _write(export_language(model), file, [*inputs, *past], ["logits", *present], _language_axes(text))


def visual_tokens_name(scale: int) -> str:
    """The output of the vision graph that has the visual tokens at one scale."""
    return f"visual_tokens_{scale}"


def check_exportable(config: M3LlavaConfig) -> None:
    """Raises `ConversionError` for a model of which it is not known that its graphs answer as it does."""
    text, vision = config.text_config, config.vision_config
    rope = (getattr(text, "rope_parameters", None) or {}).get("rope_type", "default")
    window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    kinds = set(getattr(text, "layer_types", None) or ()) - {"full_attention"}
    reason = None
    if getattr(config, "quantization_config", None) is not None:
        reason = "its weights are quantized: export the checkpoint that it was made of"
    elif text.model_type not in LANGUAGE_MODELS:
        reason = f"its language model is {text.model_type!r}: {', '.join(LANGUAGE_MODELS)} are supported"
    elif vision.model_type not in VISION_TOWERS:
        reason = f"its vision tower is {vision.model_type!r}: {', '.join(VISION_TOWERS)} is supported"
    elif rope not in ROPE_TYPES:
        reason = f"its rope_type is {rope!r}: {', '.join(ROPE_TYPES)} are supported"
    elif window is not None or kinds:
        what = f"sliding_window={window!r}" if window is not None else f"layer_types has {', '.join(sorted(kinds))}"
        reason = f"its {what}: only attention to all tokens before is supported"
    if reason is not None:
        raise ConversionError(f"This model cannot be exported, as {reason}.")


class _Vision(nn.Module):
    def __init__(self, model: M3LlavaForConditionalGeneration):
        super().__init__()
        self.vision_tower, self.projector = model.model.vision_tower, model.model.multi_modal_projector
        self.config = model.config

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        # Not by `encode_images`, which counts the tiles to take many in parts: a graph has no such choice.
        features = self.vision_tower(pixel_values).last_hidden_state
        tiles = self.projector(features[:, self.config.num_leading_tokens :])
        if self.config.keeps_class_token:
            return (tiles,)
        sampling = self.config.visual_token_sampling
        return tuple(pool_tiles(tiles, scale, sampling) for scale in self.config.visual_token_scales)


class _Language(nn.Module):
    def __init__(self, model: M3LlavaForConditionalGeneration):
        super().__init__()
        self.language_model, self.lm_head = model.model.language_model, model.lm_head
        self.image_token_id = model.config.image_token_id

    def forward(
        self,
        input_ids: torch.Tensor,
        visual_tokens: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        logits_to_keep: torch.Tensor,
        past_key_values: list[tuple[torch.Tensor, torch.Tensor]],
    ) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
        embeds = self.language_model.get_input_embeddings()(input_ids)
        embeds = embeds.masked_scatter((input_ids == self.image_token_id)[..., None], visual_tokens)
        # Made here, as transformers decides by lengths and values what mask it makes, if any. What is padding sees itself:
        # a softmax over nothing is not the same everywhere.
        p, s = past_key_values[0][0].shape[2], input_ids.shape[1]
        keys = torch.arange(p + s, device=input_ids.device)
        queries = keys[p:, None]
        mask = (attention_mask[:, None, None, :] == 1) & (keys <= queries) | (keys == queries)
        outputs = self.language_model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=position_ids,
            use_cache=True,
            **{CACHE_NAME: DynamicCache(past_key_values)},
        )
        logits = self.lm_head(outputs.last_hidden_state[:, logits_to_keep])
        return logits, [(layer.keys, layer.values) for layer in getattr(outputs, CACHE_NAME).layers]


def _head_size(text: Any) -> int:
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


# Axes whose length is free, by argument.
_VISION_AXES = ({0: "tiles"},)
_MAY_BE_EMPTY = ("visual", "past")


def _language_axes(text: Any) -> tuple:
    sequence, cached = {0: "batch", 1: "sequence"}, {0: "batch", 2: "past"}
    layers = [(cached, cached)] * text.num_hidden_layers
    return (sequence, {0: "visual"}, {0: "batch", 1: "total"}, sequence, {0: "kept"}, layers)


def _dims(axes: Any) -> Any:
    return tree_map(lambda name: Dim(name, min=0 if name in _MAY_BE_EMPTY else 1), axes)


def _write(program: ExportedProgram, file: Path, inputs: list[str], outputs: list[str], axes: tuple) -> None:
    """Weights of more than some 2 GB go into a file beside it, `FILE.data`: protobuf, which ONNX is, holds no more."""
    with _without_noise():
        onnx = torch.onnx.export(
            program, dynamo=True, input_names=inputs, output_names=outputs, dynamic_shapes=axes, verbose=False
        )
    onnx.save(file)


@contextlib.contextmanager
def _without_noise() -> Iterator[None]:
    """torch warns of every operator of torchvision's that it cannot register where that is not installed, and of code of its own
    and of axes that have their names already. Nothing of it is about the model."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`isinstance\\(treespec, LeafSpec\\)`", FutureWarning)
            warnings.filterwarnings("ignore", "# The axis name: .* will not be used, since it shares", UserWarning)
            yield
    finally:
        logger.setLevel(before)
