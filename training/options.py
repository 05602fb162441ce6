"""Which of transformers' `TrainingArguments` do here what they say; the others are refused before anything is loaded.

`docs/training.md` has this as a table, and `tests/test_training_options.py` holds it against the releases' own lists.
"""

from __future__ import annotations

from dataclasses import MISSING, Field, fields
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig


# They do what transformers documents, as was tried of what changes a run, or are of no consequence here.
WORK = {
    *("output_dir", "num_train_epochs", "max_steps", "seed", "data_seed", "full_determinism", "use_cpu", "debug"),
    *("do_train", "do_eval", "do_predict", "local_rank", "skip_memory_metrics", "remove_unused_columns", "use_cache"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "average_tokens_across_devices"),
    # the optimizer
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "weight_decay", "max_grad_norm"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "optim_args"),
    # precision, memory and what is computed with
    *("bf16", "fp16", "tf32", "neftune_noise_alpha", "torch_empty_cache_steps"),
    *("torch_compile", "torch_compile_backend", "torch_compile_mode"),
    *("gradient_checkpointing", "gradient_checkpointing_kwargs"),
    *("activation_checkpointing", "activation_checkpointing_kwargs"),
    # several processes
    *("deepspeed", "fsdp", "fsdp_config", "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers"),
    *("ddp_static_graph", "ddp_backend", "ddp_timeout"),
    # data
    *("dataloader_drop_last", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
    *("dataloader_prefetch_factor", "dataloader_multiprocessing_context", "label_names", "length_column_name"),
    # evaluation
    *("eval_strategy", "eval_steps", "eval_delay", "per_device_eval_batch_size", "prediction_loss_only"),
    *("eval_on_start", "eval_do_concat_batches", "eval_use_gather_object", "eval_accumulation_steps"),
    *("include_for_metrics", "batch_eval_metrics"),
    *("load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
    # logs and checkpoints
    *("logging_strategy", "logging_steps", "logging_first_step", "log_on_each_node", "logging_nan_inf_filter"),
    *("include_num_input_tokens_seen", "log_level", "log_level_replica", "disable_tqdm", "report_to", "run_name"),
    *("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
    *("save_strategy", "save_steps", "save_on_each_node", "save_total_limit"),
    *("ignore_data_skip", "restore_callback_states_from_checkpoint"),
}
# What a run that goes on may have otherwise: it decides neither what is trained nor on what.
HARMLESS = {
    *("logging_strategy", "logging_steps", "logging_first_step", "log_on_each_node", "logging_nan_inf_filter"),
    *("include_num_input_tokens_seen", "log_level", "log_level_replica", "disable_tqdm", "report_to", "run_name"),
    *("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "debug", "skip_memory_metrics"),
    *("save_strategy", "save_steps", "save_on_each_node", "save_total_limit"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor"),
    "dataloader_multiprocessing_context",
    *("gradient_checkpointing", "gradient_checkpointing_kwargs", "activation_checkpointing"),
    *("activation_checkpointing_kwargs", "torch_empty_cache_steps", "use_cache", "use_cpu", "full_determinism"),
    *("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph", "ddp_backend"),
    *("ddp_timeout", "do_train", "do_eval", "do_predict", "remove_unused_columns", "label_names", "length_column_name"),
    *("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "per_device_eval_batch_size"),
    *("prediction_loss_only", "eval_do_concat_batches", "eval_use_gather_object", "eval_accumulation_steps"),
    *("include_for_metrics", "batch_eval_metrics"),
    *("strict", "show"),  # of our own: a bad record ends the run, or another one takes its place
}
# But for these where evaluations decide what is kept, or the learning rate.
DECIDED_BY_EVALUATION = {"eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "save_strategy", "save_steps"}
_UPLOAD = "the folder that is for the Hub is written at the end: hf upload USER/NAME OUTPUT_DIR/final"
REFUSED = {
    "label_smoothing_factor": "the Matryoshka loss is the next-token loss of the paper",
    "use_liger_kernel": "liger has no kernels for M3",
    "liger_kernel_config": "liger has no kernels for M3",
    "bf16_full_eval": "it would round the weights that are trained; bf16 evaluates in bfloat16, too",
    "fp16_full_eval": "it would round the weights that are trained; fp16 evaluates in float16, too",
    "auto_find_batch_size": "the order of samples, by which a run goes on, depends on the batch: set its size",
    "dataloader_in_order": "batches are of one kind, and processes need the same kind at once",
    "accelerator_config": "it changes which process reads which sample; ours are given out by kind and length",
    "parallelism_config": "prompts of M3 are cut by scale, which tensor and sequence parallelism do not know of",
    "save_only_model": "the run could not go on from its checkpoints; save_total_limit keeps few of them",
    "enable_jit_checkpoint": "m3-train itself ends with a checkpoint at SIGTERM",
    "resume_from_checkpoint": "the same command goes on from the last checkpoint in output_dir by itself",
    "optim_target_modules": "the optimizers that it is for do not take groups of parameters with rates of their own",
    **dict.fromkeys(("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy"), _UPLOAD),
    **dict.fromkeys(("hub_always_push", "hub_revision"), _UPLOAD),
}
# Of these names; "_8bit" and the like after them are bitsandbytes' and torchao's ways to store what they remember.
OPTIMIZERS = ("adamw", "ademamix", "lion", "rmsprop", "sgd", "adagrad", "adafactor")
_OPTIMIZERS_OF_PACKAGES = (
    "schedule_free_adamw",
    "schedule_free_radam",
    "schedule_free_sgd",
    "grokadamw",
    "stable_adamw",
)
_STORED_AS = (
    "",
    "_torch",
    "_torch_fused",
    "_torch_4bit",
    "_torch_8bit",
    "_bnb",
    "_bnb_8bit",
    "_bnb_32bit",
    "_8bit",
    "_32bit",
)


def check_options(arguments: TrainingArguments) -> None:
    """Raises `ValueError` for what cannot do here what it says, by name, value and reason."""
    for field in fields(TrainingArguments):
        value = getattr(arguments, field.name)
        if field.name in WORK or value == _default(field):
            continue
        if field.name == "optim":
            _check_optimizer(value)
        elif field.name == "train_sampling_strategy":
            _check_sampling(arguments)
        else:
            reason = REFUSED.get(field.name, "it has not been tried with M3")
            raise ValueError(f"{field.name}={value!r} is refused: {reason}. Leave it out.")
    if arguments.dataloader_persistent_workers and not arguments.dataloader_num_workers:
        raise ValueError("dataloader_persistent_workers needs workers: set dataloader_num_workers.")
    if arguments.n_gpu > 1:
        raise ValueError(
            f"One process has {arguments.n_gpu} GPUs: start one for each, by `torchrun --nproc_per_node {arguments.n_gpu} -m "
            "m3_training.finetune` in place of `m3-train`, or show it one, by CUDA_VISIBLE_DEVICES=0."
        )


def _default(field: Field) -> Any:
    if field.name == "accelerator_config":
        return AcceleratorConfig()  # what None becomes
    return field.default if field.default_factory is MISSING else field.default_factory()


def _check_optimizer(optimizer: str) -> None:
    name = str(getattr(optimizer, "value", optimizer))
    plain = name.removeprefix("paged_")
    known = {base + stored for base in OPTIMIZERS for stored in _STORED_AS}
    if plain not in known and name not in _OPTIMIZERS_OF_PACKAGES:
        raise ValueError(
            f"optim={name!r} is refused: it has not been tried with groups of parameters that have rates of their own. Choose "
            f"{', '.join(OPTIMIZERS)}, in the ways to store them that transformers has, or {', '.join(_OPTIMIZERS_OF_PACKAGES)}."
        )


def _check_sampling(arguments: Any) -> None:
    if arguments.group_by_modality_length or arguments.train_sampling_strategy != "sequential":
        raise ValueError(
            f"train_sampling_strategy={arguments.train_sampling_strategy!r} is refused: batches are made by "
            "group_by_modality_length. With --group_by_modality_length false it may be random or sequential."
        )
