"""LLaVA's LoRA checkpoints: the adapter and the weights trained beside it, merged into their base as it is read.

Shapes: o, i the rows and columns of a base's weight, r the adapter's rank.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .original import ConversionError, StoredTensor, file_tensors, read_json


CONFIG_FILE = "adapter_config.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
TRAINED_BESIDE_FILE = "non_lora_trainables.bin"
# What PEFT can do and LLaVA's training does not: a merge that ignored it would be wrong.
_REFUSED_SETTINGS = (
    *("use_dora", "fan_in_fan_out", "modules_to_save", "rank_pattern", "alpha_pattern", "lora_bias"),
    *("layer_replication", "trainable_token_indices", "alora_invocation_tokens"),
)


@dataclass(frozen=True)
class MergedTensor(StoredTensor):
    """A base's weight, (o, i), plus `scaling * up @ down`, with `down` (r, i) and `up` (o, r)."""

    base: StoredTensor
    down: StoredTensor
    up: StoredTensor
    scaling: float

    def chunks(self) -> Iterator[torch.Tensor]:
        """As of the base. The sum is taken in float32, whatever the weights are stored in."""
        down, up = self.down.read().float(), self.up.read().float()
        end = 0
        for chunk in self.base.chunks():
            rows = chunk.view(-1, self.shape[1])
            start, end = end, end + len(rows)
            yield (rows.float() + self.scaling * (up[start:end] @ down)).to(self.dtype).flatten()


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a LoRA adapter in the place of a model."""
    return (folder / CONFIG_FILE).exists()


def merged_tensors(folder: Path, base: dict[str, StoredTensor], base_folder: Path) -> dict[str, StoredTensor]:
    """The base's tensors with LLaVA's adapter merged and those trained beside it in their places; nothing is read yet.

    Source: the original's `load_pretrained_model` (`llava/model/builder.py`).

    Args:
        folder: of the adapter.
        base: the tensors of the model it was trained on, by key.
        base_folder: where those lie, to name in errors.

    Raises:
        ConversionError: files are missing, the adapter is of another kind, or it is not one for this base.
    """
    merged = merge_adapter(folder, base, base_folder)
    if not (folder / TRAINED_BESIDE_FILE).exists():
        raise ConversionError(f"{folder / TRAINED_BESIDE_FILE} is missing, which has the projector: download it again")
    return merged | _trained_beside(folder / TRAINED_BESIDE_FILE)


def merge_adapter(
    folder: Path, base: dict[str, StoredTensor], base_folder: Path, rename: Callable[[str], str | None] = str
) -> dict[str, StoredTensor]:
    """The base's tensors with the adapter that PEFT saved merged.

    Args:
        folder, base, base_folder: as of `merged_tensors`.
        rename: what `base` calls a key of the model that PEFT wrapped.

    Raises:
        ConversionError: as `merged_tensors`.
    """
    config = read_json(folder / CONFIG_FILE)
    scaling = _scaling(config, folder / CONFIG_FILE)
    file = next((folder / name for name in ADAPTER_FILES if (folder / name).exists()), None)
    if file is None:
        raise ConversionError(f"{folder} has an {CONFIG_FILE} but no {' or '.join(ADAPTER_FILES)}: download it again")
    halves: dict[str, dict[str, StoredTensor]] = {}
    for key, tensor in file_tensors(file).items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight", key)
        if match is None:
            raise ConversionError(f"{file}: {key} is not a LoRA weight of a linear layer: it cannot be merged")
        halves.setdefault(f"{match[1]}.weight", {})[match[2]] = tensor
    merged = dict(base)
    for key, pair in halves.items():
        for missing in {"A", "B"} - pair.keys():
            raise ConversionError(f"{file}: {key.removesuffix('weight')}lora_{missing} is missing: download it again")
        name = rename(key)
        merged[name] = _merged(name, pair["A"], pair["B"], base, base_folder, config["r"], scaling)
    return merged


def _scaling(config: dict[str, Any], file: Path) -> float:
    if config.get("peft_type") != "LORA":
        raise ConversionError(f"{file}: peft_type is {config.get('peft_type')!r}: only LORA can be merged")
    refused = [key for key in _REFUSED_SETTINGS if config.get(key)]
    refused += ["bias"] if config.get("bias", "none") != "none" else []
    for key in refused:
        raise ConversionError(f"{file}: {key} is {config[key]!r}, which is not supported: merge the adapter with PEFT")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise ConversionError(f"{file}: r is {rank!r} and lora_alpha {alpha!r}: they must be numbers, r a positive one")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _merged(
    key: str,
    down: StoredTensor,
    up: StoredTensor,
    base: dict[str, StoredTensor],
    base_folder: Path,
    rank: int,
    scaling: float,
) -> MergedTensor:
    weight = base.get(key)
    if weight is None:
        raise ConversionError(
            f"{down.file}: {down.key} adapts {key}, which {base_folder} does not have: name its own base"
        )
    rows, columns = weight.shape
    if (down.shape, up.shape) != ((rank, columns), (rows, rank)):
        raise ConversionError(
            f"{down.file}: {down.key} and its lora_B have the shapes {down.shape} and {up.shape}, but {weight.file}: {key} "
            f"of {weight.shape} and a rank of {rank} need {(rank, columns)} and {(rows, rank)}: name the adapter's own base"
        )
    return MergedTensor(key, weight.file, weight.shape, weight.dtype, None, weight.whole, weight, down, up, scaling)


def _trained_beside(file: Path) -> dict[str, StoredTensor]:
    """Under their keys in a model that PEFT has not wrapped."""
    tensors = {key.removeprefix("base_model."): tensor for key, tensor in file_tensors(file).items()}
    if any(key.startswith("model.model.") for key in tensors):
        tensors = {key.removeprefix("model."): tensor for key, tensor in tensors.items()}
    return tensors
