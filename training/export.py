"""The end of a run: a folder as conversion writes it, ready to load anywhere and to go to the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import GenerationConfig, TrainerState
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer import TRAINER_STATE_NAME

from m3_conversion.card import model_card
from m3_conversion.original import local_folder
from m3_conversion.writer import new_folder, write_other_files
from modeling_m3 import M3LlavaConfig, M3LlavaForConditionalGeneration

from .arguments import DataArguments, ModelArguments
from .parameters import PARTS, add_lora
from .projector import write_projector
from .trainer import DATA_SO_FAR, M3Trainer
from .usage import in_words


def export(
    trainer: M3Trainer, destination: Path, model_arguments: ModelArguments, data_arguments: DataArguments
) -> None:
    """Writes the trained checkpoint. Called by all processes, as they gather the weights; the first one writes.

    Weights are stored in the type that the checkpoint it started from has, LoRA merged. The folder appears under its name
    only when it is whole.

    Args:
        trainer: after training; `processing_class` is the processor.
        destination: the folder to write; `mm_projector.bin` goes beside it, where the projector alone was trained.
        model_arguments, data_arguments: of the run, for the card.
    """
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    usage = trainer.usage.state()
    unset_hf_deepspeed_config()  # or it would shard the model that is written, too
    if trainer.accelerator.is_main_process:
        weights = {name.replace("_orig_mod.", ""): tensor for name, tensor in weights.items()}  # torch.compile's prefix
        source = local_folder(model_arguments.model_name_or_path, weights=False)
        config = M3LlavaConfig.from_pretrained(source)
        config.architectures = [M3LlavaForConditionalGeneration.__name__]
        config.trained_scales = trainer.scales
        card = model_card(
            Path(trainer.args.output_dir).resolve().name,
            model_arguments.model_name_or_path,
            config,
            trained_for_scales=len(trainer.scales) > 1,
            source=source,
            training=describe(trainer, model_arguments, data_arguments, usage),
        )
        if model_arguments.train == "projector":
            write_projector(weights, destination.parent)
        with new_folder(destination, overwrite=False) as folder:
            _on_cpu(config, weights, model_arguments).save_pretrained(folder, max_shard_size="5GB")
            write_other_files(folder, config, trainer.processing_class, _generation_config(source, config), card)
    trainer.accelerator.wait_for_everyone()


def describe(
    trainer: M3Trainer, model_arguments: ModelArguments, data_arguments: DataArguments, usage: dict[str, Any]
) -> str:
    """What a reader of the card must know to judge the run or to repeat it, in Markdown.

    Args:
        trainer, model_arguments, data_arguments: as of `export`.
        usage: what the run was trained on, of `Usage.state`.
    """
    arguments, steps = trainer.args, trainer.state.global_step
    if arguments.load_best_model_at_end and (best := trainer.state.best_model_checkpoint) is not None:
        state = TrainerState.load_from_json(Path(best) / TRAINER_STATE_NAME)
        steps, usage = state.global_step, state.stateful_callbacks[DATA_SO_FAR]["usage"]
    trained = []
    for part in PARTS:
        if not model_arguments.trains_nothing_of(part):
            lora = f", LoRA of rank {model_arguments.lora_r}" if model_arguments.lora and part == PARTS[0] else ""
            trained.append(f"{part.replace('_', ' ')} (learning rate {arguments.learning_rate_of(part):g}{lora})")
    objective = {
        "all": "next-token loss averaged over {} visual tokens per tile",
        "random": "next-token loss at one of {} visual tokens per tile, drawn for each step",
        "fixed": "next-token loss at {} visual token(s) per tile",
    }[arguments.scale_choice].format(", ".join(map(str, trainer.scales)))
    batch = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    data = Path(data_arguments.data_path).name if data_arguments.data_path else "records made by a program"
    rows = {
        "Started from": f"`{Path(model_arguments.model_name_or_path).name}`",
        **({"Projector from": f"`{Path(given).name}`"} if (given := model_arguments.projector_weights) else {}),
        "Data": f"{data}, {len(trainer.train_dataset)} records, template `{data_arguments.template}`",
        "Objective": objective,
        "Trained": "; ".join(trained),
        "Trained on": in_words(usage),
        "Steps": f"{steps} of {batch} samples",
        "Schedule": f"{arguments.lr_scheduler_type.value}, {arguments.get_warmup_steps(trainer.state.max_steps)} steps of warmup",
        "Weight decay": f"{arguments.weight_decay:g}",
        "Precision": "bfloat16" if arguments.bf16 else "float16" if arguments.fp16 else "float32",
        "Seed": str(arguments.seed),
        "Software": f"transformers {transformers.__version__}, torch {torch.__version__}",
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def _on_cpu(
    config: M3LlavaConfig, weights: dict[str, torch.Tensor], model_arguments: ModelArguments
) -> M3LlavaForConditionalGeneration:
    """A model of its own: the one that was trained may be wrapped, sharded and spread over devices."""
    with torch.device("meta"):
        model = M3LlavaForConditionalGeneration(config)
        lora = add_lora(model, model_arguments) if model_arguments.lora else None
    copies = {name: tensor.to("cpu", copy=True) for name, tensor in weights.items()}  # merging is done in place
    model.load_state_dict(copies, assign=True)
    model.tie_weights()  # which `assign` has undone, so that a tied weight would be stored twice
    if lora is not None:
        lora.merge_and_unload()
    return model.to(config.dtype or torch.float32)


def _generation_config(source: Path, config: M3LlavaConfig) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(source)
    except OSError:  # it has none
        return GenerationConfig.from_model_config(config)
