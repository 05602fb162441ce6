"""What M3's forward consists of, and what each operation costs: FLOPs of its matrix products, and bytes it moves.

An operation reads what it needs once and writes its result once, which no implementation in these steps can undercut. FLOPs
are two per multiplication and addition of a matrix product, as torch's `FlopCounterMode` counts them: attention over the whole
square, although causal kernels skip up to half of it. Everything else (norms, activations, sums) is bound by memory, so it
has bytes and no FLOPs. A cache is appended to in place.

Shapes use: b prompts, s tokens of a prompt, c tokens in the cache when attention reads it, t tiles, h hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .devices import Device


if TYPE_CHECKING:
    from transformers.configuration_utils import PreTrainedConfig

    from modeling_m3 import M3LlavaConfig


PRECISIONS = ("fp16", "bf16", "int8", "nf4")
ATTENTIONS = ("sdpa", "eager")
VALUE = 2  # bytes of an activation, a key, and a weight that is not quantized
NF4_VALUE = 0.5 + 4 / 64  # 4 bits, and a float32 scale for each block of 64


@dataclass(frozen=True)
class Operation:
    """An operation of one layer, which `times` layers have, and what it costs in one of them.

    Attributes:
        part: "vision tower", "projector" or "language model".
        flops: of a matrix product.
        weights, read, written: bytes of weights read, and of activations read and written.
        cache_read, cache_written: bytes of keys and values.
        in_int8: whether the product is one of 8-bit integers.
    """

    part: str
    name: str
    times: int = 1
    flops: float = 0
    weights: float = 0
    read: float = 0
    written: float = 0
    cache_read: float = 0
    cache_written: float = 0
    in_int8: bool = False

    @property
    def moved(self) -> float:
        """Bytes from and to memory, in one layer."""
        return self.weights + self.read + self.written + self.cache_read + self.cache_written

    def seconds_bound(self, device: Device) -> tuple[float, float]:
        """Seconds that moving and computing take at least, in one layer. The roofline is the longer of the two."""
        return self.moved / device.bandwidth, self.flops / (device.peak_int8 if self.in_int8 else device.peak)


def totals(operations: Iterable[Operation], device: Device) -> dict[str, float]:
    """FLOPs, bytes by kind, seconds by the roofline, and the share of the seconds in which memory is the bound."""
    sums = dict.fromkeys(("flops", "bytes", "seconds", "memory_bound_share"), 0.0)
    kinds = ("weights", "read", "written", "cache_read", "cache_written")
    sums |= {f"{kind}_bytes": 0.0 for kind in kinds}
    for operation in operations:
        moving, computing = operation.seconds_bound(device)
        sums["flops"] += operation.times * operation.flops
        sums["bytes"] += operation.times * operation.moved
        sums["seconds"] += operation.times * max(moving, computing)
        sums["memory_bound_share"] += operation.times * moving if moving >= computing else 0.0
        for kind in kinds:
            sums[f"{kind}_bytes"] += operation.times * getattr(operation, kind)
    sums["memory_bound_share"] /= sums["seconds"] or 1
    return sums


def linear_layers(text: PreTrainedConfig) -> dict[str, tuple[int, int]]:
    """(size in, size out) of the linear layers that each of the language model's layers has."""
    hidden, inner = text.hidden_size, text.intermediate_size
    queries, keys = text.num_attention_heads * head_size(text), key_value_heads(text) * head_size(text)
    return {
        "q_proj": (hidden, queries),
        "k_proj": (hidden, keys),
        "v_proj": (hidden, keys),
        "o_proj": (queries, hidden),
        "gate_proj": (hidden, inner),
        "up_proj": (hidden, inner),
        "down_proj": (inner, hidden),
    }


def head_size(part: PreTrainedConfig) -> int:
    return getattr(part, "head_dim", None) or part.hidden_size // part.num_attention_heads


def key_value_heads(text: PreTrainedConfig) -> int:
    return getattr(text, "num_key_value_heads", None) or text.num_attention_heads


def language_model(
    config: M3LlavaConfig,
    b: int,
    s: int,
    c: int,
    precision: str = "fp16",
    attention: str = "sdpa",
    nf4_rows: int = Device.nf4_rows,
) -> list[Operation]:
    """`s` new tokens of each of `b` prompts that end with `c` tokens in the cache, and logits for the last one.

    A prompt of s tokens is `(b, s, s)`; the token after it `(b, 1, s + 1)`. `nf4_rows`: see `Device`.
    """
    text, part = config.text_config, "language model"
    hidden, inner, heads, size = text.hidden_size, text.intermediate_size, text.num_attention_heads, head_size(text)
    rows, queries, keys = b * s, heads * size, key_value_heads(text) * size
    layers = {
        name: _linear(part, name, rows, *sizes, precision, nf4_rows=nf4_rows)
        for name, sizes in linear_layers(text).items()
    }
    for name in ("k_proj", "v_proj"):  # what they write is the cache
        *before, last = layers[name]
        layers[name] = [*before, replace(last, written=0, cache_written=last.written)]
    norm = _elementwise(part, "norm", rows, hidden, hidden, weights=VALUE * hidden)
    add = _elementwise(part, "residual sum", rows, 2 * hidden, hidden)
    layer = [
        norm,
        *layers["q_proj"],
        *layers["k_proj"],
        *layers["v_proj"],
        _elementwise(part, "rotary embedding", rows, queries + keys, queries + keys),
        *_attention(part, attention, b, s, c, heads, size, cache=VALUE * b * c * keys),
        *layers["o_proj"],
        add,
        norm,
        *layers["gate_proj"],
        *layers["up_proj"],
        _elementwise(part, "activation", rows, 2 * inner, inner),
        *layers["down_proj"],
        add,
    ]
    return [
        _elementwise(part, "embedding", rows, hidden, hidden),
        *(replace(operation, times=text.num_hidden_layers) for operation in layer),
        norm,
        *_linear(part, "lm_head", b, hidden, text.vocab_size),
    ]


def vision(config: M3LlavaConfig, t: int, attention: str = "sdpa") -> list[Operation]:
    """The vision tower's layers that are used, and the projector, for `t` tiles. They are never quantized."""
    from modeling_m3.parts_m3 import leading_tokens  # with torch, which statistics of answers do without

    tower, part, patches = config.vision_config, "vision tower", config.grid_side**2
    hidden, inner, heads = tower.hidden_size, tower.intermediate_size, tower.num_attention_heads
    tokens, pixels = patches + leading_tokens(tower), tower.num_channels * tower.patch_size**2
    rows = t * tokens
    norm = _elementwise(part, "norm", rows, hidden, hidden, weights=2 * VALUE * hidden)
    add = _elementwise(part, "residual sum", rows, 2 * hidden, hidden)
    layer = [
        norm,
        *(
            operation
            for name in ("q_proj", "k_proj", "v_proj")
            for operation in _linear(part, name, rows, hidden, hidden, bias=True)
        ),
        *_attention(part, attention, t, tokens, tokens, heads, hidden // heads),
        *_linear(part, "out_proj", rows, hidden, hidden, bias=True),
        add,
        norm,
        *_linear(part, "fc1", rows, hidden, inner, bias=True),
        _elementwise(part, "activation", rows, inner, inner),
        *_linear(part, "fc2", rows, inner, hidden, bias=True),
        add,
    ]
    operations = [
        *_linear(part, "patch embedding", t * patches, pixels, hidden),
        _elementwise(part, "position embedding", rows, hidden, hidden, weights=VALUE * (patches + 2) * hidden),
        norm,
        *(replace(operation, times=config.num_vision_layers) for operation in layer),
    ]
    size_in, size_out = hidden, config.text_config.hidden_size
    rows = t * (patches if config.vision_feature_select_strategy == "default" else patches + 1)
    for index in range(1, config.multimodal_projector_depth + 1):
        if index > 1:
            operations.append(_elementwise("projector", "activation", rows, size_in, size_in))
        bias = config.multimodal_projector_bias
        operations += _linear("projector", f"linear_{index}", rows, size_in, size_out, bias=bias)
        size_in = size_out
    return operations


def pooling(config: M3LlavaConfig, t: int, visual_tokens: int) -> list[Operation]:
    """The projected patches of `t` tiles, averaged to what becomes `visual_tokens` of the prompt."""
    read, written = (VALUE * rows * config.text_config.hidden_size for rows in (t * config.grid_side**2, visual_tokens))
    return [Operation("projector", "pooling", read=read, written=written)]


def _elementwise(part: str, name: str, rows: int, read: int, written: int, weights: float = 0) -> Operation:
    """Sizes are of one row, in values; weights in bytes."""
    return Operation(part, name, weights=weights, read=VALUE * rows * read, written=VALUE * rows * written)


def _linear(
    part: str,
    name: str,
    rows: int,
    size_in: int,
    size_out: int,
    precision: str = "fp16",
    bias: bool = False,
    nf4_rows: int = Device.nf4_rows,
) -> list[Operation]:
    """A linear layer's kernels, the product last or, in int8, before the last."""
    flops, count = 2 * rows * size_in * size_out, size_in * size_out
    weights = VALUE * (count + (size_out if bias else 0))
    read, written = VALUE * rows * size_in, VALUE * rows * size_out
    if precision == "int8":
        # bitsandbytes rounds the input to 8 bits, multiplies to 32-bit integers, and scales those by rows and columns.
        return [
            Operation(part, f"{name}, rounding", read=read, written=rows * size_in),
            Operation(part, name, 1, flops, count, rows * size_in, 4 * rows * size_out, in_int8=True),
            Operation(part, f"{name}, scaling", weights=4 * size_out, read=4 * rows * size_out, written=written),
        ]
    if precision == "nf4":
        packed = NF4_VALUE * count
        if rows <= nf4_rows:
            return [Operation(part, name, 1, flops, packed, read, written)]
        unpacking = Operation(part, f"{name}, unpacking", weights=packed, written=weights)
        return [unpacking, Operation(part, name, 1, flops, weights, read, written)]
    return [Operation(part, name, 1, flops, weights, read, written)]


def _attention(
    part: str, attention: str, b: int, s: int, c: int, heads: int, size: int, cache: float | None = None
) -> list[Operation]:
    """`s` queries of each of `b` sequences look at `c` positions. `cache`: bytes of the keys, and again of the values."""
    queries, scores = VALUE * b * s * heads * size, VALUE * b * heads * s * c
    keys = {"read": VALUE * b * c * heads * size} if cache is None else {"cache_read": cache}
    flops = 2 * b * heads * s * c * size

    def operation(name: str, products: int, read: float, written: float, tensors: int) -> Operation:
        """With so many matrix products, which read so many of keys and values."""
        costs = {kind: tensors * value for kind, value in keys.items()}
        costs["read"] = costs.get("read", 0) + read
        return Operation(part, name, flops=products * flops, written=written, **costs)

    if attention == "sdpa":  # scores never leave the chip
        return [operation("attention", 2, queries, queries, 2)]
    return [
        operation("scores", 1, queries, scores, 1),
        operation("softmax", 0, scores, scores, 0),
        operation("weighted values", 1, scores, queries, 1),
    ]
