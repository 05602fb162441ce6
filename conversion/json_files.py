"""JSON and JSON Lines: the one reader and the one writer of the project. Imports nothing that takes time.

A line ends at a line feed and nowhere else: JSON allows U+2028, U+2029 and U+0085 in a string, which other programs take for
ends of lines too, so what is written here holds them escaped. A byte-order mark at the start of a file is no part of it.
"""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from .whole_files import replacing


# Ends of lines to `str.splitlines` that JSON does not escape itself, and halves of surrogate pairs, which UTF-8 cannot hold.
_ESCAPED = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def read_json(file: str | Path) -> Any:
    """The content of a JSON file in UTF-8, UTF-16 or UTF-32.

    Raises:
        ValueError: for one that is not there, is not JSON or is nested too deep; it names the file.
    """
    file = Path(file)
    if not file.is_file():
        raise ValueError(f"There is no file {file}.")
    try:
        return _parsed(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}.") from error


def read_json_lines(file: str | Path) -> Iterator[tuple[int, Any]]:
    """The numbers of a file's lines, from 1, and what is on them; blank ones are left out.

    Raises:
        ValueError: there is no such file, or a line is not JSON; its number is given.
    """
    file = Path(file)
    if not file.is_file():
        raise ValueError(f"There is no file {file}.")
    with file.open("rb") as lines:
        yield from _values(lines, file)


def iterate_lines(opened: BinaryIO) -> Iterator[tuple[int, int, bytes]]:
    """The number of each line that is not blank, from 1, where the next line begins in bytes, and its bytes.

    Args:
        opened: a file at its start, in binary.

    Raises:
        ValueError: the file is in UTF-16 or UTF-32, whose lines end otherwise.
    """
    end = 0
    for number, line in enumerate(opened, start=1):
        end += len(line)
        if number == 1:
            if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)):
                raise ValueError("it is in UTF-16 or UTF-32, and JSON Lines are in UTF-8: store it so")
            line = line.removeprefix(codecs.BOM_UTF8)
        if line.strip():
            yield number, end, line


def parse_line(line: bytes) -> Any:
    """What is on a line of JSON Lines. Raises `ValueError` for anything but JSON in UTF-8."""
    return _parsed(line.decode("utf-8-sig"))


def to_line(value: Any) -> str:
    """A value as one line of JSON Lines, line feed included, that any program reads as one line."""
    return _escaped(json.dumps(value, ensure_ascii=False)) + "\n"


def write_json(file: str | Path, content: Any) -> None:
    """Writes a JSON file that is whole or not there."""
    _replace(Path(file), [_escaped(json.dumps(content, ensure_ascii=False, indent=1)) + "\n"])


def write_json_lines(file: str | Path, values: Iterable[Any]) -> None:
    """Writes a file with a value per line that is whole or not there."""
    _replace(Path(file), map(to_line, values))


def add_line(file: str | Path, value: Any) -> None:
    """Adds a line to a file and waits until the disk has it. A process that is killed meanwhile may leave a part of it.

    Such a part is no line: `read_added_lines` leaves it out, and the next line begins where it began.
    """
    file = Path(file)
    with file.open("r+b" if file.exists() else "wb") as lines:
        lines.truncate(lines.seek(_end_of_lines(lines)))
        lines.write(to_line(value).encode())
        lines.flush()
        os.fsync(lines.fileno())


def read_added_lines(
    file: str | Path, damaged: Callable[[int, ValueError], None] | None = None
) -> Iterator[tuple[int, Any]]:
    """As `read_json_lines`, of a file that processes add to: a last line without its end is not there yet.

    Args:
        damaged: is told of lines that are no JSON, as a loss of power may leave them, and why; they are then left out.

    Raises:
        ValueError: as `read_json_lines`, where there is no `damaged`.
    """
    with Path(file).open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.endswith(b"\n"):
                return
            if not line.strip():
                continue
            try:
                value = parse_line(line)
            except ValueError as error:
                if damaged is None:
                    raise ValueError(f"{file}, line {number} is not JSON: {error}.") from error
                damaged(number, error)
            else:
                yield number, value


def _values(lines: BinaryIO, file: str | Path) -> Iterator[tuple[int, Any]]:
    number = 1
    try:
        for number, _, line in iterate_lines(lines):
            value = parse_line(line)
            yield number, value
    except ValueError as error:
        raise ValueError(f"{file}, line {number} is not JSON: {error}.") from error


def _escaped(text: str) -> str:
    return _ESCAPED.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _parsed(content: str | bytes) -> Any:
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _end_of_lines(opened: BinaryIO) -> int:
    """Where the last whole line of a file ends."""
    position = opened.seek(0, os.SEEK_END)
    while position:
        begin = max(0, position - 2**16)
        opened.seek(begin)
        found = opened.read(position - begin).rfind(b"\n")
        if found >= 0:
            return begin + found + 1
        position = begin
    return 0


def _replace(file: Path, texts: Iterable[str]) -> None:
    with replacing(file) as part, part.open("w", encoding="utf-8", newline="\n") as opened:
        opened.writelines(texts)
