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
"""What `from_pretrained` of M3 does besides transformers': checks of where to, and what bitsandbytes leaves as it is."""

import copy
import os
import tempfile
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils import logging

from .configuration_m3 import check_name


logger = logging.get_logger(__name__)

# bitsandbytes matches full paths from their start, so every part is named as the model with and without head has it. Only
# the language model's layers remain: they are nearly all of the weights, and the others lose most by being quantized.
FULL_PRECISION_MODULES = (
    "lm_head",
    "model.vision_tower",
    "model.multi_modal_projector",
    "vision_tower",
    "multi_modal_projector",
)
# What may stand for a device: ways to spread a model, and where accelerate keeps what has no room.
NO_DEVICES = (None, "auto", "balanced", "balanced_low_0", "sequential", "disk")


class M3LlavaLoadingMixin:
    """`from_pretrained` for a model that may be quantized, and spread over devices or processes."""

    @classmethod
    def from_pretrained(cls, *args: Any, quantization_config: Any = None, **kwargs: Any) -> Any:
        name = args[0] if args else kwargs.get("pretrained_model_name_or_path")
        if name is not None:  # of weights in memory, which are given beside a configuration
            check_name(name)
        _check_devices(kwargs.get("device_map"))
        if isinstance(kwargs.get("device_map"), dict):
            kwargs["device_map"] = _newline_in_memory(kwargs["device_map"])
        if kwargs.get("offload_folder") is not None:
            _check_offload_folder(kwargs["offload_folder"])
        if isinstance(quantization_config, dict) and {"load_in_4bit", "load_in_8bit"} & quantization_config.keys():
            quantization_config = BitsAndBytesConfig(**quantization_config)
        own_list = getattr(quantization_config, "llm_int8_skip_modules", None)
        if isinstance(quantization_config, BitsAndBytesConfig):
            if quantization_config.bnb_4bit_quant_type not in ("nf4", "fp4"):
                raise ValueError(
                    f"bnb_4bit_quant_type={quantization_config.bnb_4bit_quant_type!r} must be 'nf4' or 'fp4'."
                )
            if own_list is None:
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

    def post_init(self) -> None:
        super().post_init()
        # CLIP names layers of its text model too, and whoever wraps or places layers by name looks for each (FSDP).
        held = {type(module).__name__ for module in self.modules()}
        self._no_split_modules = set(self._no_split_modules or ()) & held


def quantizable_layers(model: nn.Module) -> list[str]:
    """Names of the linear layers that are quantized by default."""
    return [name for name in _linear_layers(model) if should_convert_module(name, FULL_PRECISION_MODULES)]


def _check_devices(device_map: Any) -> None:
    """Raises `ValueError` for a device that torch cannot use here, before any weight is loaded."""
    for place in device_map.values() if isinstance(device_map, dict) else [device_map]:
        try:
            if place not in NO_DEVICES:
                torch.empty(0, device=place)
        except (RuntimeError, AssertionError) as error:  # the latter from a build of torch without CUDA
            raise ValueError(
                f"device_map={device_map!r}: torch cannot use {place!r} here ({str(error).splitlines()[0]}). Use "
                'device_map="auto", which takes what there is, or "cpu".'
            ) from error


def _newline_in_memory(device_map: dict[str, Any]) -> dict[str, Any]:
    """`image_newline` belongs to no layer, so no hook of accelerate's would fetch it from the disk."""
    return {
        name: "cpu" if name.endswith("image_newline") and device == "disk" else device
        for name, device in device_map.items()
    }


def _check_offload_folder(folder: str | os.PathLike) -> None:
    """Raises `ValueError` for a folder that cannot be written to, before any weight is loaded."""
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"offload_folder={os.fspath(folder)!r} cannot be written to ({error.strerror}): name another folder."
        ) from error


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
