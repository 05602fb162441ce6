"""What `m3-batch` writes: a parquet file per shard of the input, whole or not there, and what was asked beside them.

OUTPUT/batch.json             what was asked of which checkpoint; the same command goes on with it
OUTPUT/answers-000000.parquet the answers to the first rows, one row each, in the input's order
"""

import contextlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import astuple, fields
from typing import Any

import fsspec
import pyarrow
import pyarrow.parquet
from filelock import FileLock, Timeout

from .batch_engines import Result
from .batch_input import Row


TYPES = {
    "id": pyarrow.string(),
    "question": pyarrow.string(),
    "answer": pyarrow.string(),
    "num_visual_tokens": pyarrow.int32(),
    "visual_tokens": pyarrow.int32(),
    "prompt_tokens": pyarrow.int32(),
    "answer_tokens": pyarrow.int32(),
    "finish_reason": pyarrow.string(),
    "error": pyarrow.string(),
}
SCHEMA = pyarrow.schema(list(TYPES.items()))
NAMES = [entry.name for entry in fields(Result)]


class Output:
    """A folder of answers.

    Args:
        place: a path, or a URL of fsspec.
    """

    def __init__(self, place: str):
        self.place = place
        self.files, self.root = fsspec.core.url_to_fs(place)
        self.is_local = "file" in (
            self.files.protocol if isinstance(self.files.protocol, tuple) else (self.files.protocol,)
        )

    @contextlib.contextmanager
    def used_alone(self) -> Iterator[None]:
        """Raises `ValueError` where another process of this machine writes to the folder."""
        if not self.is_local:
            yield
            return
        os.makedirs(self.root, exist_ok=True)
        lock = FileLock(f"{self.root}/.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(f"--output {self.place}: another m3-batch writes to it.") from None
        try:
            yield
        finally:
            lock.release()

    def begin(self, about: dict[str, Any]) -> None:
        """Writes what is asked; where something was asked before, it must have been the same.

        Raises:
            ValueError: the folder has other files, or answers to something else.
        """
        file = f"{self.root}/batch.json"
        if self.files.exists(file):
            before = json.loads(self.files.cat_file(file))
            for name, value in about.items():
                if before.get(name) != value:
                    raise ValueError(
                        f"--output {self.place} holds answers with {name} {before.get(name)}, not {value}: give another folder."
                    )
            return
        found = self.files.ls(self.root, detail=False) if self.files.exists(self.root) else []
        if any(os.path.basename(path) != ".lock" for path in found):
            raise ValueError(f"--output {self.place} has other files: give a new folder.")
        self._write(file, (json.dumps(about, indent=1) + "\n").encode())

    def done(self) -> set[int]:
        """The numbers of the shards that are there."""
        names = (os.path.basename(path) for path in self.files.ls(self.root, detail=False, refresh=True))
        return {int(name[8:-8]) for name in names if name.startswith("answers-") and name.endswith(".parquet")}

    def write(self, number: int, rows: Sequence[Row], results: Sequence[Result]) -> None:
        """A shard, in one piece."""
        columns = dict(zip(NAMES, map(list, zip(*map(astuple, results)))))
        columns |= {"id": [row.id for row in rows], "question": [row.question for row in rows]}
        table = pyarrow.table({name: pyarrow.array(columns[name], TYPES[name]) for name in TYPES}, SCHEMA)
        buffer = io.BytesIO()
        pyarrow.parquet.write_table(table, buffer)
        self._write(f"{self.root}/answers-{number:06}.parquet", buffer.getvalue())

    def _write(self, file: str, content: bytes) -> None:
        if not self.is_local:
            self.files.pipe_file(file, content)  # which object stores do in one piece
            return
        os.makedirs(self.root, exist_ok=True)
        part = f"{file}.part"
        with open(part, "wb") as target:
            target.write(content)
            target.flush()
            os.fsync(target.fileno())
        os.replace(part, file)
