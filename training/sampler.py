"""The order of samples: batches of one kind, with or without images, and of similar lengths.

Source: `LengthGroupedSampler` and `get_modality_length_grouped_indices` of the original's `llava/train/llava_trainer.py`,
but for the rest of each kind, which there makes one mixed batch: see `ModalityLengthSampler`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


class ModalityLengthSampler(Sampler[int]):
    """Yields indices so that every global batch is all with images or all without.

    So every process of a step runs the vision tower, or none does, and none waits for another that has images to encode. A
    kind whose size is not a whole number of global batches is filled up with samples of its own from the start of its
    order. The order depends on nothing but the arguments and the epoch.

    Args:
        modality_lengths: the length of each sample, negative without an image.
        batch_size: samples of one process in one forward.
        num_batches: forwards of all processes together that make up one optimizer step.
        seed: of the order.
    """

    def __init__(self, modality_lengths: Sequence[int], batch_size: int, num_batches: int, seed: int = 0):
        self.lengths = [abs(length) for length in modality_lengths]
        with_images = [index for index, length in enumerate(modality_lengths) if length > 0]
        without = [index for index, length in enumerate(modality_lengths) if length <= 0]
        self.kinds = [kind for kind in (with_images, without) if kind]
        self.batch_size, self.num_batches, self.seed, self.epoch = batch_size, num_batches, seed, 0

    @property
    def global_batch_size(self) -> int:
        return self.batch_size * self.num_batches

    def __len__(self) -> int:
        return sum(-(-len(kind) // self.global_batch_size) for kind in self.kinds) * self.global_batch_size

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of an epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        batches = [batch for kind in self.kinds for batch in self._global_batches(kind, generator)]
        for index in torch.randperm(len(batches), generator=generator).tolist():
            yield from batches[index]

    def _global_batches(self, kind: list[int], generator: torch.Generator) -> Iterator[list[int]]:
        order = [kind[index] for index in torch.randperm(len(kind), generator=generator).tolist()]
        missing = -len(order) % self.global_batch_size
        order += (order * (missing // len(order) + 1))[:missing]
        for start in range(0, len(order), self.global_batch_size):
            batch = order[start : start + self.global_batch_size]
            yield [index for chunk in self._even_chunks(batch) for index in chunk]

    def _even_chunks(self, batch: list[int]) -> list[list[int]]:
        """Per-process batches of one size and similar total length: the longest sample left goes to the shortest batch."""
        chunks: list[list[int]] = [[] for _ in range(self.num_batches)]
        totals = [0] * self.num_batches
        for index in sorted(batch, key=lambda index: self.lengths[index], reverse=True):
            open_chunks = [i for i, chunk in enumerate(chunks) if len(chunk) < self.batch_size]
            shortest = min(open_chunks, key=totals.__getitem__)
            chunks[shortest].append(index)
            totals[shortest] += self.lengths[index]
        return chunks
