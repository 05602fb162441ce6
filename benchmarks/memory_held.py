"""What M3 holds in memory at once: weights as each precision stores them, keys and values, and activations.

Apart from that, a process holds what its libraries need (a CUDA context: some 0.5 GB) and what its allocator hoards.
"""

import torch
from torch import nn
from transformers.configuration_utils import PreTrainedConfig

from m3_evaluation.devices import Device
from m3_evaluation.operations import NF4_VALUE, VALUE, head_size, key_value_heads, linear_layers
from modeling_m3 import M3LlavaConfig, M3LlavaForConditionalGeneration
from modeling_m3.loading_m3 import quantizable_layers


# Bytes of a score in eager attention at most. float16: itself, the softmax in float32, and that in 16 bits again; CUDA's
# softmax does not take bfloat16 for float32, so it is copied first: itself, float32 before and after.
SCORE = {"fp16": 8, "bf16": 10, "int8": 8, "nf4": 8}


def model_without_weights(config: M3LlavaConfig) -> M3LlavaForConditionalGeneration:
    """The model on the meta device.

    Raises:
        ValueError: its language model has other layers than `m3_evaluation.operations` counts.
    """
    with torch.device("meta"):
        model = M3LlavaForConditionalGeneration(config).eval()
    found = [
        (name.rpartition(".")[2], (module.in_features, module.out_features))
        for name, module in model.model.language_model.layers.named_modules()
        if isinstance(module, nn.Linear)
    ]
    expected = list(linear_layers(config.text_config).items()) * config.text_config.num_hidden_layers
    if sorted(found) != sorted(expected):
        raise ValueError(
            f"The language model ({config.text_config.model_type!r}) has other linear layers than Llama's, "
            f"{', '.join(dict(expected))}: its operations are not known here. Add them to evaluation/operations.py."
        )
    return model


def weight_bytes(model: M3LlavaForConditionalGeneration, precision: str) -> dict[str, int]:
    """Bytes of each part's weights. What is quantized is what `from_pretrained` quantizes if it is told nothing else."""
    quantized = set(quantizable_layers(model)) if precision in ("int8", "nf4") else set()
    parts = {"vision tower": 0, "projector": 0, "language model": 0}
    for name, weight in model.named_parameters():
        part = "language model"
        if name.startswith("model.vision_tower"):
            part = "vision tower"
        elif name.startswith("model.multi_modal_projector"):
            part = "projector"
        layer, _, kind = name.rpartition(".")
        if kind != "weight" or layer not in quantized:
            parts[part] += VALUE * weight.numel()
        elif precision == "int8":
            parts[part] += weight.numel() + 4 * len(weight)  # a float32 scale per row
        else:
            parts[part] += int(NF4_VALUE * weight.numel())
    return parts


def cache_bytes(text: PreTrainedConfig, b: int, tokens: int) -> int:
    """Keys and values of `b` sequences of `tokens` tokens."""
    return VALUE * 2 * b * tokens * text.num_hidden_layers * key_value_heads(text) * head_size(text)


def activation_bytes(
    config: M3LlavaConfig,
    b: int,
    s: int,
    t: int,
    visual_tokens: int,
    precision: str = "fp16",
    attention: str = "sdpa",
    nf4_rows: int = Device.nf4_rows,
) -> int:
    """What a prefill holds at most beyond weights, keys and values: tensors of transformers' modules that live at once.

    Args:
        b: prompts.
        s: tokens of a prompt.
        t: tiles of all prompts' images; 0 where the vision tower does not run.
        visual_tokens: of all prompts.
        nf4_rows: see `Device`.
    """
    hidden = config.text_config.hidden_size
    prefill = _language_model(config.text_config, b, s, precision, attention, nf4_rows)
    if t == 0:
        return prefill
    tower, positions = config.vision_config, config.grid_side**2 + 1
    pixels = VALUE * t * tower.num_channels * tower.image_size**2
    # Until the prefill is over, the caller has the pixels, and the model the vision tower's output and the visual tokens,
    # once per image and once joined.
    kept = pixels + VALUE * (t * positions * tower.hidden_size + 2 * visual_tokens * hidden)
    return max(pixels + _vision(config, t, precision, attention), kept + prefill)


def _language_model(text: PreTrainedConfig, b: int, s: int, precision: str, attention: str, nf4_rows: int) -> int:
    hidden, inner, heads = text.hidden_size, text.intermediate_size, text.num_attention_heads
    rows, queries, keys = b * s, heads * head_size(text), key_value_heads(text) * head_size(text)
    # The prompt's embeddings, the input of the layer, the sum in its middle, and its norm. Then gate and up at once, and
    # their product; before that, the kernel of up has its own.
    product = VALUE * rows * 3 * inner
    up = VALUE * rows * 2 * inner
    if precision == "int8":
        up += rows * (hidden + 4 * inner)  # the rounded input, the 32-bit integers
    elif precision == "nf4" and rows > nf4_rows:
        up += VALUE * hidden * inner
    mlp = VALUE * rows * 4 * hidden + max(product, up)
    # The embeddings, the layer's input and its norm; then queries, keys and values, and what rotating the queries takes.
    attending = VALUE * rows * (3 * hidden + 4 * queries + 2 * keys)
    if attention == "eager":
        repeated = 2 * queries if keys < queries else 0
        scores = SCORE[precision] * b * heads * s * s + VALUE * b * s * s  # and the mask
        attending = max(attending, VALUE * rows * (3 * hidden + queries + repeated) + scores)
    return max(mlp, attending)


def _vision(config: M3LlavaConfig, t: int, precision: str, attention: str) -> int:
    tower, positions = config.vision_config, config.grid_side**2 + 1
    hidden, rows = tower.hidden_size, t * positions
    inner = (3 if tower.hidden_act == "quick_gelu" else 2) * tower.intermediate_size  # quick_gelu keeps its sigmoid
    mlp = VALUE * rows * (4 * hidden + inner)
    attending = VALUE * rows * 8 * hidden
    if attention == "eager":
        scores = SCORE[precision] * t * tower.num_attention_heads * positions**2
        attending = max(attending, VALUE * rows * 6 * hidden + scores)
    projecting = VALUE * rows * (hidden + 2 * config.text_config.hidden_size)
    return max(mlp, attending, projecting)
