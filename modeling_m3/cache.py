"""Where converted checkpoints are kept: beside the Hub's cache, found again by name, revision, precision and our version.

Not part of a checkpoint: no file that travels with one imports this.
"""

import hashlib
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from huggingface_hub import constants


logger = logging.getLogger(__name__)

FORMAT = 1  # of what conversion writes: another one is converted again


@dataclass(frozen=True)
class CachedCheckpoint:
    """A converted checkpoint in the cache, or the place for one.

    Attributes:
        name: a Hub id, or what a folder is called.
        revision: the commit of the Hub's repository; of a folder, a digest of where it is and of its files' sizes and times.
        precision: "as-stored", "nf4", "int8", or the name of a type; with the version that wrote it.
        folder: where it is.
    """

    name: str
    revision: str
    precision: str
    folder: Path

    @property
    def nbytes(self) -> int:
        return sum(file.stat().st_size for file in self.folder.rglob("*") if file.is_file())


def cache_folder() -> Path:
    """`m3` in Hugging Face's home, which HF_HOME moves."""
    return Path(constants.HF_HOME) / "m3"


def place_for(name: str, revision: str, precision: str) -> CachedCheckpoint:
    """The place of a conversion; there may be nothing yet."""
    folder = cache_folder() / name.replace("/", "--") / revision / precision
    return CachedCheckpoint(name, revision, precision, folder)


def revision_of(folder: Path) -> str:
    """What a folder's conversion is found again by; another one once a file is changed."""
    folder = folder.resolve()
    digest = hashlib.sha256(str(folder).encode())
    for file in sorted(folder.iterdir()):
        facts = file.stat()
        digest.update(f"{file.name} {facts.st_size} {facts.st_mtime_ns}".encode())
    return digest.hexdigest()[:40]


def cached_checkpoints() -> list[CachedCheckpoint]:
    """All that is whole, by name."""
    found = sorted(file.parent for file in cache_folder().glob("*/*/*/config.json") if file.parent.name[0] != ".")
    return [
        CachedCheckpoint(folder.parts[-3].replace("--", "/"), folder.parts[-2], folder.name, folder) for folder in found
    ]


def clear(name: str | None = None) -> list[CachedCheckpoint]:
    """Frees what is kept of one name, or of all, what killed conversions left included. Returns what was whole.

    What is being converted just now stays.
    """
    removed = [checkpoint for checkpoint in cached_checkpoints() if name in (None, checkpoint.name)]
    pattern = "*" if name is None else name.replace("/", "--")
    for folder in [path for path in cache_folder().glob(f"{pattern}/*/*") if path.is_dir()]:
        with _locked(folder.parent, wait=False) as held:
            if held:
                shutil.rmtree(folder)
            else:
                removed = [checkpoint for checkpoint in removed if checkpoint.folder != folder]
    for folder in sorted(cache_folder().glob(f"{pattern}/**/"), reverse=True):
        if folder != cache_folder() and not any(path for path in folder.iterdir() if path.name != ".lock"):
            shutil.rmtree(folder)
    return removed


def converted_once(place: CachedCheckpoint, convert: Callable[[Path], object]) -> Path:
    """The folder of a place, which `convert` writes where it is not there.

    One process converts, others wait for it. `convert` makes the folder appear only when it is whole.
    """
    if not (place.folder / "config.json").is_file():
        with _locked(place.folder.parent, wait=True):
            for leftover in place.folder.parent.glob(
                ".*.incomplete-*"
            ):  # of a process that was killed: we hold the lock
                shutil.rmtree(leftover)
            if not (place.folder / "config.json").is_file():
                convert(place.folder)
    return place.folder


@contextmanager
def _locked(folder: Path, *, wait: bool) -> Iterator[bool]:
    """Whether this process has what is in a folder for itself; with `wait`, once it has."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if not wait:
            yield False
            return
        logger.warning("another process converts to %s: waiting for it", folder)
        lock.acquire()
    try:
        yield True
    finally:
        lock.release()
