"""Answers as one file: JSON Lines, CSV or parquet, by its ending."""

import csv
import hashlib
import io
from collections.abc import Iterable
from typing import Any, BinaryIO

import pyarrow
import pyarrow.parquet

from m3_conversion.json_files import to_line


ENDINGS = (".jsonl", ".ndjson", ".csv", ".parquet")
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


class Measured(io.RawIOBase):
    """A file that is written to, and the SHA-256 of what was.

    Args:
        file: which stays open.
    """

    def __init__(self, file: BinaryIO):
        self.file, self.digest, self.size = file, hashlib.sha256(), 0

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        content = bytes(content)
        self.digest.update(content)
        self.size += len(content)
        self.file.write(content)
        return len(content)

    def tell(self) -> int:
        return self.size


def write_records(file: BinaryIO, ending: str, shards: Iterable[list[dict[str, Any]]]) -> int:
    """Writes records, shard by shard, as the ending says. Returns how many they are.

    CSV is that of RFC 4180 with a header, None an empty field; nothing is changed for programs that run formulas. JSON Lines
    alone can hold halves of surrogate pairs: elsewhere they become their escapes, as `\\ud800`.
    """
    count = 0
    if ending == ".parquet":
        with pyarrow.parquet.ParquetWriter(file, SCHEMA) as writer:
            for records in shards:
                writer.write_table(to_table(records))
                count += len(records)
        return count
    if ending == ".csv":
        file.write(_csv([list(TYPES)]))
    for records in shards:
        lines = map(to_line, records)
        rows = ([record[name] for name in TYPES] for record in records)
        file.write(_csv(rows) if ending == ".csv" else "".join(lines).encode())
        count += len(records)
    return count


def to_table(records: list[dict[str, Any]]) -> pyarrow.Table:
    columns = {name: [_utf8(record[name]) for record in records] for name in TYPES}
    return pyarrow.table({name: pyarrow.array(columns[name], TYPES[name]) for name in TYPES}, SCHEMA)


def _csv(rows: Iterable[list[Any]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue().encode(errors="backslashreplace")


def _utf8(value: Any) -> Any:
    return value.encode(errors="backslashreplace").decode() if isinstance(value, str) else value
