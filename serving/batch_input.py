"""What `m3-batch` answers: pictures of a folder, or rows of JSONL and parquet files, local or behind any URL of fsspec.

Rows are read by shard, each anywhere: what is kept of the input is where its shards begin.
"""

import hashlib
import io
import json
import posixpath
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import fsspec
import pyarrow.parquet
from PIL import Image, UnidentifiedImageError


LINES, PARQUET = (".jsonl", ".ndjson"), (".parquet",)
FIELDS = ("id", "question", "image", "num_visual_tokens")


@dataclass
class Row:
    """One question about pictures, or why there is none.

    Attributes:
        id: what the input calls it; else the name of its picture, or its file and number.
        question: to ask.
        pictures: as the input names them, or their bytes.
        num_visual_tokens: per tile, or "auto"; None where the row names none.
        error: what is wrong with it.
    """

    id: str
    question: str = ""
    pictures: list[Any] = field(default_factory=list)
    num_visual_tokens: int | str | None = None
    error: str | None = None

    def opened(self) -> list[Image.Image]:
        """Its pictures, read and in RGB. Raises `ValueError` or `OSError` for one that is missing, or none."""
        return [_opened(picture) for picture in self.pictures]


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
    """

    parts: list[str | list[str]]
    question: str | None
    image_folder: str | None
    shards: list[Shard]
    fingerprint: str

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
        return [self._row(record, name, folder) for record, name in zip(records, names)]

    def _row(self, record: Any, name: str, folder: str) -> Row:
        if not isinstance(record, dict):
            return Row(name, error=f"Not an object of JSON: {str(record)[:200]}")
        row = Row(str(name if record.get("id") is None else record["id"]))
        question, given = record.get("question"), record.get("image")
        number = record.get("num_visual_tokens")
        row.question = self.question or "" if question is None else str(question)
        row.pictures = [_placed(one, folder) for one in (given if isinstance(given, list) else [given])]
        row.num_visual_tokens = int(number) if isinstance(number, float) and number.is_integer() else number
        if given is None or None in row.pictures:
            row.error = 'There is no "image": give a path, or a list of paths.'
        elif not row.question:
            row.error = 'There is no "question", and no --question.'
        return row


def read_source(inputs: Sequence[str], question: str | None, image_folder: str | None, shard_size: int) -> Source:
    """Looks through the input once.

    Args:
        inputs: folders, files, or patterns of them, as fsspec takes them.
        question: of rows that have none.
        image_folder: what paths in rows are relative to; the file's own folder by default.
        shard_size: rows of a shard, at most.

    Raises:
        ValueError: an input that is not there, is of another kind, or has nothing in it.
    """
    parts: list[str | list[str]] = []
    shards: list[Shard] = []
    digest = hashlib.sha256()
    for given in inputs:
        places = _expanded(given)
        pictures = [place for place in places if _is_picture(place)]
        for place in [place for place in places if not _is_picture(place)] + [pictures] * bool(pictures):
            part, found = _part(place, len(parts), shard_size, digest)
            if isinstance(part, list) and question is None:
                raise ValueError(f"--input {given} are pictures: say what to ask by --question.")
            parts.append(part)
            shards += found
    if not shards:
        raise ValueError(f"--input {' '.join(inputs)} has no rows.")
    return Source(parts, question, image_folder, shards, digest.hexdigest())


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


def _part(place: str | list[str], index: int, size: int, digest: Any) -> tuple[str | list[str], list[Shard]]:
    """A file of rows, or pictures: those that are given, or those of a folder."""
    files, root = fsspec.core.url_to_fs(place if isinstance(place, str) else place[0])
    if isinstance(place, list) or files.isdir(root):
        if isinstance(place, list):
            paths = place
            sizes = {posixpath.basename(path): files.size(path) for path in paths}
        else:
            about = files.find(root, detail=True)
            found = sorted(path for path in about if _is_picture(path))
            sizes = {path.removeprefix(root): about[path]["size"] for path in found}
            paths = [files.unstrip_protocol(path) if "://" in place else path for path in found]
        digest.update(repr(list(sizes.items())).encode())
        return paths, [Shard(index, start, min(start + size, len(paths))) for start in range(0, len(paths), size)]
    digest.update(repr((posixpath.basename(place), files.size(root))).encode())
    if place.endswith(PARQUET):
        return place, _parquet_shards(place, index, size)
    if place.endswith(LINES):
        return place, _json_shards(place, index, size)
    raise ValueError(f"--input {place}: give a folder of pictures, or files {', '.join((*LINES, *PARQUET))}.")


def _json_shards(place: str, index: int, size: int) -> list[Shard]:
    """Lines with nothing on them are none."""
    shards, begin, rows, offset = [], 0, 0, 0
    with fsspec.open(place, "rb") as lines:
        for line in lines:
            offset += len(line)
            rows += bool(line.strip())
            if line.strip() and rows % size == 0:
                shards.append(Shard(index, rows - size, rows, begin))
                begin = offset
    if rows % size:
        shards.append(Shard(index, rows - rows % size, rows, begin))
    return shards


def _json_records(place: str, shard: Shard) -> list[Any]:
    records: list[Any] = []
    with fsspec.open(place, "rb") as lines:
        lines.seek(shard.offset)
        while len(records) < len(shard):
            if not (line := lines.readline()).strip():
                if not line:
                    raise ValueError(f"{place} is shorter than it was when its rows were counted.")
                continue
            try:
                records.append(json.loads(line))
            except ValueError:
                records.append(line.decode("utf-8", "replace").strip())
    return records


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
    return table.slice(shard.start - first, len(shard)).to_pylist()


@lru_cache(maxsize=1)
def _row_group(place: str, group: int) -> tuple[int, Any]:
    """The number of its first row, and the row group."""
    with fsspec.open(place, "rb") as file:
        content = pyarrow.parquet.ParquetFile(file)
        first = sum(content.metadata.row_group(before).num_rows for before in range(group))
        columns = [name for name in FIELDS if name in content.schema_arrow.names]
        return first, content.read_row_group(group, columns=columns)


def _placed(picture: Any, folder: str) -> Any:
    if isinstance(picture, dict):  # as data sets hold pictures
        picture = picture.get("path") if picture.get("bytes") is None else picture["bytes"]
    if not isinstance(picture, str) or "://" in picture:
        return picture
    return posixpath.join(folder, picture)


def _opened(picture: Any) -> Image.Image:
    if isinstance(picture, str):
        try:
            with fsspec.open(picture, "rb") as file:
                content = file.read()
        except FileNotFoundError:
            raise ValueError(f"There is no picture {picture}.") from None
    elif isinstance(picture, bytes):
        content = picture
    else:
        raise ValueError(f"{str(picture)[:80]!r} is no picture: give a path or the bytes of a file.")
    name = picture if isinstance(picture, str) else "The picture"
    try:
        return Image.open(io.BytesIO(content)).convert("RGB")
    except UnidentifiedImageError:
        raise ValueError(f"{name} is not a picture that PIL can open.") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name} cannot be read: {error}.") from error
