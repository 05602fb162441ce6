"""What `m3-batch` answers: pictures of a folder, or rows of JSONL and parquet files, local or behind any URL of fsspec.

Rows are read by shard, each anywhere: what is kept of the input is where its shards begin.
"""

import hashlib
import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any, BinaryIO

import fsspec
import pyarrow.parquet
from PIL import Image

from m3_conversion.json_files import iterate_lines, parse_line
from modeling_m3.questions import check_question, is_blank

from .batch_rows import FIELDS, Row, read_row


LINES, PARQUET = (".jsonl", ".ndjson"), (".parquet",)


@dataclass(frozen=True)
class Shard:
    """Rows `start` to `stop` of a part of the input; where they begin in its file."""

    part: int
    start: int
    stop: int
    offset: int = 0

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass
class Source:
    """The input.

    Attributes:
        parts: files of rows; of pictures of a folder, a list of their paths.
        question: of rows that have none.
        image_folder: what paths in rows are relative to; the file's own folder if None.
        shards: in order.
        fingerprint: of names and sizes: the same input has the same.
        left_out: files in folders that are no pictures.
    """

    parts: list[str | list[str]]
    question: str | None
    image_folder: str | None
    shards: list[Shard]
    fingerprint: str
    left_out: int = 0

    def rows(self, shard: Shard) -> list[Row]:
        """Those of a shard; what cannot be read as a row is one with an error."""
        part = self.parts[shard.part]
        if isinstance(part, list):
            return [Row(path, self.question or "", [path]) for path in part[shard.start : shard.stop]]
        if part.endswith(PARQUET):
            records = _parquet_records(part, shard)
        else:
            records = _json_records(part, shard)
        folder = self.image_folder or posixpath.dirname(part)
        names = [f"{posixpath.basename(part)}:{number}" for number in range(shard.start, shard.stop)]
        return [read_row(record, name, self.question, folder) for record, name in zip(records, names, strict=True)]


def read_source(inputs: Sequence[str], question: str | None, image_folder: str | None, shard_size: int) -> Source:
    """Looks through the input once.

    Args:
        inputs: folders, files, or patterns of them, as fsspec takes them.
        question: of rows that have none.
        image_folder: what paths in rows are relative to; the file's own folder by default.
        shard_size: rows of a shard, at most.

    Raises:
        ValueError: an input that is not there, is of another kind, or has nothing in it; a question without words.
    """
    if question is not None:
        if is_blank(question):
            raise ValueError(f"--question {question!r} is empty: write what to ask.")
        check_question(question, "--question")
    parts: list[str | list[str]] = []
    shards: list[Shard] = []
    left_out = 0
    digest = hashlib.sha256()
    for given in inputs:
        places = _expanded(given)
        pictures = [place for place in places if _is_picture(place)]
        for place in [place for place in places if not _is_picture(place)] + [pictures] * bool(pictures):
            part, found, others = _part(place, len(parts), shard_size, digest)
            if isinstance(part, list) and question is None:
                raise ValueError(f"--input {given} are pictures: say what to ask by --question.")
            parts.append(part)
            shards += found
            left_out += others
    if not shards:
        raise ValueError(f"--input {' '.join(inputs)} has no rows.")
    return Source(parts, question, image_folder, shards, digest.hexdigest(), left_out)


def _expanded(given: str) -> list[str]:
    files, root = fsspec.core.url_to_fs(given)
    if any(sign in given for sign in "*?["):
        found = sorted(files.glob(root))
    else:
        found = [root] if files.exists(root) else []
    if not found:
        raise ValueError(f"--input {given}: there is nothing.")
    return [files.unstrip_protocol(path) if "://" in given else path for path in found]


def _is_picture(place: str) -> bool:
    return posixpath.splitext(place)[1].lower() in Image.registered_extensions()


def _part(place: str | list[str], index: int, size: int, digest: Any) -> tuple[str | list[str], list[Shard], int]:
    """A file of rows, or pictures: those that are given, or those of a folder; its shards, and how many files are left out."""
    left_out = 0
    files, root = fsspec.core.url_to_fs(place if isinstance(place, str) else place[0])
    if isinstance(place, list) or files.isdir(root):
        if isinstance(place, list):
            paths = place
            sizes = {posixpath.basename(path): files.size(path) for path in paths}
        else:
            about = files.find(root, detail=True)
            found = sorted(path for path in about if _is_picture(path))
            left_out = len(about) - len(found)
            sizes = {path.removeprefix(root): about[path]["size"] for path in found}
            paths = [files.unstrip_protocol(path) if "://" in place else path for path in found]
        digest.update(repr(list(sizes.items())).encode())
        shards = [Shard(index, start, min(start + size, len(paths))) for start in range(0, len(paths), size)]
        return paths, shards, left_out
    digest.update(repr((posixpath.basename(place), files.size(root))).encode())
    if place.endswith(PARQUET):
        return place, _parquet_shards(place, index, size), 0
    if place.endswith(LINES):
        return place, _json_shards(place, index, size), 0
    raise ValueError(f"--input {place}: give a folder of pictures, or files {', '.join((*LINES, *PARQUET))}.")


def _json_shards(place: str, index: int, size: int) -> list[Shard]:
    shards, begin, rows, end = [], 0, 0, 0
    with fsspec.open(place, "rb") as file:
        try:
            for _, end, _ in iterate_lines(file):
                rows += 1
                if rows % size == 0:
                    shards.append(Shard(index, rows - size, rows, begin))
                    begin = end
        except ValueError as error:
            raise ValueError(f"--input {place}: {error}.") from None
    if rows % size:
        shards.append(Shard(index, rows - rows % size, rows, begin))
    return shards


def _json_records(place: str, shard: Shard) -> list[Any]:
    with fsspec.open(place, "rb") as file:
        records = list(map(_record, islice(_lines_from(file, shard.offset), len(shard))))
    if len(records) < len(shard):
        raise ValueError(f"{place} is shorter than it was when its rows were counted.")
    return records


def _lines_from(file: BinaryIO, offset: int) -> Iterator[bytes]:
    if not offset:
        return (line for _, _, line in iterate_lines(file))
    file.seek(offset)
    return (line for line in file if line.strip())


def _record(line: bytes) -> Any:
    """What is on a line; where that is not JSON, the line."""
    try:
        return parse_line(line)
    except ValueError:
        return line.decode("utf-8", "replace").strip()


def _parquet_shards(place: str, index: int, size: int) -> list[Shard]:
    """None reaches over two row groups, so that each is read from one."""
    with fsspec.open(place, "rb") as file:
        about, shards, first = pyarrow.parquet.ParquetFile(file).metadata, [], 0
        for group in range(about.num_row_groups):
            end = first + about.row_group(group).num_rows
            shards += [Shard(index, start, min(start + size, end), group) for start in range(first, end, size)]
            first = end
    return shards


def _parquet_records(place: str, shard: Shard) -> list[Any]:
    first, table = _row_group(place, shard.offset)
    rows = table.slice(shard.start - first, len(shard))
    if not table.num_columns:
        return [{}] * len(shard)
    try:
        return rows.to_pylist()
    except ValueError:  # of single cells, such as a text that is not UTF-8
        return [_cells(rows.slice(index, 1)) for index in range(len(shard))]


def _cells(row: Any) -> Any:
    """A row of a table; where it is none, why."""
    try:
        return row.to_pylist()[0]
    except ValueError as error:
        return str(error)


@lru_cache(maxsize=1)
def _row_group(place: str, group: int) -> tuple[int, Any]:
    """The number of its first row, and the row group."""
    with fsspec.open(place, "rb") as file:
        content = pyarrow.parquet.ParquetFile(file)
        first = sum(content.metadata.row_group(before).num_rows for before in range(group))
        columns = [name for name in FIELDS if name in content.schema_arrow.names]
        return first, content.read_row_group(group, columns=columns)
