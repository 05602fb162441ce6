"""The stages of the recipe, each a `transformers.Trainer` run that goes on where it was interrupted.

A stage writes its checkpoints and its result into a folder of its own; a stage whose result is there is not run again.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import CLIPVisionModel, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from .vision import LabelledScenes, PatchClassifier


def run_stage(
    folder: Path,
    model: Callable[[], nn.Module],
    dataset: Dataset,
    save: Callable[[nn.Module, Path], None],
    trainer_class: type[Trainer] = Trainer,
    seed: int = 0,
    bf16: bool = False,
    trainer_kwargs: dict[str, Any] | None = None,
    **settings: Any,
) -> Path:
    """Trains, unless it has been done, and returns the folder with the result.

    Args:
        folder: of the stage; its checkpoints lie in `checkpoints`, its result in `result`.
        model: makes the model to begin with.
        dataset: read in order, so it decides itself what is shuffled.
        save: writes the trained model into a folder.
        settings: `TrainingArguments`.
    """
    result = folder / "result"
    if result.exists():
        return result
    set_seed(seed)
    arguments = TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        seed=seed,
        use_cpu=not torch.cuda.is_available(),
        bf16=bf16,
        dataloader_num_workers=1,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.05},
        weight_decay=0.05,
        max_grad_norm=1.0,
        logging_steps=25,
        save_steps=100,
        save_total_limit=1,
        remove_unused_columns=False,
        report_to=[],
        **settings,
    )
    trainer = trainer_class(model=model(), args=arguments, train_dataset=dataset, **(trainer_kwargs or {}))
    checkpoint = get_last_checkpoint(arguments.output_dir) if Path(arguments.output_dir).exists() else None
    trainer.train(resume_from_checkpoint=checkpoint)
    partial = folder / "result.incomplete"
    shutil.rmtree(partial, ignore_errors=True)
    save(trainer.model, partial)
    trainer.state.save_to_json(str(partial / "trainer_state.json"))
    partial.rename(result)
    shutil.rmtree(arguments.output_dir)
    return result


@dataclass(frozen=True)
class Round:
    """One round of the vision tower's training.

    Attributes:
        view: side of the square that it sees, in pixels; 336 is all of its grid.
        batch, steps: pictures per step, and steps.
        learning_rate: at its highest.
    """

    view: int
    batch: int
    steps: int
    learning_rate: float


def train_vision_tower(folder: Path, tower: Callable[[], CLIPVisionModel], rounds: Sequence[Round], seed: int) -> Path:
    """Teaches the vision tower what every patch shows, round after round. Returns the folder of the last one's result."""

    def save(model: PatchClassifier, to: Path) -> None:
        model.vision_tower.save_pretrained(to)
        torch.save(model.head.state_dict(), to / "head.pt")

    result = None
    for number, settings in enumerate(rounds):

        def model(before: Path | None = result) -> PatchClassifier:
            if before is None:
                return PatchClassifier(tower())
            model = PatchClassifier(CLIPVisionModel.from_pretrained(before))
            model.head.load_state_dict(torch.load(before / "head.pt"))
            return model

        result = run_stage(
            folder / str(number),
            model,
            LabelledScenes(settings.steps * settings.batch, settings.view, f"vision {number}"),
            save,
            seed=seed,
            max_steps=settings.steps,
            per_device_train_batch_size=settings.batch,
            learning_rate=settings.learning_rate,
            warmup_steps=settings.steps // 25,
        )
    return result
