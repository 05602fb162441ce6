"""The folder that a run writes to: its last checkpoint, what it depends on, and one command at a time."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout
from transformers.trainer import OPTIMIZER_NAME, TRAINER_STATE_NAME

from m3_conversion.json_files import read_json, write_json

from .arguments import M3TrainingArguments
from .parameters import parameter_groups
from .run_record import Change, Facts, compare, read_run
from .trainer import M3Trainer


logger = logging.getLogger(__name__)

RECORD = "run.json"
LOCK = ".lock"
_BEFORE_THE_FIRST_CHECKPOINT = {LOCK, f".{RECORD}.part"}
_WAIT = 10  # seconds: so long, workers that read data outlive a run that was killed, and hold its lock


class RunFolder:
    """Where a run writes. In a `with` block, no other command can claim it from `claim` on.

    Args:
        folder: the run's `output_dir`; it need not exist.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._lock = FileLock(self.folder / LOCK)
        self._facts: Facts = {}
        self._made = False

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *error: Any) -> None:
        if self._lock.is_locked and not (self.folder / RECORD).exists():  # nothing was begun: nothing is left
            (self.folder / LOCK).unlink()
            if self._made and not any(self.folder.iterdir()):
                self.folder.rmdir()
        self._lock.release()

    def last_checkpoint(self) -> str | None:
        """The checkpoint to go on from; None for a new run. One whose writing was interrupted does not count.

        Raises:
            ValueError: the folder holds a finished run, or anything that is not a run's.
        """
        folder = self.folder
        if not folder.exists():
            return None
        if not folder.is_dir():
            raise ValueError(f"output_dir={folder} is a file: name a folder.")
        if (folder / "final").exists():
            raise ValueError(
                f"output_dir={folder} holds a finished run: name another folder, or remove it. To go on with a longer "
                f"max_steps, remove {folder / 'final'}."
            )
        checkpoints = self._checkpoints()
        for checkpoint in reversed(checkpoints):
            if _is_whole(checkpoint):
                return str(checkpoint)
        others = {file.name for file in folder.iterdir()} - {checkpoint.name for checkpoint in checkpoints}
        if RECORD not in others and others - _BEFORE_THE_FIRST_CHECKPOINT:
            raise ValueError(
                f"output_dir={folder} is not empty and holds no checkpoint to go on from: name another folder."
            )
        return None

    def claim(self, arguments: M3TrainingArguments, facts: Callable[[], Facts]) -> None:
        """Makes sure that a run can begin here, or go on, and keeps others from it. Called by all processes together.

        Args:
            arguments: of the run.
            facts: gives what it depends on, of `describe_run`; called by the first process alone.

        Raises:
            ValueError: the run that is here was begun otherwise, or is under way; nothing is touched then.
        """
        refused: list[str | None] = [None]
        if arguments.process_index == 0:
            try:
                self.last_checkpoint()
                self._facts = facts()
                self._changes()
                self._take()
                self._changes()  # since another one may have been here until now
            except (ValueError, OSError) as error:  # which the other processes wait to hear of
                refused = [str(error)]
        broadcast_object_list(refused)
        if refused[0] is not None:
            raise ValueError(refused[0])

    def begin(self, accelerator: Accelerator) -> str | None:
        """Stores what the run depends on and removes checkpoints that were left half written. Called by all processes.

        Returns:
            The checkpoint to go on from, None for a new run.
        """
        checkpoint = self.last_checkpoint()
        if accelerator.is_main_process:
            if checkpoint is not None:
                self._say_how_it_goes_on(checkpoint)
            write_json(self.folder / RECORD, self._facts)
            for half in self._checkpoints():
                if not _is_whole(half):
                    shutil.rmtree(half)
        accelerator.wait_for_everyone()
        return checkpoint

    def check_unrecorded(self, trainer: M3Trainer) -> None:
        """Holds what is trained against the optimizer of a run that was begun before runs were recorded.

        Raises:
            ValueError: they differ, or it cannot be known.
        """
        checkpoint = self.last_checkpoint()
        if checkpoint is None or (self.folder / RECORD).exists():
            return
        file = Path(checkpoint) / OPTIMIZER_NAME
        here = f"output_dir={self.folder} holds a run without {RECORD}, which says what it depends on"
        if not file.is_file():
            raise ValueError(f"{here}, nor can it be seen from {checkpoint}: name another output_dir.")
        stored = torch.load(file, map_location="meta", mmap=True, weights_only=True)["param_groups"]
        decayed = set(trainer.get_decay_parameter_names(trainer.model))
        own = parameter_groups(trainer.model, decayed, trainer.args)
        then = [(len(group["params"]), group.get("initial_lr", group["lr"]), group["weight_decay"]) for group in stored]
        now = [(len(group["params"]), group["lr"], group["weight_decay"]) for group in own]
        if then != now:
            raise ValueError(
                f"{here}. It trained, by group, (parameters, learning rate, weight decay) {then}, and would now train {now}: go "
                "on with its own arguments, or name another output_dir."
            )

    def _changes(self) -> list[Change]:
        """What changed since the run was begun, all of it harmless."""
        checkpoint = self.last_checkpoint()
        if checkpoint is None or not (self.folder / RECORD).exists():
            return []
        state = read_json(Path(checkpoint) / TRAINER_STATE_NAME)
        changes = compare(read_run(self.folder / RECORD), self._facts, planned_steps=state["max_steps"])
        refused = [str(change) for change in changes if not change.harmless]
        if refused:
            raise ValueError(
                f"output_dir={self.folder} holds a run that was begun otherwise: {'; '.join(refused)}. Go on as it was begun, or "
                "name another output_dir."
            )
        return changes

    def _take(self) -> None:
        self._made = not self.folder.exists()
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=_WAIT)
        except Timeout:
            raise ValueError(
                f"output_dir={self.folder} is that of an m3-train that is under way: name another folder, or wait for its end."
            ) from None

    def _say_how_it_goes_on(self, checkpoint: str) -> None:
        logger.info("going on from %s", checkpoint)
        if not (self.folder / RECORD).exists():
            logger.warning(
                "this run was begun before %s was written: that data, template and the like are the same is not checked",
                RECORD,
            )
        if changes := self._changes():
            logger.info("it goes on with %s", "; ".join(map(str, changes)))

    def _checkpoints(self) -> list[Path]:
        """Whole or not, by their step."""
        found = [path for path in self.folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
        return sorted(found, key=lambda path: int(path.name.rsplit("-", 1)[1]))


def _is_whole(checkpoint: Path) -> bool:
    """Whether its last file is there, and whole."""
    try:
        read_json(checkpoint / TRAINER_STATE_NAME)
    except ValueError:
        return False
    return True
