# Copyright 2026 The M3 for Hugging Face authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""What M3 keeps in full precision when bitsandbytes loads it in 4 or 8 bits, and what that library needs besides.

Only the language model's layers are quantized: they are nearly all of the weights, and the head, the projector and the
vision tower lose most by it.
"""

import copy
from typing import Any

from torch import nn
from transformers import BitsAndBytesConfig
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils import logging


logger = logging.get_logger(__name__)

# bitsandbytes matches full paths from their start, so every part is named as the model with and without head has it.
FULL_PRECISION_MODULES = (
    "lm_head",
    "model.vision_tower",
    "model.multi_modal_projector",
    "vision_tower",
    "multi_modal_projector",
)


class M3LlavaQuantizationMixin:
    """`from_pretrained` for a model that bitsandbytes may quantize."""

    @classmethod
    def from_pretrained(cls, *args: Any, quantization_config: Any = None, **kwargs: Any) -> Any:
        if isinstance(quantization_config, dict) and {"load_in_4bit", "load_in_8bit"} & quantization_config.keys():
            quantization_config = BitsAndBytesConfig(**quantization_config)
        own_list = getattr(quantization_config, "llm_int8_skip_modules", None)
        if isinstance(quantization_config, BitsAndBytesConfig) and own_list is None:
            quantization_config = copy.deepcopy(quantization_config)
            quantization_config.llm_int8_skip_modules = list(FULL_PRECISION_MODULES)
        loaded = super().from_pretrained(*args, quantization_config=quantization_config, **kwargs)
        model = loaded[0] if kwargs.get("output_loading_info") else loaded
        if own_list:
            _warn_of_unmatched(model, own_list)
        for module in model.modules():
            # Where a CPU has AVX512-BF16, bitsandbytes repacks a 4-bit layer in its first call, which refuses rows that
            # are no multiple of 32, rounds scales to bfloat16, and spoils what is saved afterwards.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        return loaded


def quantizable_layers(model: nn.Module) -> list[str]:
    """Names of the linear layers that are quantized by default."""
    return [name for name in _linear_layers(model) if should_convert_module(name, FULL_PRECISION_MODULES)]


def _warn_of_unmatched(model: nn.Module, skip_modules: list[str]) -> None:
    layers = _linear_layers(model)
    for entry in skip_modules:
        if all(should_convert_module(name, [entry]) for name in layers):
            logger.warning(
                f"llm_int8_skip_modules has {entry!r}, which is no linear layer of {type(model).__name__} and keeps none in "
                "full precision. Name full paths, as 'model.vision_tower', or leave the list out for M3's defaults."
            )


def _linear_layers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
