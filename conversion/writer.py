"""The new folder: weights streamed into sharded safetensors, and a name that appears only when all is written."""

import functools
import glob
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from huggingface_hub.serialization import split_state_dict_into_shards_factory
from transformers import GenerationConfig

import modeling_m3
from modeling_m3 import REMOTE_CODE_FILES, M3LlavaConfig, M3LlavaProcessor

from .original import SAFETENSORS_DTYPES, ConversionError, StoredTensor


logger = logging.getLogger(__name__)

_WEIGHT_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items() if dtype.is_floating_point}
WEIGHT_DTYPES = tuple(_WEIGHT_DTYPE_NAMES)
_DTYPE_NAMES = {**_WEIGHT_DTYPE_NAMES, torch.int8: "I8", torch.uint8: "U8"}  # the latter for quantized weights
_WRITERS = 2  # a second one hides the time that the system needs for new pages; more gain nothing


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to write. Where `shape` has more rows than `source`, the rest are the mean of the source's rows."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    source: StoredTensor

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def one_at_a_time(self) -> bool:
        """Whether a whole file must be loaded to read it, so that two never are."""
        return self.source.offset is None

    def chunks(self) -> Iterator[torch.Tensor]:
        """The values to write in order, about 1 MB at a time."""
        width = math.prod(self.shape[1:])
        new_rows = self.shape[0] - self.source.shape[0] if self.shape else 0
        total = torch.zeros(width, dtype=torch.float64)  # so that the mean does not depend on where chunks end
        for chunk in self.source.chunks():
            if new_rows:
                total += chunk.view(-1, width).sum(0, dtype=torch.float64)
            yield self._cast(chunk)
        if new_rows:
            mean = (total / self.source.shape[0]).float().to(self.dtype)
            yield mean.repeat(new_rows)

    def _cast(self, chunk: torch.Tensor) -> torch.Tensor:
        cast = chunk.to(self.dtype)
        if cast.dtype != chunk.dtype and cast.isinf().any() and not chunk.isinf().any():
            largest = chunk.abs().max().item()
            named = f"{self.source.file}: {self.source.key}"
            raise ConversionError(f"{named} holds {largest:g}, too large for {self.dtype}: choose another --dtype")
        return cast


def write_weights(
    folder: Path, tensors: list[PlannedTensor], max_shard_size: int | str, progress: Callable[[int], object]
) -> list[str]:
    """Writes the tensors as `model.safetensors`, or as shards with an index. Returns the names of the weight files.

    Args:
        folder: where to write.
        tensors: in the order they should be read in.
        max_shard_size: bytes, or a text as `"5GB"`. A larger tensor gets a file of its own.
        progress: called with the number of bytes written since it was last called.

    Raises:
        ConversionError: the disk is full or cannot be written to.
    """
    planned = {tensor.name: tensor for tensor in tensors}
    split = split_state_dict_into_shards_factory(
        planned,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    for name, keys in split.filename_to_tensors.items():
        try:
            _write_safetensors(folder / name, [planned[key] for key in keys], progress)
        except OSError as error:
            if error.filename is not None:  # it says itself which file it is about
                raise
            raise ConversionError(f"{folder / name} cannot be written: {error.strerror or error}") from error
    if len(split.filename_to_tensors) > 1:
        index = {"metadata": split.metadata, "weight_map": dict(sorted(split.tensor_to_filename.items()))}
        write_json(folder / "model.safetensors.index.json", index)
    return list(split.filename_to_tensors)


def write_other_files(
    folder: Path,
    config: M3LlavaConfig,
    processor: M3LlavaProcessor,
    generation_config: GenerationConfig,
    card: str,
) -> None:
    """Writes what a folder needs beside its weights to load anywhere and to go to the Hub, remote code included."""
    processor.save_pretrained(folder)
    generation_config.save_pretrained(folder)
    (folder / "README.md").write_text(card, encoding="utf-8")
    for code in REMOTE_CODE_FILES:
        shutil.copyfile(Path(modeling_m3.__file__).with_name(code), folder / code)
    config.save_pretrained(folder)  # last: no folder without it looks like a checkpoint


def write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def check_destination(destination: Path, overwrite: bool) -> None:
    """Raises `ConversionError` if something is at `destination` that a new folder may not replace, or it is being written.

    What a run that was killed left beside it is removed, and a folder that it was about to replace put back.
    """
    if destination.exists():
        if not destination.is_dir():
            raise ConversionError(f"{destination} is a file: name a folder to write")
        if destination.is_mount() or any(path.is_relative_to(destination) for path in (Path.cwd(), Path.home())):
            raise ConversionError(f"{destination} cannot be replaced by a new folder: name a folder inside it")
    if _workplace(destination).exists():
        with _working(destination):
            pass
    if not overwrite and destination.exists() and any(destination.iterdir()):
        raise ConversionError(
            f"{destination} exists and is not empty: name another folder, or pass --overwrite to replace it"
        )


@contextmanager
def new_folder(destination: Path, *, overwrite: bool) -> Iterator[Path]:
    """A folder beside `destination` to write into. It takes that name when the block ends well, else it is removed.

    An older folder of that name stays until then. What a process leaves that is killed, the next one removes.

    Raises:
        ConversionError: as `check_destination`.
    """
    destination = destination.resolve()
    check_destination(destination, overwrite)
    destination.parent.mkdir(parents=True, exist_ok=True)
    workplace = _workplace(destination)
    name = glob.escape(f".{destination.name}.")
    for leftover in (
        path for kind in ("incomplete", "replaced") for path in destination.parent.glob(f"{name}{kind}-*")
    ):
        if leftover != workplace:
            logger.warning("%s is not of a run that is known: remove it, unless you need it", leftover)
    with _working(destination):
        if not overwrite and destination.exists() and any(destination.iterdir()):
            raise ConversionError(f"{destination} was written by another process just now: name another folder")
        (workplace / _NEW).mkdir()
        yield workplace / _NEW
        if destination.exists():
            destination.rename(workplace / _REPLACED)
        (workplace / _NEW).rename(destination)


# A folder is written in another one beside it, under a name of ours: with a lock, which tells a process that was killed from
# one that runs; the new folder; and for a moment the one that is replaced.
_LOCK, _NEW, _REPLACED = ".m3-writes-here", "new", "replaced"


def _workplace(destination: Path) -> Path:
    return destination.with_name(f".{destination.name}.incomplete-m3")


@contextmanager
def _working(destination: Path) -> Iterator[None]:
    """Has the workplace of a destination for this process alone. It is gone when the block ends, however it ends.

    Raises:
        ConversionError: another process has it, or it is not ours.
    """
    workplace = _workplace(destination)
    with suppress(FileNotFoundError):
        there = set(os.listdir(workplace))  # at one moment: another process may be making its lock
        if there and _LOCK not in there:
            raise ConversionError(f"{workplace} is in the way, and was not made here: move it away")
    lock = FileLock(workplace / _LOCK)
    try:
        _acquire(lock, workplace, destination)
        _settle(workplace, destination)
        yield
    finally:
        with suppress(Timeout, FileNotFoundError):
            lock.acquire(timeout=0)  # where a signal came before it was, what was made for it is removed, too
        if lock.is_locked:
            try:
                _settle(workplace, destination)
                (workplace / _LOCK).unlink()
                workplace.rmdir()
            finally:
                lock.release(force=True)


def _acquire(lock: FileLock, workplace: Path, destination: Path) -> None:
    while True:
        workplace.mkdir(exist_ok=True)
        with suppress(FileNotFoundError):  # who has it may be done, and remove it, at any time
            (workplace / _LOCK).touch()
            before = (workplace / _LOCK).stat()
            try:
                lock.acquire(timeout=0)
            except Timeout as error:
                raise ConversionError(
                    f"{destination} is being written by another process: wait until it is done, or name another folder"
                ) from error
            if os.path.samestat(before, (workplace / _LOCK).stat()):
                return
        lock.release()


def _settle(workplace: Path, destination: Path) -> None:
    """Removes what a run has left, but puts back a folder that it was about to replace."""
    new, replaced = workplace / _NEW, workplace / _REPLACED
    if replaced.exists() and not destination.exists():
        replaced.rename(destination)
    if replaced.exists() and new.exists():
        raise ConversionError(
            f"{replaced} is what {destination} was before a run that was killed, and both are there: move one of them away"
        )
    for folder in (new, replaced):
        shutil.rmtree(folder, ignore_errors=True)


def _write_safetensors(file: Path, tensors: list[PlannedTensor], progress: Callable[[int], object]) -> None:
    """The header follows from the plan, so that values go from file to file without being held.

    Source of the layout: https://github.com/huggingface/safetensors#format
    """
    header: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize):  # aligns every one, as the library does
        start, end = end, end + tensor.nbytes
        header[tensor.name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    starts = [8 + len(text) + header[tensor.name]["data_offsets"][0] for tensor in tensors]
    writers = 1 if any(tensor.one_at_a_time for tensor in tensors) else _WRITERS
    with ThreadPoolExecutor(writers) as pool:
        for nbytes in pool.map(functools.partial(_write_tensor, file), tensors, starts):
            progress(nbytes)


def _write_tensor(file: Path, tensor: PlannedTensor, start: int) -> int:
    with open(file, "r+b") as output:
        output.seek(start)
        # `copy_file_range` would be no faster: between places that lie differently in their pages, it takes half as long again.
        for chunk in tensor.chunks():
            output.write(memoryview(chunk.view(torch.uint8).numpy()))
    return tensor.nbytes
