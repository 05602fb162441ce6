"""Weights in 8 or 4 bits, as bitsandbytes stores them: quantized one layer at a time while they are written."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from transformers import BitsAndBytesConfig

from modeling_m3 import M3LlavaConfig, M3LlavaForConditionalGeneration
from modeling_m3.loading_m3 import FULL_PRECISION_MODULES, quantizable_layers

from .original import ConversionError, StoredTensor
from .writer import PlannedTensor


Quantization = Literal["nf4", "int8"]


@dataclass(frozen=True)
class QuantizedPart:
    """One of the tensors that a quantized layer is stored as: the packed weight, its scales, ..."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    key: str
    weight: PlannedTensor
    quantization: Quantization
    one_at_a_time = True  # two writers would quantize every layer twice

    @property
    def source(self) -> StoredTensor:
        return self.weight.source

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def chunks(self) -> Iterator[torch.Tensor]:
        """The values to write."""
        yield _parts_of(self.weight, self.quantization)[self.key].contiguous().flatten()


def quantization_config(quantization: Quantization, dtype: torch.dtype) -> BitsAndBytesConfig:
    """What the new `config.json` says, so that the folder loads as it is.

    Args:
        quantization: "nf4", 4 bits in blocks of 64 with a float32 scale each; or "int8", LLM.int8() with a scale per row.
        dtype: of the weights that are not quantized, in which a 4-bit layer computes.

    Raises:
        ConversionError: bitsandbytes is not installed.
    """
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ConversionError(f"--quantize {quantization} needs bitsandbytes: pip install bitsandbytes") from error
    kept = list(FULL_PRECISION_MODULES)
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=kept
    )


def quantize_plan(
    tensors: list[PlannedTensor], config: M3LlavaConfig, quantization: Quantization
) -> list[PlannedTensor | QuantizedPart]:
    """The plan with every linear layer of the language model in the place of its parts, of which only sizes are made."""
    with torch.device("meta"):
        layers = set(quantizable_layers(M3LlavaForConditionalGeneration(config)))
    planned: list[PlannedTensor | QuantizedPart] = []
    for tensor in tensors:
        layer, _, kind = tensor.name.rpartition(".")
        if layer not in layers or kind != "weight":
            planned.append(tensor)
            continue
        sizes = _quantize(torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"), quantization)
        planned += [
            QuantizedPart(f"{layer}.{key}", tuple(part.shape), part.dtype, key, tensor, quantization)
            for key, part in sizes.items()
        ]
    return planned


@lru_cache(maxsize=1)  # the parts of one layer are written one after the other
def _parts_of(weight: PlannedTensor, quantization: Quantization) -> dict[str, torch.Tensor]:
    if (
        quantization == "int8"
    ):  # row by row, so a few of them at a time: bitsandbytes makes several copies of what it is given
        rows = [_quantize(chunk.view(-1, *weight.shape[1:]), quantization) for chunk in weight.chunks()]
        return {**rows[0], **{key: torch.cat([part[key] for part in rows]) for key in ("weight", "SCB")}}
    values = torch.empty(math.prod(weight.shape), dtype=weight.dtype)
    end = 0
    for chunk in weight.chunks():
        start, end = end, end + len(chunk)
        values[start:end] = chunk
    return _quantize(values.view(weight.shape), quantization)


def _quantize(weight: torch.Tensor, quantization: Quantization) -> dict[str, torch.Tensor]:
    """The tensors by the names that a saved `Linear4bit` or `Linear8bitLt` has for them."""
    from bitsandbytes import functional

    if quantization == "int8":
        values, scales, _ = functional.int8_vectorwise_quant(weight.half())
        row_major = torch.tensor(0, dtype=torch.uint8)
        return {"weight": values, "SCB": scales, "weight_format": row_major}
    packed, state = functional.quantize_4bit(weight, quant_type="nf4")
    return {"weight": packed, **{f"weight.{key}": part for key, part in state.as_dict(packed=True).items()}}
