"""The first stage's run: rounds of `transformers.Trainer` on labelled scenes, each going on where it was interrupted."""

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import CLIPVisionModel, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from .muon import MuonWithAdamW
from .vision import LabelledScenes, PatchClassifier


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
    """Teaches the vision tower what every patch shows, round after round. Returns the folder of the last one's result.

    A round has a folder of its own, with `result` when it is done; it is then not run again.
    """
    result = None
    for number, settings in enumerate(rounds):
        before, result = result, folder / str(number) / "result"
        if not result.exists():
            set_seed(seed)
            model = PatchClassifier(tower()) if before is None else _load(before)
            scenes = LabelledScenes(settings.steps * settings.batch, settings.view, f"vision {number}")
            _run(model, settings, folder / str(number), scenes, seed)
    return result


def number_of_processes() -> int:
    """Of this run, as torchrun says."""
    return int(os.environ.get("WORLD_SIZE", 1))


def number_of_workers() -> int:
    """Processes that draw pictures: beside a GPU they are what takes the time, on a CPU they would be in its way."""
    return 8 if torch.cuda.is_available() else 0


def _run(model: PatchClassifier, settings: Round, folder: Path, dataset: LabelledScenes, seed: int) -> None:
    arguments = TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        seed=seed,
        use_cpu=not torch.cuda.is_available(),
        dataloader_num_workers=number_of_workers(),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch // number_of_processes(),
        ddp_find_unused_parameters=True,  # the tower's last norm, of its pooled output alone
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.05},
        warmup_steps=settings.steps // 25,
        bf16=True,
        disable_tqdm=True,
        logging_steps=25,
        save_steps=100,
        save_total_limit=1,
        remove_unused_columns=False,
        report_to=[],
    )
    # In bfloat16 on a CPU, the gradient of the fused attention costs more than all else, unless there are many tokens.
    model.vision_tower.set_attn_implementation("eager" if settings.view < 336 else "sdpa")
    groups = [{"params": list(model.parameters()), "lr": settings.learning_rate, "weight_decay": 0.05}]
    optimizer = MuonWithAdamW(model, groups)
    trainer = Trainer(model=model, args=arguments, train_dataset=dataset, optimizers=(optimizer, None))
    checkpoint = get_last_checkpoint(arguments.output_dir) if Path(arguments.output_dir).exists() else None
    trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.is_world_process_zero():
        partial = folder / "result.incomplete"
        shutil.rmtree(partial, ignore_errors=True)
        model.vision_tower.save_pretrained(partial)
        torch.save(model.head.state_dict(), partial / "head.pt")
        trainer.state.save_to_json(str(partial / "trainer_state.json"))
        partial.rename(folder / "result")
        shutil.rmtree(arguments.output_dir)
    trainer.accelerator.wait_for_everyone()


def _load(folder: Path) -> PatchClassifier:
    model = PatchClassifier(CLIPVisionModel.from_pretrained(folder))
    model.head.load_state_dict(torch.load(folder / "head.pt"))
    return model
