"""What a disk can do while torch and transformers are imported. Imports neither."""

from contextlib import suppress
from pathlib import Path


MOST_BYTES = 4_000_000_000  # what a disk gives in that time; most memories have room


def read_ahead(folder: Path) -> None:
    """Has the system read the first weights, in the order of conversion, so that the disk does not wait for imports."""
    buffer = bytearray(1 << 24)  # so large that a read takes longer than the wait for the interpreter's lock
    left = MOST_BYTES
    for pattern in ("model*.safetensors", "pytorch_model*.bin"):
        for file in sorted(folder.glob(pattern)):
            with suppress(OSError), open(file, "rb", buffering=0) as opened:  # conversion meets it and says so
                while left > 0 and (count := opened.readinto(buffer)):
                    left -= count
        if left < MOST_BYTES:
            return  # many folders hold both
