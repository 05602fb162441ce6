"""What the system keeps of files in memory: counted or dropped before a measurement, written to the disk at its end.

Linux. `cp` and conversion read and write through this cache, so a time says little without what was in it.
"""

import ctypes
import mmap
import os
from collections.abc import Iterable, Iterator
from pathlib import Path


def files_in(folders: Iterable[Path]) -> Iterator[Path]:
    """Every file below the folders."""
    return (path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file())


def size_of(*folders: Path) -> int:
    """Bytes of all files below the folders."""
    return sum(file.stat().st_size for file in files_in(folders))


def forget(*folders: Path) -> None:
    """Drops the files' pages from memory, so that they have to be read from the disk. Unwritten ones are written first."""
    for file in files_in(folders):
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())  # only pages that are on the disk are dropped
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cached_share(*folders: Path) -> float:
    """The share of the files' pages that is in memory, from 0 to 1."""
    system = ctypes.CDLL(None, use_errno=True)
    cached = pages = 0
    for file in files_in(folders):
        size = file.stat().st_size
        if not size:
            continue
        in_memory = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
            start = ctypes.c_char.from_buffer(mapped)
            failed = system.mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(size), in_memory)
            del start  # a map that is pointed to cannot be closed
        if failed:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(file))
        cached += bytes(in_memory).count(1)
        pages += len(in_memory)
    return cached / pages if pages else 0.0


def flush(folder: Path) -> None:
    """Returns when all that is in a folder is on the disk."""
    for path in (*folder.rglob("*"), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
