"""Which parameters are trained, at which learning rate, with which decay, and by LoRA or directly."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from torch import nn

from modeling_m3 import M3LlavaForConditionalGeneration

from .arguments import M3TrainingArguments, ModelArguments


if TYPE_CHECKING:
    from peft import LoraModel


PARTS = ("language_model", "projector", "vision_tower")


def part_of(name: str) -> str:
    """The part that a parameter of this name belongs to. `image_newline` is the language model's, as in the original."""
    if "vision_tower." in name:
        return "vision_tower"
    return "projector" if "multi_modal_projector." in name else "language_model"


def prepare_parameters(model: M3LlavaForConditionalGeneration, arguments: ModelArguments) -> None:
    """Adds the LoRA that is asked for, and lets gradients reach what is to be trained.

    What no gradient can reach is left frozen. It would stay as it is in any case, but without a state in the optimizer,
    which sharded checkpoints cannot go on from.
    """
    if arguments.lora:
        add_lora(model, arguments)
    unused = _unused(model)
    for name, parameter in model.named_parameters():
        part = part_of(name)
        directly = not (arguments.lora and part == "language_model") or "lora_" in name
        parameter.requires_grad_(directly and not arguments.trains_nothing_of(part) and not name.startswith(unused))


def add_lora(model: M3LlavaForConditionalGeneration, arguments: ModelArguments) -> LoraModel:
    """Puts LoRA around linear layers of the language model, in place. `merge_and_unload` of what is returned undoes it.

    The model keeps its class, so that checkpoints of the run hold all weights: LoRA's and those trained directly.

    Raises:
        ValueError: peft is not installed, or a target module is no linear layer of the language model.
    """
    try:
        from peft import LoraConfig, LoraModel
    except ImportError as error:
        raise ValueError('lora needs peft: pip install ".[train]" in the clone') from error
    prefix = "model.language_model."
    layers = [n for n, m in model.named_modules() if n.startswith(prefix) and isinstance(m, nn.Linear)]
    names = sorted({layer.rsplit(".", 1)[-1] for layer in layers})
    wanted = arguments.lora_target_modules or names
    if not set(wanted) <= set(names):
        raise ValueError(f"lora_target_modules={wanted}: choose from the language model's linear layers, {names}.")
    config = LoraConfig(
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules=[layer for layer in layers if layer.rsplit(".", 1)[-1] in wanted],
    )
    return LoraModel(model, config, "default")


def parameter_groups(
    model: nn.Module, decayed: Collection[str], arguments: M3TrainingArguments
) -> list[dict[str, Any]]:
    """The optimizer's groups: every trained parameter once, by part and by whether its weights decay.

    Source: `create_optimizer` of the original's `llava/train/llava_trainer.py`.

    Args:
        model: with `requires_grad` set.
        decayed: names of the parameters that decay: all but biases and norms.
        arguments: with the learning rate of each part.
    """
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((part_of(name), name in decayed), []).append(parameter)
    return [
        {
            "params": groups[part, decays],
            "lr": arguments.learning_rate_of(part),
            "weight_decay": arguments.weight_decay if decays else 0.0,
        }
        for part in PARTS
        for decays in (True, False)
        if (part, decays) in groups
    ]


def _unused(model: M3LlavaForConditionalGeneration) -> tuple[str, ...]:
    """Where names start of parameters that nothing is computed with: in the vision tower, after the selected layer."""
    vision = model.config.vision_config
    layers = range(model.config.num_vision_layers, vision.num_hidden_layers)
    # Visual tokens are hidden states before the tower's last norm.
    return (*(f"model.vision_tower.encoder.layers.{layer}." for layer in layers), "model.vision_tower.post_layernorm.")
