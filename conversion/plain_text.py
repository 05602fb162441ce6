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
    """The folder; where it has texts in another encoding, a temporary one with plain copies of them, and links to the rest."""
    odd = {file.name: encoding for file in folder.iterdir() if (encoding := _encoding(file)) != "utf-8"}
    if not odd:
        yield folder
        return
    with TemporaryDirectory() as made:
        for file in folder.iterdir():
            copy = Path(made, file.name)
            if file.name in odd:
                copy.write_text(file.read_text(odd[file.name]), encoding="utf-8")
            else:
                _link(file.resolve(), copy)
        yield Path(made)


def _encoding(file: Path) -> str:
    if file.suffix not in _SUFFIXES or not file.is_file():
        return "utf-8"
    with open(file, "rb") as opened:
        return json.detect_encoding(opened.read(4))


def _link(file: Path, link: Path) -> None:
    try:
        link.symlink_to(file)
    except OSError:  # Windows allows it to developers alone
        (os.link if file.is_file() else shutil.copytree)(file, link)
