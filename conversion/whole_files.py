"""Files that are whole or not there, whatever ends the process that writes them. Imports nothing that takes time."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


LOCK = ".lock"


@contextmanager
def replacing(file: Path, mark: str = "") -> Iterator[Path]:
    """A name beside `file` to write to; at the end of the block, what was written there becomes `file`.

    An error leaves what was there. A process that is killed leaves its part too, until the next one writes to it.

    Args:
        file: what is to appear.
        mark: of this process, where several may write the same file at once.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    part = part_of(file, mark)
    try:
        yield part
        with part.open("r+b") as written:
            os.fsync(written.fileno())
        os.replace(part, file)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


@contextmanager
def used_alone(folder: Path, by: str) -> Iterator[None]:
    """Keeps other processes of this machine from a folder that is there, by a lock in it, until the end of the block.

    Raises:
        ValueError: one has it; `by` says what kind of process, as "m3-eval".
    """
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"{folder}: another {by} writes to it. Wait for its end, or name another folder.") from None
    try:
        yield
    finally:
        lock.release()


def write_text(file: Path, text: str) -> None:
    """Writes a file in UTF-8 that is whole or not there, its lines ended by line feeds.

    Halves of surrogate pairs, which JSON can name and UTF-8 cannot hold, are written as JSON does.
    """
    with replacing(file) as part:
        part.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")


def part_of(file: Path, mark: str = "") -> Path:
    """Where `replacing` writes."""
    return file.with_name(f".{file.name}{mark}.part")
