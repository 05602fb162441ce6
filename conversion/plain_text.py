"""Text files as other libraries read them: UTF-8 without a byte-order mark, whatever a Windows tool has made of them."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory


_SUFFIXES = (".json", ".jinja", ".txt")


@contextmanager
def plain_text(folder: Path) -> Iterator[Path]:
    """The folder; where it has texts in another encoding, a temporary one with plain copies of them, and links to the rest.

    What is in no encoding is left as it is: it may be a file that nobody reads.
    """
    odd = {file.name: text for file in folder.iterdir() if (text := _text_in_another_encoding(file)) is not None}
    if not odd:
        yield folder
        return
    with TemporaryDirectory() as made:
        for file in folder.iterdir():
            copy = Path(made, file.name)
            if file.name in odd:
                copy.write_text(odd[file.name], encoding="utf-8")
            else:
                _link(file.resolve(), copy)
        yield Path(made)


def _text_in_another_encoding(file: Path) -> str | None:
    if file.suffix not in _SUFFIXES or not file.is_file():
        return None
    with open(file, "rb") as opened:
        encoding = json.detect_encoding(opened.read(4))
    try:
        return None if encoding == "utf-8" else file.read_text(encoding)
    except UnicodeDecodeError:
        return None


def _link(file: Path, link: Path) -> None:
    try:
        link.symlink_to(file)
    except OSError:  # Windows allows it to developers alone
        (os.link if file.is_file() else shutil.copytree)(file, link)
