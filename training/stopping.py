"""How a run ends early: at Ctrl-C, or at the SIGTERM of a scheduler, with a checkpoint that it goes on from."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import get_worker_info
from transformers import TrainerCallback

from m3_conversion.signals import handling_signals


_REPEATED = 1.0  # seconds


@dataclass
class UndisturbedCollator:
    """A collator that has workers of a `DataLoader` leave signals to the process they work for.

    Launchers and schedulers send SIGTERM to all processes of a run, and a terminal does Ctrl-C: without its workers, a run
    could not finish the step. They end with it.
    """

    collate: Callable[[Sequence[Any]], Any]

    def __call__(self, samples: Sequence[Any]) -> Any:
        if get_worker_info() is not None:
            for signum in (signal.SIGINT, signal.SIGTERM):  # torch has set its own after any that were inherited
                signal.signal(signum, signal.SIG_IGN)
        return self.collate(samples)


class Stopper(TrainerCallback):
    """In a `with` block, a signal ends training after the step that is under way, with a checkpoint.

    Before and after training, and at a second Ctrl-C, `KeyboardInterrupt` is raised with the signal's number. Launchers of
    several processes repeat a signal at once; that is no second one.

    Attributes:
        signum: of the signal that came, on any of the processes; 0 if none did.
    """

    def __init__(self) -> None:
        self.signum, self._since, self._training, self._process = 0, 0.0, False, os.getpid()

    def __enter__(self) -> Stopper:
        self._handling = handling_signals(self._stop)
        self._handling.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._handling.__exit__(*error)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._training = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._training = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.world_size > 1:  # signals do not reach all processes in the same step
            agreed = torch.tensor(self.signum, device=args.device)
            torch.distributed.all_reduce(agreed, torch.distributed.ReduceOp.MAX)
            self.signum = int(agreed)
        if self.signum:
            control.should_save = control.should_training_stop = True

    def _stop(self, signum: int, frame: object) -> None:
        if os.getpid() != self._process:
            return  # a worker that reads data: see `UndisturbedCollator`
        now = time.monotonic()
        if not self._training or (self.signum and signum == signal.SIGINT and now - self._since > _REPEATED):
            raise KeyboardInterrupt(signum)
        if not self.signum:
            self.signum, self._since = signum, now
            if os.environ.get("RANK", "0") == "0":  # as launchers number processes
                os.write(2, b"\nm3-train: stopping after this step, with a checkpoint; a second Ctrl-C stops at once\n")
