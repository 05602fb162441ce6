"""What was answered so far in one task, on disk after every batch: a run that was stopped goes on from there.

A batch is written in one piece, and read back whole or not at all, so that batches are made up the same again.
"""

import logging
import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from m3_conversion.json_files import add_line, read_added_lines
from m3_conversion.whole_files import replacing


logger = logging.getLogger(__name__)


class Record:
    """Results by request, in memory and in a file with one line per batch.

    Args:
        file: where lines are added, "answers.0.jsonl" of process 0. What other processes wrote beside it is read too.
    """

    def __init__(self, file: Path):
        file.parent.mkdir(parents=True, exist_ok=True)
        self.file, self.results = file, {}
        self._damaged: set[tuple[Path, int]] = set()
        self.refresh()

    def refresh(self) -> None:
        """Reads what all processes wrote. A line that is damaged, or has no end, is not there: its questions are missing."""
        for file in sorted(self.file.parent.glob(f"{self.file.name.split('.')[0]}.*{self.file.suffix}")):
            damaged = partial(self._warn, file)
            for number, batch in read_added_lines(file, damaged):
                if isinstance(batch, dict):
                    self.results.update(batch)
                else:
                    damaged(number, "it is no batch")

    def missing(self, keys: Iterable[str]) -> bool:
        return not all(key in self.results for key in keys)

    def add(self, batch: dict[str, Any]) -> None:
        add_line(self.file, batch)
        self.results.update(batch)

    def _warn(self, file: Path, number: int, reason: object) -> None:
        """Once, by process 0: the others read the same files."""
        if (file, number) not in self._damaged and self.file.suffixes[-2:-1] == [".0"]:
            logger.warning("%s, line %d is damaged (%s): its questions are asked again", file, number, reason)
        self._damaged.add((file, number))


def add_thumbnail(folder: Path, picture: Any, name: str, edge: int = 320) -> str:
    """Stores a small copy of a picture in a run folder; returns its place in it."""
    file = _pictures(folder) / f"{name}.jpg"
    if not file.exists():
        small = picture.convert("RGB")
        small.thumbnail((edge, edge))
        with replacing(file, mark=f".{os.getpid()}") as part:
            small.save(part, "JPEG", quality=85)
    return f"{file.parent.name}/{file.name}"


def remove_unfinished_thumbnails(folder: Path) -> None:
    """Removes what processes that were killed left, before others add some."""
    for part in _pictures(folder).glob(".*"):
        part.unlink()


def _pictures(folder: Path) -> Path:
    return folder / "pictures"
