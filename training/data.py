"""Records in LLaVA's JSON format as samples, and samples as batches.

Shapes use: b rows, s tokens, i images, t tiles of one image, n sequences of one record. Placeholders are expanded for the
finest scale, from which the objective makes the coarser ones. A record is one sequence, or one for each of its answers where the
chat template rewrites earlier turns: those stay together in one batch.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import torch
from PIL import Image
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from m3_conversion.json_files import read_json, read_json_lines
from m3_conversion.written_numbers import is_missing
from modeling_m3 import M3LlavaProcessor
from modeling_m3.visual_tokens import expand_placeholders

from .conversations import IGNORE_INDEX, IMAGE_MARK, Encoded, check_template, encode


logger = logging.getLogger(__name__)

Record = dict[str, Any]
Sample = dict[str, torch.Tensor]

_BAD, _UNSUPERVISED = 1, 2
_NOTES = {"skipped": _BAD, "without anything supervised": _UNSUPERVISED}
_MOST_BAD_IN_A_ROW = 100
_FIRST = 16  # records, that are laid out before anything is loaded


class BadSampleError(ValueError):
    """A record that cannot be trained on, with its name and the reason."""


def read_records(file: str | Path) -> list[Record]:
    """The records of a JSON file, or of one with a record per line (`.jsonl`).

    Raises:
        ValueError: no such file, text that is not JSON, or anything but a list of objects, by file and line.
    """
    file = Path(file)
    if not file.is_file():
        raise ValueError(f"There is no data file {file}.")
    records = [record for _, record in read_json_lines(file)] if file.suffix == ".jsonl" else read_json(file)
    if not isinstance(records, list) or not records or not all(isinstance(record, dict) for record in records):
        raise ValueError(f"{file} must hold a list of records, as LLaVA's data files do, with at least one.")
    return records


class LlavaDataset(Dataset):
    """Samples made when they are asked for: nothing is opened or tokenized before.

    A bad record is logged with its name and the reason, once, and the next good one of its kind, with or without image,
    takes its place: so batches keep their size and kind. With `strict` it raises instead. Notes of what was bad are kept
    in memory that the workers of a `DataLoader` share.

    Args:
        records: `{"id": ..., "image": path, data URI, PIL image or list of them, "conversations": [{"from", "value"}, ...]}`, where
            `image` may be `images`; any
            class with `__len__` and `__getitem__`. If it has `modality_lengths`, see there, records are not read for them.
        processor: of the checkpoint.
        image_folder: what paths of images are relative to.
        template: a name of `conversations.TEMPLATES`.
        max_length: tokens, those of images included, that a sample is cut to; never inside an image.
        strict: raise `BadSampleError` at the first bad record.
    """

    def __init__(
        self,
        records: Sequence[Record],
        processor: M3LlavaProcessor,
        *,
        image_folder: str | Path = ".",
        template: str = "chat_template",
        max_length: int = 2048,
        strict: bool = False,
    ):
        check_template(template)
        self.records, self.processor, self.template = records, processor, template
        self.image_folder, self.max_length, self.strict = Path(image_folder), max_length, strict
        self.scale = max(processor.visual_token_scales)
        self._notes = torch.zeros(len(records), dtype=torch.uint8).share_memory_()

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        """`input_ids` and `labels` of shape (s,); with images also what the image processor returns for them, and
        `num_visual_tokens` of shape (i,). Where the record is several sequences, `lengths` of shape (n,): they stand one after
        the other, each with the images in it.

        Raises:
            BadSampleError: with `strict`, or where a hundred records in a row are bad.
        """
        bad = []
        for candidate in islice(self._with_stand_ins(index), _MOST_BAD_IN_A_ROW):
            try:
                return self.sample(candidate)
            except BadSampleError as error:
                if self.strict:
                    raise
                self._note(candidate, _BAD, f"{error}. It is skipped.")
                bad.append(error)
        raise BadSampleError(f"{len(bad)} record(s) in a row cannot be used. The last one is {bad[-1]}.")

    def first_encoded(self) -> Encoded:
        """Return the first record that can be used, of which something is supervised if of any; its images are not opened.

        Raises:
            BadSampleError: none of the first 16 can be used; with `strict`, the first cannot, images included.
        """
        if self.strict:
            self.sample(0)
        errors, unsupervised = [], []
        for index in range(min(len(self.records), _FIRST)):
            try:
                encoded = self._encoded(self.records[index])
            except ValueError as error:
                errors.append(f"{self.name(index)}: {error}")
                continue
            if encoded.mismatch is None:
                return encoded
            unsupervised.append(encoded)
        if unsupervised:
            return unsupervised[0]
        raise BadSampleError(f"None of the first {len(errors)} record(s) can be used. {errors[0]}.")

    def sample(self, index: int) -> Sample:
        """Return the sample of one record, as `dataset[index]` does where it is a good one.

        Raises:
            BadSampleError: it is not.
        """
        record = self.records[index]
        try:
            images = [self._open(image) for image in _images(record)]
            encoded = self._encoded(record)
            prepared = dict(self.processor.image_processor(images, return_tensors="pt")) if images else {}
            parts = [self._expanded(ids, labels, prepared) for ids, labels in encoded.sequences]
        except ValueError as error:
            raise BadSampleError(f"{_name(index, record)}: {error}") from error
        # The last sequence has all images; an earlier one may have none.
        sample = {name: torch.cat([part[name] for part in parts if name in part]) for name in parts[-1]}
        if len(parts) > 1:
            sample["lengths"] = torch.tensor([len(part["input_ids"]) for part in parts])
        if (sample["labels"] == IGNORE_INDEX).all():
            reason = encoded.mismatch or f"it has no answer within max_length={self.max_length}"
            self._note(index, _UNSUPERVISED, f"{_name(index, record)}: {reason}. Nothing of it is supervised.")
        return sample

    def name(self, index: int) -> str:
        """What a record is called in messages."""
        return _name(index, self.records[index])

    @property
    def modality_lengths(self) -> list[int]:
        """Words of each record, negative where it has no image: the original's estimate of a length, by which batches
        are grouped."""
        given = getattr(self.records, "modality_lengths", None)
        return list(map(_modality_length, self.records)) if given is None else list(given)

    @property
    def notes(self) -> dict[str, list[int]]:
        """Indices of the records found bad so far, in this process and its workers, by what was done with them: "skipped",
        or "without anything supervised"."""
        return {name: (self._notes == note).nonzero()[:, 0].tolist() for name, note in _NOTES.items()}

    def remember(self, notes: dict[str, list[int]]) -> None:
        """Adds notes that were taken before, by another process or a run that this one goes on from."""
        for name, indices in notes.items():
            self._notes[indices] = _NOTES[name]

    def _with_stand_ins(self, index: int) -> Iterator[int]:
        yield index
        kind = bool(_images(self.records[index]))
        for step in range(1, len(self)):
            candidate = (index + step) % len(self)
            if bool(_images(self.records[candidate])) == kind:
                yield candidate

    def _note(self, index: int, note: int, message: str) -> None:
        if self._notes[index] != note:
            self._notes[index] = note
            logger.warning(message)

    def _encoded(self, record: Record) -> Encoded:
        conversation = record.get("conversations")
        if not isinstance(conversation, list):
            raise ValueError(f"conversations must be a list of turns, not {conversation!r}")
        encoded = encode(conversation, self.template, self.processor, self.max_length)
        marks = max(ids.count(self.processor.image_token_id) for ids, _ in encoded.sequences)
        if marks != len(_images(record)):
            raise ValueError(f"its text has {marks} {IMAGE_MARK} mark(s) for {len(_images(record))} image(s)")
        return encoded

    def _expanded(self, input_ids: list[int], labels: list[int], prepared: Sample) -> Sample:
        """A sequence at the finest scale, cut, with those of a record's images that are in it."""
        images = input_ids.count(self.processor.image_token_id)
        counts = [self.processor.image_layout(prepared, i).count(self.scale) for i in range(images)]
        sources = expand_placeholders(input_ids, self.processor.image_token_id, counts)
        expanded = [input_ids[i] for i in sources]
        self._check_length(expanded)
        sample = {
            "input_ids": torch.tensor(expanded[: self.max_length]),
            "labels": torch.tensor([labels[i] for i in sources[: self.max_length]]),
            **{name: value[:images] for name, value in prepared.items() if images},
        }
        return sample | ({"num_visual_tokens": torch.full((images,), self.scale)} if images else {})

    def _open(self, image: Any) -> Image.Image:
        if isinstance(image, Image.Image):
            return image.convert("RGB")
        if not isinstance(image, (str, os.PathLike)):
            raise ValueError(f"an image must be a path, a data URI or a PIL image, not {image!r}")
        if is_data_uri := str(image)[:5].lower() == "data:":
            name = f"{str(image)[:40]!r}..."
        elif not os.path.isfile(name := self.image_folder / image):
            raise ValueError(f"there is no picture at {str(name)[:300]}")
        try:
            with (
                urlopen(image) if is_data_uri else open(name, "rb") as file,
                Image.open(BytesIO(file.read())) as opened,
            ):
                return opened.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"{name} cannot be read as a picture: {error}") from error

    def _check_length(self, input_ids: list[int]) -> None:
        if self.processor.image_token_id in input_ids[self.max_length :]:
            end = len(input_ids) - input_ids[::-1].index(self.processor.image_token_id)
            raise ValueError(f"its images end at token {end}, beyond max_length={self.max_length}, and are never cut")


class EvaluationDataset(LlavaDataset):
    """Samples that each count once. What cannot be used is left out: in its place stands a sample without anything to predict.

    Args:
        multiple: of this many samples it is made, so that no process is given one twice to have as many as the others.
        args, kwargs: of `LlavaDataset`.
    """

    def __init__(self, *args: Any, multiple: int = 1, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.multiple = multiple

    def __len__(self) -> int:
        return -(-len(self.records) // self.multiple) * self.multiple

    def __getitem__(self, index: int) -> Sample:
        """As of `LlavaDataset`.

        Raises:
            BadSampleError: with `strict`.
        """
        if index < len(self.records):
            try:
                return self.sample(index)
            except BadSampleError as error:
                if self.strict:
                    raise
                self._note(index, _BAD, f"{error}. It is skipped.")
        return {
            "input_ids": torch.tensor([self.processor.tokenizer.pad_token_id] * 2),
            "labels": torch.tensor([IGNORE_INDEX] * 2),
        }


class Collator:
    """Samples of any kind as one batch, padded on the right.

    Args:
        pad_token_id: what `input_ids` are padded with.
    """

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, samples: Sequence[Sample]) -> Sample:
        """`input_ids`, `labels` and `attention_mask` of shape (b, s), a row for each sequence; the images of all rows one after the other:
        `pixel_values` of shape (i, c, h, w) or (i, most t, c, h, w) with zeros after an image's last tile,
        `num_visual_tokens` of shape (i,), `image_tile_grids` and `image_sizes` of shape (i, 2)."""
        rows = {name: [row for sample in samples for row in rows_of(sample, name)] for name in ("input_ids", "labels")}
        lengths = torch.tensor([len(row) for row in rows["input_ids"]])
        batch = {
            name: pad_sequence(rows[name], batch_first=True, padding_value=value)
            for name, value in (("input_ids", self.pad_token_id), ("labels", IGNORE_INDEX))
        }
        batch["attention_mask"] = (torch.arange(lengths.max()) < lengths[:, None]).long()
        with_images = [sample for sample in samples if "pixel_values" in sample]
        if with_images:
            batch["pixel_values"] = _cat_tiles([sample["pixel_values"] for sample in with_images])
            for name in ("image_sizes", "image_tile_grids", "num_visual_tokens"):
                if name in with_images[0]:
                    batch[name] = torch.cat([sample[name] for sample in with_images])
        return batch


def rows_of(sample: Sample, name: str) -> Sequence[torch.Tensor]:
    """Return `input_ids` or `labels` of each sequence of a sample, (s,) each."""
    return sample[name].split(sample["lengths"].tolist()) if "lengths" in sample else [sample[name]]


def _name(index: int, record: Record) -> str:
    identifier = record.get("id")
    return f"record {index}" if identifier is None else f"record {index} ({identifier!r})"


def _images(record: Record) -> list[Any]:
    """LLaVA's key is `image`; other tools write `images`, and None, NaN or "" for none."""
    for name in ("image", "images"):
        images = record.get(name)
        images = images if isinstance(images, (list, tuple)) else [images]
        if found := [image for image in images if not is_missing(image) and image != ""]:
            return found
    return []


def _modality_length(record: Record) -> int:
    turns = record.get("conversations") or []
    words = sum(len(str(turn.get("value")).split()) for turn in turns if isinstance(turn, dict))
    return max(words, 1) * (1 if _images(record) else -1)


def _cat_tiles(pixel_values: list[torch.Tensor]) -> torch.Tensor:
    if pixel_values[0].ndim == 5:
        most = max(pixels.shape[1] for pixels in pixel_values)
        pixel_values = [pad(pixels, (0, 0, 0, 0, 0, 0, 0, most - pixels.shape[1])) for pixels in pixel_values]
    return torch.cat(pixel_values)
