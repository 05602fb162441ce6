"""What was answered so far in one task, on disk after every batch: a run that was stopped goes on from there.

A batch is written in one piece, and read back whole or not at all, so that batches are made up the same again.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class Record:
    """Results by request, in memory and in a file with one line per batch.

    Args:
        file: where lines are added, "answers.0.jsonl" of process 0. What other processes wrote beside it is read too.
    """

    def __init__(self, file: Path):
        file.parent.mkdir(parents=True, exist_ok=True)
        self.file, self.results = file, {}
        self._drop_unfinished_line()
        self.refresh()

    def refresh(self) -> None:
        """Reads what all processes wrote."""
        for file in sorted(self.file.parent.glob(f"{self.file.name.split('.')[0]}.*{self.file.suffix}")):
            for line in file.read_text(encoding="utf-8").splitlines():
                self.results.update(json.loads(line))

    def missing(self, keys: Iterable[str]) -> bool:
        return not all(key in self.results for key in keys)

    def add(self, batch: dict[str, Any]) -> None:
        with self.file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(batch, ensure_ascii=False) + "\n")
            lines.flush()
            os.fsync(lines.fileno())
        self.results.update(batch)

    def _drop_unfinished_line(self) -> None:
        if not self.file.exists():
            return
        content = self.file.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.truncate(self.file, len(whole))


def add_thumbnail(folder: Path, picture: Any, name: str, edge: int = 320) -> str:
    """Stores a small copy of a picture in a run folder; returns its place in it."""
    file = folder / "pictures" / f"{name}.jpg"
    if not file.exists():
        file.parent.mkdir(exist_ok=True)
        small = picture.convert("RGB")
        small.thumbnail((edge, edge))
        part = file.with_name(f".{os.getpid()}-{file.name}")
        small.save(part, "JPEG", quality=85)
        os.replace(part, file)
    return f"pictures/{file.name}"
