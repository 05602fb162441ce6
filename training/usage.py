"""What a run was really trained on: which records, and how many tokens of answers."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object

from .conversations import IGNORE_INDEX
from .data import Collator, LlavaDataset, Sample


RECORD = "record"


class CountedDataset(LlavaDataset):
    """As `LlavaDataset`; each sample says of which record it is made, which may be one that stands in for a bad one."""

    def sample(self, index: int) -> Sample:
        """As of `LlavaDataset`, with `record`, of shape (1,)."""
        return {**super().sample(index), RECORD: torch.tensor([index])}


class CountedCollator(Collator):
    """As `Collator`; batches of a `CountedDataset` have `record`, of one number for each sample, too."""

    def __call__(self, samples: Sequence[Sample]) -> Sample:
        records = [sample[RECORD] for sample in samples if RECORD in sample]
        return super().__call__(samples) | ({RECORD: torch.cat(records)} if records else {})


class Usage:
    """Counts what is trained on, in each process; what all processes counted is put together where it is asked for.

    Args:
        num_records: of the data set.
    """

    def __init__(self, num_records: int):
        self._used = torch.zeros(num_records, dtype=torch.uint8)
        self._tokens = torch.tensor(0)
        self._since = 0

    def add(self, batches: Iterable[dict[str, Any]]) -> None:
        """Counts batches that are trained on, and takes `record` out of them: it is no input of the model."""
        for batch in batches:
            labels = batch["labels"]
            self._used, self._tokens = self._used.to(labels.device), self._tokens.to(labels.device)
            self._tokens += (labels[:, 1:] != IGNORE_INDEX).sum()
            if RECORD in batch:
                self._used[batch.pop(RECORD)] = 1

    def state(self) -> dict[str, Any]:
        """What all processes counted, ready for JSON. Called by all of them together."""
        counted = gather_object([(np.packbits(self._used.cpu().numpy()), int(self._tokens))])
        used = np.bitwise_or.reduce([bits for bits, _ in counted])
        tokens = sum(number for _, number in counted)
        return {
            "records": base64.b64encode(used.tobytes()).decode(),
            "answer_tokens": tokens,
            "since_step": self._since,
        }

    def restore(self, state: Mapping[str, Any] | None, step: int) -> None:
        """Goes on from what was counted. Called by one process alone, as the sum over processes counts.

        Args:
            state: of `state`; None where a run was begun before there was this.
            step: that the run goes on from.
        """
        if state is None:
            self._since = step
            return
        bits = np.frombuffer(base64.b64decode(state["records"]), dtype=np.uint8)
        self._used = torch.from_numpy(np.unpackbits(bits, count=len(self._used)))
        self._tokens, self._since = torch.tensor(state["answer_tokens"]), state["since_step"]


def in_words(state: Mapping[str, Any]) -> str:
    """What a card says of a `Usage.state`."""
    used = np.unpackbits(np.frombuffer(base64.b64decode(state["records"]), dtype=np.uint8)).sum()
    records = f"{used} records, " if used else ""
    since = f", counted from step {state['since_step'] + 1} on" if state["since_step"] else ""
    return f"{records}{state['answer_tokens']} answer tokens{since}"
