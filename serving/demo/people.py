"""Who has the page open, and what goes when they leave: the chat, what a model remembers of it, and every file of theirs."""

import fcntl
import hashlib
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .asking import Person, Picture


PREFIX = f"m3-demo-{os.getuid()}-"


class People:
    """By the page's session. Two may have uploaded the same file: it goes with the last of them.

    Args:
        folder: where the page's files lie.
    """

    def __init__(self, folder: Path):
        self.folder, self._own = folder, set[str]()
        self._people: dict[str, Person] = {}
        self._files: dict[str, set[str]] = {}
        self._lock = threading.RLock()

    def keep_what_is_there(self) -> None:
        """The files so far are the page's own, such as its examples: they stay whoever looked at them."""
        self._own = {os.path.realpath(file) for file in self.folder.rglob("*") if file.is_file()}

    def of(self, request: Any, *files: str | None) -> Person:
        """The person whose event this is, whose files these are."""
        key = str(request.session_hash)
        with self._lock:
            self._files.setdefault(key, set()).update(os.path.realpath(file) for file in files if file)
            return self._people.setdefault(key, Person())

    def forget(self, request: Any) -> None:
        """They left."""
        key = str(request.session_hash)
        with self._lock:
            person, files = self._people.pop(key, None), self._files.pop(key, set())
            self._remove(files)
        if person is not None:
            person.leave()

    def discard(self, request: Any, file: str) -> None:
        """They need a file no more."""
        place = os.path.realpath(file)
        with self._lock:
            self._files.get(str(request.session_hash), set()).discard(place)
            self._remove({place})

    def draw(self, request: Any, file: str) -> None:
        """The file of their drawing is another one now."""
        person = self.of(request, file)
        with person.lock:
            before, person.drawing = person.drawing, file
        if before:
            self.discard(request, before)

    def _remove(self, files: set[str]) -> None:
        """Of these, what lies in the folder, and is neither somebody else's nor the page's own."""
        folder = os.path.realpath(self.folder)
        for file in files - self._own.union(*self._files.values()):
            if not file.startswith(f"{folder}{os.sep}"):  # a browser said where it lies
                continue
            with suppress(FileNotFoundError):
                os.remove(file)
            if os.path.dirname(file) != folder:
                with suppress(OSError):  # another file is in it
                    os.rmdir(os.path.dirname(file))

    def new_file(self, request: Any, name: str) -> Path:
        """The place for a file of theirs."""
        place = Path(tempfile.mkdtemp(dir=self.folder)) / name
        self.of(request, str(place))
        return place


def open_upload(file: str, name: str, num_visual_tokens: int | str) -> Picture:
    """A picture that somebody uploaded, as `m3-ask` takes it from a file.

    Raises:
        ValueError: it is no picture, or broken.
    """
    from modeling_m3.pictures import open_pictures  # with torch, which the page does not wait for

    try:
        content = Path(file).read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{name} is no longer here: pictures are deleted after a day. Upload it again.") from None
    try:
        picture = open_pictures(content)
        picture.load()
    except (ValueError, OSError, SyntaxError) as error:  # PIL raises the latter two for files that are cut off
        if "pixels" in str(error):
            raise ValueError(f"{name} has too many pixels: make it smaller first.") from error
        raise ValueError(f"{name} is not a picture that can be opened. Check that the file is complete.") from error
    return Picture(picture, name, num_visual_tokens, hashlib.sha256(content).hexdigest())


@contextmanager
def private_folder() -> Iterator[Path]:
    """A folder for all that is temporary, which goes at the end; and those of processes that were killed go now."""
    previous = tempfile.tempdir
    parent = Path(tempfile.gettempdir())
    for left in parent.glob(f"{PREFIX}*"):
        with suppress(OSError), open(left / "lock", "rb") as lock:  # a folder that is being made, or removed, has none
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    with open(folder / "making", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.rename(folder / "making", folder / "lock")  # nobody sees it before it is held
        tempfile.tempdir = str(folder / "files")
        os.mkdir(tempfile.tempdir)
        try:
            yield folder / "files"
        finally:
            tempfile.tempdir = previous
            shutil.rmtree(folder, ignore_errors=True)
