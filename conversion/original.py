"""An original checkpoint folder, read lazily: its configuration, its tensors one by one, where its other files are.

Nothing is loaded when a folder is opened: a stored tensor is a key, a shape and a range of bytes in a file.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, snapshot_download
from safetensors import SafetensorError, safe_open

from . import json_files


CHUNK_BYTES = 1 << 20  # as fast as larger ones, and small beside what Python and torch take themselves

# In the order transformers looks for them, which is the order the original's `from_pretrained` saw.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# What LLaVA's training writes in the place of a model: adapters, what was trained beside them, a projector.
PROJECTOR_FILE = "mm_projector.bin"
_SMALL_WEIGHTS = ("adapter_model.*", "non_lora_trainables.bin", PROJECTOR_FILE)
_LARGE_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")  # many repositories hold both
_POINTER = b"version https://git-lfs"  # how a file of Git LFS begins where its content was not fetched
SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
}


class ConversionError(ValueError):
    """What is wrong with a checkpoint or a request, in one line that a person can act on."""


class WholeFile:
    """The one file at a time whose tensors are in memory, where they cannot be read one by one.

    A file that is mapped is not kept: what is read of a map counts as this process's memory until the map is closed.
    """

    def __init__(self) -> None:
        self.file: Path | None = None
        self.tensors: dict[str, torch.Tensor] = {}

    def load(self, file: Path) -> dict[str, torch.Tensor]:
        if file != self.file:
            self.file, self.tensors = None, {}  # before the next file is loaded, not after
            tensors = _torch_load(file, "cpu")
            if _is_mappable(file):
                return tensors
            self.tensors, self.file = tensors, file
        return self.tensors


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file. `offset` is where its bytes start, None where only loading the file (by `whole`) can tell."""

    key: str
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int | None
    whole: "WholeFile"

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def chunks(self) -> Iterator[torch.Tensor]:
        """The values in order, as flat tensors of whole rows, about 1 MB. A chunk is overwritten by the next one.

        Raises:
            ConversionError: the file ends before the tensor does.
        """
        width = math.prod(self.shape[1:])
        step = width * max(1, CHUNK_BYTES // (width * self.dtype.itemsize))
        if self.offset is None:
            yield from self.whole.load(self.file)[self.key].detach().flatten().split(step)
            return
        left = self.nbytes
        buffer = bytearray(min(left, step * self.dtype.itemsize))
        with open(self.file, "rb", buffering=0) as file:
            file.seek(self.offset)
            while left:
                view = memoryview(buffer)[: min(left, len(buffer))]
                filled = 0
                while filled < len(view):
                    count = file.readinto(view[filled:])
                    if not count:
                        raise self.cut_off()
                    filled += count
                left -= len(view)
                yield torch.frombuffer(view, dtype=self.dtype)

    def read(self) -> torch.Tensor:
        """All of it. Raises as `chunks` does."""
        return torch.cat([chunk.clone() for chunk in self.chunks()]).view(self.shape)

    def cut_off(self) -> ConversionError:
        """The error for a file that ends before the tensor does."""
        return ConversionError(f"{self.file} ends inside {self.key}: download or copy it again")


@dataclass(frozen=True)
class HeldTensor(StoredTensor):
    """A tensor that is in memory, as if it were stored in a file."""

    tensor: torch.Tensor

    @classmethod
    def of(cls, key: str, file: Path, tensor: torch.Tensor) -> "HeldTensor":
        """A tensor by its key in `file`, by which errors name it."""
        return cls(key, file, tuple(tensor.shape), tensor.dtype, 0, WholeFile(), tensor.detach())

    def chunks(self) -> Iterator[torch.Tensor]:
        """As of a stored one."""
        width = math.prod(self.shape[1:])
        step = width * max(1, CHUNK_BYTES // (width * self.dtype.itemsize))
        yield from self.tensor.contiguous().flatten().split(step)


def check_name(name: object, what: str = "a checkpoint's folder or its Hub id") -> None:
    """Raises `ConversionError` for what names nothing: "" would be the folder one is in, and None a repository called so."""
    if not isinstance(name, str | PathLike) or not str(name).strip():
        raise ConversionError(f"{name!r} is no name: give {what}")


def same_values(first: StoredTensor, second: StoredTensor) -> bool:
    """Whether two tensors hold the same, in the same type. Raises as `StoredTensor.chunks` does."""
    pairs = zip(first.chunks(), second.chunks())
    return (first.shape, first.dtype) == (second.shape, second.dtype) and all(torch.equal(*pair) for pair in pairs)


def is_hub_id(name: str) -> bool:
    """Whether a repository of the Hub may be called so: of a model of today's kind, which has an owner."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None


def local_folder(name: str | Path, *, weights: bool = True, revision: str | None = None) -> Path:
    """The folder `name`; where no such folder exists, the Hub repository of that name, its weights included or not.

    Raises:
        ConversionError: there is no such folder and the Hub does not have it, or cannot be reached.
    """
    check_name(name)
    if Path(name).is_dir():
        return Path(name)
    if Path(name).exists():
        raise ConversionError(f"{name} is not a folder: give a checkpoint's folder or its Hub id")
    if not is_hub_id(str(name)):
        from modeling_m3.checkpoint import no_such_folder  # imports torch, which may still be under way

        raise ConversionError(no_such_folder(str(name)))
    try:
        small = ["*.json", "*.model", "*.jinja", "merges.txt", "README.md", *_SMALL_WEIGHTS]
        folder = Path(snapshot_download(str(name), revision=revision, allow_patterns=small))
        for pattern in _LARGE_WEIGHTS if weights else ():
            snapshot_download(str(name), revision=revision, allow_patterns=[pattern])
            if any(folder.glob(pattern)):
                break
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConversionError(f"{name} is neither a folder here nor reachable on the Hub: {reason}") from error
    return folder


def weights_to_download(name: str, revision: str) -> int:
    """Bytes of the weights that `local_folder` would download of a Hub repository's commit."""
    for pattern in () if constants.HF_HUB_OFFLINE else _LARGE_WEIGHTS:
        files = snapshot_download(name, revision=revision, allow_patterns=[pattern], dry_run=True)
        if files:
            return sum(file.file_size for file in files if file.will_download)
    return 0


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ConversionError: the file is missing, is not valid JSON, or does not hold an object.
    """
    if not file.exists():
        raise ConversionError(f"{file} is missing: is {file.parent} a whole checkpoint folder?")
    with open(file, "rb") as opened:
        check_content(file, opened.read(len(_POINTER)))
    try:
        content = json_files.read_json(file)
    except ValueError as error:
        raise ConversionError(f"{str(error).rstrip('.')}: download or copy it again") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{file} holds a {type(content).__name__}, not an object: download or copy it again")
    return content


def check_content(file: Path, content: bytes) -> None:
    """Raises `ConversionError` for a file, or its beginning, whose content git left where it came from."""
    if content.startswith(_POINTER):
        raise ConversionError(f"{file} is a Git LFS pointer, not the file itself: run `git lfs pull` in {file.parent}")


def has_model_weights(folder: Path) -> bool:
    """Whether a folder holds a whole model's weights, or an index of them."""
    return any((folder / name).exists() for name in WEIGHT_FILES)


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a folder's weight files, by key; single or sharded, safetensors or `.bin`.

    Raises:
        ConversionError: no weight files, a missing or damaged one, an index that disagrees with the files, or a
            pickle that needs code to be run.
    """
    file = next((folder / name for name in WEIGHT_FILES if (folder / name).exists()), None)
    if file is None:
        raise ConversionError(
            f"{folder} holds no model weights ({', '.join(WEIGHT_FILES)}): is it a whole checkpoint folder?"
        )
    whole = WholeFile()
    if file.suffix != ".json":
        return _tensors_of(file, whole)
    tensors: dict[str, StoredTensor] = {}
    for shard, keys in _indexed_shards(file).items():
        if not shard.exists():
            raise ConversionError(f"{shard} is missing, though {file.name} lists it: download or copy it again")
        held = _tensors_of(shard, whole)
        for key in sorted(keys.symmetric_difference(held)):
            where = f"lists {key} in {shard.name}, which does not hold it"
            if key in held:
                where = f"does not list {key} under {shard.name}, which holds it"
            raise ConversionError(f"{file} {where}: the index and the files are not of one checkpoint")
        tensors |= held
    return tensors


def unwrapped(
    tensors: dict[str, StoredTensor], key: str, folder: Path, prefixes: tuple[str, ...] = ("",)
) -> dict[str, StoredTensor]:
    """The tensors, of which every model of the kind has `key`, after one of `prefixes`.

    Raises:
        ConversionError: it is there under a name that something which wrapped the model has put before every key.
    """
    found = [name.removesuffix(key) for name in tensors if name.endswith(key)]
    if found and not set(found) & set(prefixes):
        prefix = min((name.removesuffix(known) for name in found for known in prefixes), key=len)
        raise ConversionError(
            f"{folder}: keys of its weights begin with {prefix!r}, which a wrapper of the model has put there: save "
            "the model inside of it, or take that off the keys"
        )
    return tensors


def file_tensors(file: Path) -> dict[str, StoredTensor]:
    """Every tensor of one file, safetensors or `.bin`, by key.

    Raises:
        ConversionError: it is damaged, or a pickle that needs code to be run.
    """
    return _tensors_of(file, WholeFile())


def _indexed_shards(index: Path) -> dict[Path, set[str]]:
    """The keys of each shard, in the order of the shards' names."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConversionError(f"{index} has no weight_map: download or copy it again")
    shards: dict[Path, set[str]] = {}
    for key, name in sorted(weight_map.items(), key=lambda item: str(item[1])):
        if not isinstance(name, str) or name != Path(name).name:
            raise ConversionError(f"{index} names the file {name!r} for {key}: it must be a file of the same folder")
        shards.setdefault(index.parent / name, set()).add(key)
    return shards


def _tensors_of(file: Path, whole: WholeFile) -> dict[str, StoredTensor]:
    with open(file, "rb") as opened:
        check_content(file, opened.read(len(_POINTER)))
    return (_safetensors_of if file.suffix == ".safetensors" else _bin_tensors_of)(file, whole)


def _safetensors_of(file: Path, whole: WholeFile) -> dict[str, StoredTensor]:
    """Checked by the library, which does not tell where in the file a tensor is: that is read from the header.

    Source of the layout: https://github.com/huggingface/safetensors#format
    """
    with open(file, "rb") as opened:
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            raise ConversionError(f"{file} is truncated or damaged ({error}): download or copy it again") from error
        header_bytes = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(header_bytes))
    header.pop("__metadata__", None)
    tensors = {}
    for key, entry in header.items():
        if entry["dtype"] not in SAFETENSORS_DTYPES:
            raise ConversionError(f"{file}: {key} is stored as {entry['dtype']}: convert an unquantized checkpoint")
        dtype, start = SAFETENSORS_DTYPES[entry["dtype"]], 8 + header_bytes + entry["data_offsets"][0]
        tensors[key] = StoredTensor(key, file, tuple(entry["shape"]), dtype, start, whole)
    return tensors


def _bin_tensors_of(file: Path, whole: WholeFile) -> dict[str, StoredTensor]:
    stored = {}
    for key, tensor in _torch_load(file, "meta").items():
        if not isinstance(tensor, torch.Tensor):
            raise ConversionError(f"{file}: {key} is a {type(tensor).__name__}, not a tensor: not a model's weights")
        # On the meta device newer torch releases note where a storage lies in a file (not in files from before 1.6).
        start = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
        if start is not None:
            start += tensor.storage_offset() * tensor.element_size()
        offset = start if tensor.is_contiguous() else None
        stored[key] = StoredTensor(key, file, tuple(tensor.shape), tensor.dtype, offset, whole)
    return stored


def _is_mappable(file: Path) -> bool:
    """Whether it has the zip layout of torch 1.6 and later, of which single tensors can be read."""
    with open(file, "rb") as opened:
        return opened.read(4) == b"PK\x03\x04"


def _torch_load(file: Path, device: str) -> dict[str, torch.Tensor]:
    mappable = _is_mappable(file)
    try:
        content = torch.load(file, map_location=device, mmap=mappable, weights_only=True)
    except Exception as error:  # torch raises a dozen types for a damaged file; all become one that names it
        code = re.search(r"(?:GLOBAL|class|callable) ([\w.]+)", str(error))
        if code:
            message = f"{file} is refused: reading it would run code ({code[1]}); only plain tensors are read"
        else:
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
            message = f"{file} is truncated or damaged ({reason[:120]}): download or copy it again"
        raise ConversionError(message) from error
    if not isinstance(content, dict):
        raise ConversionError(f"{file} holds a {type(content).__name__}, not tensors by name: not a model's weights")
    return content
