"""transformers' `Trainer` with the Matryoshka objective, its parameter groups and its order of samples."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, Sampler
from transformers import Trainer, TrainerCallback

from .arguments import M3TrainingArguments
from .parameters import parameter_groups
from .sampler import ModalityLengthSampler


OptimizerClass = Callable[[nn.Module, list[dict[str, Any]]], torch.optim.Optimizer]


class M3Trainer(Trainer):
    """Trains on batches made at the finest scale.

    Losses are averaged over the supervised tokens of the global batch, on all processes together. Logs hold, next to
    `loss`, a `loss_at_{scale}` per scale: the average over the steps since the last log that trained it.

    Args:
        scales: numbers of visual tokens to train at; all of them, or one drawn for each step, as `args.scale_choice` says.
        optimizer_class: called with the model and its parameter groups, in place of the optimizer that `args` name.
        kwargs: of `Trainer`.
    """

    args: M3TrainingArguments

    def __init__(self, *, scales: Sequence[int], optimizer_class: OptimizerClass | None = None, **kwargs: Any):
        super().__init__(**kwargs)
        self.scales = list(scales)
        self.optimizer_class = optimizer_class
        self._scale_losses: dict[int, torch.Tensor] = {}
        self._scale_steps: dict[int, set[int]] = {}
        self._sampler: ModalityLengthSampler | None = None
        self.add_callback(_EpochOfSampler(self))
        if not self.is_deepspeed_enabled:  # which has gradients of its own, zero where a batch made none
            self.add_callback(_GradientOfZero(self))

    def scales_of_step(self) -> list[int]:
        """The scales of the current optimizer step: the same on every process, and again after a run is resumed."""
        if self.args.scale_choice != "random":
            return self.scales
        return [random.Random(f"{self.args.seed} {self.state.global_step}").choice(self.scales)]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        scales = self.scales_of_step()
        loss, outputs = super().compute_loss(
            model, {**inputs, "matryoshka_scales": scales}, True, num_items_in_batch=num_items_in_batch
        )
        for scale, scale_loss in zip(scales, outputs.scale_losses):
            self._scale_losses[scale] = self._scale_losses.get(scale, 0) + scale_loss
            self._scale_steps.setdefault(scale, set()).add(self.state.global_step)
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        model = self.model if model is None else model
        if self.optimizer is None:
            groups = parameter_groups(model, set(self.get_decay_parameter_names(model)), self.args)
            if self.optimizer_class is not None:
                self.optimizer = self.optimizer_class(model, groups)
            else:
                optimizer, options = self.get_optimizer_cls_and_kwargs(self.args, model)
                self.optimizer = optimizer(groups, **options)
        return self.optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._scale_losses:
            logs |= self._average_scale_losses()
        super().log(logs, start_time)

    def _average_scale_losses(self) -> dict[str, float]:
        """Takes the losses collected since the last log. Called by all processes together, as `Trainer` logs."""
        scales = sorted(self._scale_losses)
        losses = torch.stack([self._scale_losses[scale] / len(self._scale_steps[scale]) for scale in scales])
        # Shares of a sum where losses are averaged over the tokens of all processes, else each an average of its own.
        reduction = "sum" if self.args.average_tokens_across_devices else "mean"
        losses = self.accelerator.reduce(losses, reduction)
        self._scale_losses, self._scale_steps = {}, {}
        return {f"loss_at_{scale}": loss for scale, loss in zip(scales, losses.tolist())}

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        if not self.args.group_by_modality_length:
            return super()._get_train_sampler(train_dataset)
        dataset = self.train_dataset if train_dataset is None else train_dataset
        self._sampler = ModalityLengthSampler(
            dataset.modality_lengths,
            batch_size=self.args.train_batch_size,
            num_batches=self.args.world_size * self.args.gradient_accumulation_steps,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
        )
        return self._sampler

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | int | None:
        # Where nothing of a batch is supervised, its loss is then 0 and not 0 / 0.
        items = super()._get_num_items_in_batch(batch_samples, device)
        return items if items is None else items.clamp(min=1)


class _EpochOfSampler(TrainerCallback):
    """Tells the sampler which epoch begins: accelerate's loaders do not reach it after batches were skipped."""

    def __init__(self, trainer: M3Trainer):
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer._sampler is not None:
            self.trainer._sampler.set_epoch(int(state.epoch or 0))


class _GradientOfZero(TrainerCallback):
    """A parameter that a batch of text does not use has a gradient of zero, not none, so its momentum moves it.

    So it is in the original, which gives text a blank image, and where parameters are sharded. It makes all ways of training
    one, and no parameter lacks a state in a checkpoint's optimizer.
    """

    def __init__(self, trainer: M3Trainer):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for parameter in self.trainer.model.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
