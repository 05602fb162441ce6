"""transformers' `Trainer` with the Matryoshka objective, its parameter groups and its order of samples."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset, Sampler
from transformers import Trainer, TrainerCallback

from .arguments import M3TrainingArguments
from .data import IGNORE_INDEX, LlavaDataset
from .parameters import parameter_groups
from .sampler import ModalityLengthSampler
from .usage import Usage


# In a checkpoint's `stateful_callbacks`, but of no callback's name: those are made anew from what is stored.
DATA_SO_FAR = "m3_data_so_far"

OptimizerClass = Callable[[nn.Module, list[dict[str, Any]]], torch.optim.Optimizer]


class M3Trainer(Trainer):
    """Trains on batches made at the finest scale.

    Losses are averaged over the supervised tokens of the global batch, on all processes together. Logs hold, next to
    `loss`, a `loss_at_{scale}` per scale: the average over the steps since the last log that trained it. Evaluations hold
    the same with `eval_` before it, each averaged over all supervised tokens of the data set.

    Attributes:
        usage: what it was trained on so far, the run that this one goes on from included.

    Args:
        scales: numbers of visual tokens to train at; all of them, or one drawn for each step, as `args.scale_choice` says.
        optimizer_class: called with the model and its parameter groups, in place of the optimizer that `args` name.
        kwargs: of `Trainer`. An `eval_dataset` is an `EvaluationDataset`.
    """

    args: M3TrainingArguments
    train_dataset: LlavaDataset

    def __init__(self, *, scales: Sequence[int], optimizer_class: OptimizerClass | None = None, **kwargs: Any):
        super().__init__(**kwargs)
        self.scales = list(scales)
        self.optimizer_class = optimizer_class
        self._scale_losses: dict[int, torch.Tensor] = {}
        self._scale_steps: dict[int, set[int]] = {}
        self._sampler: ModalityLengthSampler | None = None
        self._evaluated = torch.zeros(len(self.scales) + 1)
        self.usage = Usage(len(self.train_dataset))
        self.add_callback(_EpochOfSampler(self))
        self.add_callback(_GoesOn(self))
        if not self.is_deepspeed_enabled:  # which keeps gradients elsewhere
            self.add_callback(_NoGradientMissing(self))

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

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, None, None]:
        inputs = self._prepare_inputs(inputs)
        tokens = (inputs["labels"][:, 1:] != IGNORE_INDEX).sum()
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs, matryoshka_scales=self.scales, num_items_in_batch=tokens.clamp(min=1))
        self._evaluated = self._evaluated.to(tokens.device)
        self._evaluated += torch.stack([*(outputs.scale_losses.float() * tokens), tokens])
        return outputs.loss, None, None

    def evaluation_loop(
        self, dataloader: Any, description: str, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> Any:
        self._evaluated.zero_()
        output = super().evaluation_loop(dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        *sums, tokens = self.accelerator.reduce(self._evaluated, "sum").tolist()
        losses = [total / tokens if tokens else math.nan for total in sums]
        output.metrics[f"{metric_key_prefix}_loss"] = sum(losses) / len(losses)
        output.metrics.update(
            {f"{metric_key_prefix}_loss_at_{scale}": loss for scale, loss in zip(self.scales, losses)}
        )
        return output

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
        self.usage.add(batch_samples)
        # Where nothing of a batch is supervised, its loss is then 0 and not 0 / 0.
        items = super()._get_num_items_in_batch(batch_samples, device)
        return items if items is None else items.clamp(min=1)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # A run that ended after its last step, and goes on from there, has none left: `Trainer` would take one more.
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        notes = gather_object([self.train_dataset.notes])
        names = {name for noted in notes for name in noted}
        self.state.stateful_callbacks[DATA_SO_FAR] = {
            "notes": {name: sorted({index for noted in notes for index in noted[name]}) for name in names},
            "usage": self.usage.state(),
        }
        super()._save_checkpoint(*args, **kwargs)

    def _save_rng_state(self, *args: Any, **kwargs: Any) -> None:
        super()._save_rng_state(*args, **kwargs)
        self.accelerator.wait_for_everyone()  # the file that makes a checkpoint whole comes next, from the first process


class _EpochOfSampler(TrainerCallback):
    """Tells the sampler which epoch begins: accelerate's loaders do not reach it after batches were skipped."""

    def __init__(self, trainer: M3Trainer):
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer._sampler is not None:
            self.trainer._sampler.set_epoch(int(state.epoch or 0))


class _GoesOn(TrainerCallback):
    """Takes up what a checkpoint holds: what was found bad in the data, what was used of it, and where the schedule is."""

    def __init__(self, trainer: M3Trainer):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.global_step:
            return
        so_far = state.stateful_callbacks.get(DATA_SO_FAR, {})
        self.trainer.train_dataset.remember(so_far.get("notes", {}))
        if self.trainer.accelerator.is_main_process:
            self.trainer.usage.restore(so_far.get("usage"), state.global_step)
        # `Trainer` has these from the checkpoint, whatever the arguments are now.
        state.compute_steps(args, state.max_steps)
        state.train_batch_size = args.train_batch_size
        # The optimizer has the rate of the next step from the checkpoint: where the run is longer now, the schedule has another.
        schedule = getattr(kwargs["lr_scheduler"], "scheduler", kwargs["lr_scheduler"])  # as DeepSpeed wraps it
        if isinstance(schedule, LambdaLR):
            schedule._last_lr = [
                rate * factor(schedule.last_epoch) for rate, factor in zip(schedule.base_lrs, schedule.lr_lambdas)
            ]
            for group, rate in zip(schedule.optimizer.param_groups, schedule._last_lr):
                group["lr"] = rate


class _NoGradientMissing(TrainerCallback):
    """Every trained parameter has a gradient after every batch, of zero where it did not matter. One without would go on as
    it is while the loss looks well: so its lack ends the run."""

    def __init__(self, trainer: M3Trainer):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        missing = [
            name
            for name, parameter in self.trainer.model.named_parameters()
            if parameter.requires_grad
            and parameter.grad is None
            and parameter.numel()  # a shard may hold nothing of it
        ]
        if missing:
            raise RuntimeError(
                f"{len(missing)} trained parameter(s) got no gradient in step {state.global_step + 1}, {missing[0]} first: "
                "the way of training that the arguments ask for does not reach them. Nothing was trained in this step."
            )
