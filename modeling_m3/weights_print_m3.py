# Copyright 2026 The M3 for Hugging Face authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""A print of weights, which tells whether they are those that something was fitted on.

It is equal for equal weights however they are stored, in shards or in one file, in float32 or rounded to bfloat16, and another
one after training. Of large tensors blocks are read, so that 14 GB take no longer than some megabytes.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME


FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
WHOLE = 2**19  # values of a tensor that is read whole: 1 MiB of bfloat16
BLOCKS, BLOCK = 16, 2**11  # of a larger one, evenly spaced, so many values each


class StoredWeights:
    """The weights that a model was loaded from, whose print is computed when it is first asked for."""

    def __init__(self, files: list[Path]):
        self._states = {file: _state_of(file) for file in files}
        self._print: str | None = None

    def print(self) -> str | None:
        """Of what was loaded; None where that cannot be told any more, as the files are gone or have been written anew."""
        if self._print is None and self._states and all(_state_of(file) == was for file, was in self._states.items()):
            self._print = _print_of_files(list(self._states))
        return self._print


def weight_files(folder: Path) -> list[Path]:
    """The files of weights in safetensors that `from_pretrained` reads; none where there are others alone."""
    single, index = folder / SAFE_WEIGHTS_NAME, folder / SAFE_WEIGHTS_INDEX_NAME
    if single.is_file() or not index.is_file():
        return [single] if single.is_file() else []
    return [folder / name for name in sorted(set(json.loads(index.read_bytes())["weight_map"].values()))]


def print_of_folder(folder: str | os.PathLike) -> str | None:
    """The print of the weights that a folder stores, 64 hexadecimal digits; None where it has none in safetensors.

    Names, shapes and values count, rounded to bfloat16; integers, as quantized weights have them, as they are.
    """
    files = weight_files(Path(folder))
    return _print_of_files(files) if files else None


def print_of_tensors(tensors: Mapping[str, Any]) -> str | None:
    """The print of what is in memory, types and all; None where not all of it is, or not as plain tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        # Where it is offloaded there are no values, and what wraps parts (`DTensor`) has those of other processes too.
        if not isinstance(tensor, torch.Tensor) or tensor.is_meta or hasattr(tensor, "__tensor_flatten__"):
            return None
        values = tensor.detach().flatten()
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}\n".encode())
        read = torch.cat([values[begin:end] for begin, end in _blocks(len(values))])
        digest.update(read.view(torch.uint8).cpu().numpy())
    return digest.hexdigest()


def _print_of_files(files: list[Path]) -> str:
    """Reads each block by itself: a file that is mapped would be read ahead, a hundred times as much."""
    with ExitStack() as stack:
        found = {}
        for file in files:
            content = stack.enter_context(open(file, "rb", buffering=0))
            length = int.from_bytes(content.read(8), "little")
            tensors = json.loads(content.read(length))
            found |= {name: (content, 8 + length, entry) for name, entry in tensors.items() if name != "__metadata__"}
        digest = hashlib.sha256()
        for name, (content, start, entry) in sorted(found.items()):
            first, last = entry["data_offsets"]
            dtype = FLOATS.get(entry["dtype"])
            size, read = 1 if dtype is None else dtype.itemsize, bytearray()
            for begin, end in _blocks((last - first) // size):
                content.seek(start + first + begin * size)
                read += content.read((end - begin) * size)
            digest.update(f"{name} {entry['shape']} {entry['dtype'] if dtype is None else ''}\n".encode())
            if dtype is None or not read:
                digest.update(read)
            else:
                digest.update(torch.frombuffer(read, dtype=dtype).bfloat16().view(torch.uint8).numpy())
    return digest.hexdigest()


def _blocks(count: int) -> list[tuple[int, int]]:
    """Which of so many values are read: all, or the first, the last and others between them."""
    if count <= WHOLE:
        return [(0, count)]
    begins = [i * (count - BLOCK) // (BLOCKS - 1) for i in range(BLOCKS)]
    return [(begin, begin + BLOCK) for begin in begins]


def _state_of(file: Path) -> tuple[int, ...] | None:
    """What changes with a file's content, without reading it."""
    state = file.stat() if file.is_file() else None
    return state and (state.st_size, state.st_mtime_ns, state.st_ino)
