"""One row of `m3-batch`, as data sets and tools write them: a question and its pictures, or what is wrong with it."""

import io
import posixpath
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import fsspec
from PIL import Image, UnidentifiedImageError

from m3_conversion.written_numbers import is_missing, parse_number
from modeling_m3.questions import check_question, is_blank


FIELDS = ("id", "question", "image", "num_visual_tokens")
PLACES = ("bytes", "path", "url", "image")  # where an entry of "image" may hold its picture: the first that is there
NO_IMAGE = 'There is no "image": give a path, a list of them, or [] for a question about no picture.'


@dataclass
class Row:
    """One question about pictures, or about none, or why there is none.

    Attributes:
        id: what the input calls it; else the name of its picture, or its file and number.
        question: to ask.
        pictures: as the input names them, or their bytes.
        num_visual_tokens: per tile, or "auto"; None where the row names none.
        error: what is wrong with it.
        numbers: of single pictures, before the row's, None of those without; empty where none has one.
    """

    id: str
    question: str = ""
    pictures: list[Any] = field(default_factory=list)
    num_visual_tokens: int | str | None = None
    error: str | None = None
    numbers: list[int | str | None] = field(default_factory=list)

    def opened(self) -> list[Image.Image]:
        """Its pictures, read and in RGB. Raises `ValueError` or `OSError` for one that is missing, or none."""
        return [_opened(picture) for picture in self.pictures]


def read_row(record: Any, name: str, question: str | None, folder: str) -> Row:
    """The row of a record; one with an error where it is none.

    Args:
        name: of a row without "id".
        question: of a row without "question".
        folder: what paths are relative to.
    """
    if not isinstance(record, dict):
        return Row(name, error=f"Not an object of JSON: {str(record)[:200]}")
    given = {key: None if is_missing(record.get(key)) else record[key] for key in FIELDS}
    row = Row(name if given["id"] is None else _text(given["id"]))
    row.question = (question or "") if given["question"] is None else _text(given["question"])
    try:
        row.pictures, row.numbers = _pictures(given["image"], folder)
        row.num_visual_tokens = parse_number(given["num_visual_tokens"])
        _check_question(row.question, given["question"])
    except ValueError as error:
        row.error = str(error)
    return row


def _text(value: Any) -> str:
    """Whole numbers that are floats, as in columns where some are missing, as they were."""
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


def _check_question(question: str, given: Any) -> None:
    if isinstance(given, (bytes, list, dict)):
        raise ValueError(f'The "question" is no text: {question[:80]}')
    if given is None and not question:
        raise ValueError('There is no "question", and no --question.')
    if is_blank(question):
        raise ValueError('The "question" is empty.')
    check_question(question, 'The "question"')


def _pictures(given: Any, folder: str) -> tuple[list[Any], list[int | str | None]]:
    if given is None:
        raise ValueError(NO_IMAGE)
    found = [_picture(entry, folder) for entry in (given if isinstance(given, (list, tuple)) else [given])]
    return [picture for picture, _ in found], [number for _, number in found]


def _picture(entry: Any, folder: str) -> tuple[str | bytes, int | str | None]:
    """Where a picture is, or its bytes, and its own number of visual tokens."""
    number = None
    if isinstance(entry, Mapping):
        kind = entry.get("type", "image")
        if unknown := [str(key) for key in entry if key not in (*PLACES, "type", "num_visual_tokens")]:
            raise ValueError(f'An "image" has {", ".join(unknown)}: give {", ".join(PLACES)} or num_visual_tokens.')
        if not is_missing(kind) and kind != "image":
            raise ValueError(f'An "image" has the type {str(kind)[:80]!r}: rows have pictures alone.')
        number = parse_number(entry.get("num_visual_tokens"))
        places = (key for key in PLACES if not is_missing(entry.get(key)))
        place = next(places, "path")
        entry = entry.get(place)
        if place == "bytes" and not isinstance(entry, (bytes, bytearray)):
            raise ValueError(f"{str(entry)[:80]!r} are no bytes of a file: give its path, or a data URI as one.")
    if is_missing(entry) or entry == "":
        raise ValueError(NO_IMAGE)
    if isinstance(entry, (bytes, bytearray)):
        return bytes(entry), number
    if not isinstance(entry, str):
        raise ValueError(f"{str(entry)[:80]!r} is no picture: give a path or the bytes of a file.")
    return (entry if "://" in entry or _is_data(entry) else posixpath.join(folder, entry)), number


def _is_data(place: str) -> bool:
    return place[:5].lower() == "data:"


def _opened(picture: str | bytes) -> Image.Image:
    name, content = "The picture", picture
    if isinstance(picture, str) and _is_data(picture):
        try:
            content = urlopen(picture).read()
        except (ValueError, URLError) as error:
            raise ValueError(f"The picture is a data URI that cannot be read: {error}.") from error
    elif isinstance(picture, str):
        name = picture
        try:
            with fsspec.open(picture, "rb") as file:
                content = file.read()
        except FileNotFoundError:
            raise ValueError(f"There is no picture {picture}.") from None
    try:
        return Image.open(io.BytesIO(content)).convert("RGB")
    except UnidentifiedImageError:
        raise ValueError(f"{name} is not a picture that PIL can open.") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name} cannot be read: {error}.") from error
