"""What `m3-batch` writes: shards of answers, each whole or not there, what was asked beside them, and maybe one file of all.

OUTPUT/batch.json             what was asked of which checkpoint; the same command goes on with it
OUTPUT/answers-000000.parquet the answers to the first rows, one row each, in the input's order

Where OUTPUT ends in .jsonl, .csv or .parquet it is a file, and OUTPUT.parts holds batch.json and shards in JSON Lines until it
appears. From then on .OUTPUT.batch.json says what it answers, and which bytes it has.
"""

import contextlib
import hashlib
import io
import json
import os
import posixpath
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import fsspec
import pyarrow
import pyarrow.parquet
from filelock import FileLock, Timeout

from m3_conversion.json_files import iterate_lines, parse_line, to_line

from .batch_engines import Result
from .batch_files import ENDINGS, TYPES, Measured, to_table, write_records
from .batch_rows import Row


READERS = 8  # threads that look into the shards of before
LEFTOVER = re.compile(r"(batch\.json|answers-\d+\.(parquet|jsonl))\.part")


class Output:
    """A folder of answers, or a file.

    Args:
        place: a path, or a URL of fsspec.
    """

    def __init__(self, place: str):
        self.place = place
        self.files, self.root = fsspec.core.url_to_fs(place)
        protocols = self.files.protocol if isinstance(self.files.protocol, tuple) else (self.files.protocol,)
        self.is_local = "file" in protocols
        self.file, self.shard_ending = None, "parquet"
        is_file = posixpath.splitext(place)[1].lower() in ENDINGS  # not of a place that ends in /
        if is_file and not self.files.isdir(self.root):
            folder, name = posixpath.split(self.root)
            self.file, self.record = self.root, posixpath.join(folder, f".{name}.batch.json")
            self.unfinished = posixpath.join(folder, f".{name}.part")
            self.root, self.shard_ending = f"{self.root}.parts", "jsonl"

    @contextlib.contextmanager
    def used_alone(self) -> Iterator[None]:
        """Raises `ValueError` where another process of this machine writes to it."""
        if not self.is_local:
            yield
            return
        os.makedirs(self.root, exist_ok=True)
        was_there = os.path.exists(f"{self.root}/.lock")
        lock = FileLock(f"{self.root}/.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(f"--output {self.place}: another m3-batch writes to it.") from None
        try:
            yield
        finally:
            if not os.path.exists(f"{self.root}/batch.json") and (self.file or not was_there):  # nothing else is ours
                with contextlib.suppress(OSError):  # others' files are
                    os.remove(f"{self.root}/.lock")
                    os.rmdir(self.root)
            lock.release()

    def begin(self, about: dict[str, Any]) -> dict[str, Any] | None:
        """Writes what is asked; where something was asked before, it must have been the same.

        Returns:
            Of a file that is finished, what is known of it: `rows`, and how many of them `failed`.

        Raises:
            ValueError: other files are there, or answers to something else.
        """
        self.files.invalidate_cache()
        if self.file and self.files.exists(self.file):
            finished = self._known(self.record)
            if finished is None or finished.get("sha256") != self._digest():
                raise ValueError(f"--output {self.place} exists, and is not what this command wrote: give a new name.")
            self._check_asked(finished, about)
            self._clear()
            return finished
        for path in self._there():
            if LEFTOVER.fullmatch(posixpath.basename(path)):  # of a process that was killed
                self.files.rm_file(path)
        before = self._known(f"{self.root}/batch.json")
        if before is not None:
            self._check_asked(before, about)
        elif any(posixpath.basename(path) != ".lock" for path in self._there()):
            which = f"--output {self.place}: {self.root}" if self.file else f"--output {self.place}"
            raise ValueError(f"{which} has other files: give a new {'name' if self.file else 'folder'}.")
        else:
            self._write(f"{self.root}/batch.json", (json.dumps(about, indent=1) + "\n").encode())
        return None

    def done(self, lengths: Sequence[int]) -> dict[int, int]:
        """The numbers of the shards that are there, and how many of their rows failed.

        Args:
            lengths: how many rows each shard has. One with others, or that cannot be read, is not there.
        """
        there = {posixpath.basename(path) for path in self._there()}
        numbers = [number for number in range(len(lengths)) if posixpath.basename(self._shard(number)) in there]
        with ThreadPoolExecutor(READERS) as readers:
            found = dict(zip(numbers, readers.map(self._errors, numbers)))
        return {
            number: sum(error is not None for error in errors)
            for number, errors in found.items()
            if errors is not None and len(errors) == lengths[number]
        }

    def write(self, number: int, rows: Sequence[Row], results: Sequence[Result]) -> int:
        """A shard, in one piece. Returns how many of its rows failed."""
        records = [
            {"id": row.id, "question": row.question, **asdict(result)}
            for row, result in zip(rows, results, strict=True)
        ]
        records = [{name: record[name] for name in TYPES} for record in records]
        if self.file:
            content = "".join(map(to_line, records)).encode()
        else:
            buffer = io.BytesIO()
            pyarrow.parquet.write_table(to_table(records), buffer)
            content = buffer.getvalue()
        self._write(self._shard(number), content)
        return sum(result.error is not None for result in results)

    def finish(self, about: dict[str, Any], shards: int, failed: int) -> None:
        """Writes the file of all shards, and removes them; nothing to do for a folder.

        Raises:
            ValueError: a file of that name has appeared meanwhile.
        """
        if not self.file:
            return
        try:
            with self.files.open(self.unfinished, "wb") as file:
                measured = Measured(file)
                rows = write_records(
                    measured, posixpath.splitext(self.file)[1].lower(), map(self._records, range(shards))
                )
                if self.is_local:
                    file.flush()
                    os.fsync(file.fileno())
            known = {**about, "rows": rows, "failed": failed, "sha256": measured.digest.hexdigest()}
            self._write(self.record, (json.dumps(known, indent=1) + "\n").encode())
            self._name_unfinished()
        except BaseException:
            if self.files.exists(self.unfinished):
                self.files.rm_file(self.unfinished)
            raise
        self._clear()

    def _name_unfinished(self) -> None:
        """Gives the whole file its name, unless something has it."""
        self.files.invalidate_cache()
        try:
            if self.is_local:
                os.link(self.unfinished, self.file)  # which replaces nothing
                os.remove(self.unfinished)
                return
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            if not os.path.exists(self.file):
                os.replace(self.unfinished, self.file)
                return
        if self.files.exists(self.file):
            raise ValueError(f"--output {self.place} has appeared meanwhile, and is not replaced: move it away.")
        self.files.mv(self.unfinished, self.file)

    def _clear(self) -> None:
        """Removes what only an unfinished file needs; what is asked at last, so that a kill leaves nothing unknown."""
        known = re.compile(r"answers-\d+\.jsonl(\.part)?|batch\.json\.part")
        ours = [path for path in self._there() if known.fullmatch(posixpath.basename(path))]
        for path in [*ours, self.unfinished, f"{self.root}/batch.json"]:
            if self.files.exists(path):
                self.files.rm_file(path)

    def _shard(self, number: int) -> str:
        return f"{self.root}/answers-{number:06}.{self.shard_ending}"

    def _records(self, number: int) -> list[dict[str, Any]]:
        content = self.files.cat_file(self._shard(number))
        return [parse_line(line) for _, _, line in iterate_lines(io.BytesIO(content))]

    def _errors(self, number: int) -> list[str | None] | None:
        """Of the rows of a shard; None where it is not whole, or no shard."""
        content = self.files.cat_file(self._shard(number))
        try:
            if self.file:
                return [parse_line(line)["error"] for _, _, line in iterate_lines(io.BytesIO(content))]
            return pyarrow.parquet.read_table(io.BytesIO(content), columns=["error"])["error"].to_pylist()
        except (ValueError, OSError, KeyError, TypeError):  # pyarrow's errors are the first two
            return None

    def _there(self) -> list[str]:
        try:
            return self.files.ls(self.root, detail=False, refresh=True)
        except FileNotFoundError:  # object stores have no empty folders
            return []

    def _known(self, file: str) -> dict[str, Any] | None:
        """What a file says was asked; None where there is none."""
        if not self.files.exists(file):
            return None
        try:
            known = parse_line(self.files.cat_file(file))
        except ValueError as error:
            raise ValueError(f"--output {self.place}: {file} is not valid JSON: {error}.") from error
        if not isinstance(known, dict):
            raise ValueError(f"--output {self.place}: {file} does not say what was asked.")
        return known

    def _check_asked(self, before: dict[str, Any], about: dict[str, Any]) -> None:
        before = {"image_folder": about.get("image_folder"), **before}  # runs of before it was told
        for name, value in about.items():
            if before.get(name) != value:
                raise ValueError(
                    f"--output {self.place} holds answers with {name} {before.get(name)}, not {value}: give another "
                    f"{'file' if self.file else 'folder'}."
                )

    def _digest(self) -> str:
        with self.files.open(self.file, "rb") as content:
            digest = hashlib.sha256()
            while block := content.read(2**20):
                digest.update(block)
        return digest.hexdigest()

    def _write(self, file: str, content: bytes) -> None:
        if not self.is_local:
            self.files.pipe_file(file, content)  # which object stores do in one piece
            return
        os.makedirs(posixpath.dirname(file) or ".", exist_ok=True)
        part = f"{file}.part"
        try:
            with open(part, "wb") as target:
                target.write(content)
                target.flush()
                os.fsync(target.fileno())
            os.replace(part, file)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.remove(part)
            raise
