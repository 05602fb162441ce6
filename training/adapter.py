"""What a run trained, LoRA and projector, as an adapter of PEFT's: a few megabytes in place of the whole model."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from .arguments import ModelArguments


PROJECTOR = "multi_modal_projector"


def write_adapter(
    checkpoint: Path, folder: Path, arguments: ModelArguments, dtype: torch.dtype = torch.float16
) -> Path:
    """Writes the adapter of a run's checkpoint, which `PeftModel.from_pretrained` puts on the model that the run began with.

    Args:
        checkpoint: a folder `checkpoint-{step}` of a run with LoRA; its weights are in one file.
        folder: where `adapter_config.json` and `adapter_model.safetensors` go.
        arguments: of the run.
        dtype: that weights are stored in.

    Raises:
        ValueError: there is no LoRA in the checkpoint.
    """
    from peft import LoraConfig

    weights, adapted = {}, set()
    with safe_open(checkpoint / "model.safetensors", "pt") as stored:
        for name in stored.keys():
            if ".lora_" in name:
                adapted.add(re.search(r"(\w+)\.lora_", name)[1])
            elif f"{PROJECTOR}." not in name:
                continue
            weights[f"base_model.model.{name.replace('.default.', '.')}"] = stored.get_tensor(name).to(dtype)
    if not adapted:
        raise ValueError(f"{checkpoint} has no LoRA: the run's whole result is in `final`.")
    config = LoraConfig(
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules=rf".*language_model.*\.({'|'.join(sorted(adapted))})",
        modules_to_save=[PROJECTOR],
    )
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    save_file(weights, folder / "adapter_model.safetensors")
    return folder
