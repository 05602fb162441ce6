"""Which checkpoint it is: a fingerprint of what decides its answers. Imports nothing heavy."""

import hashlib
from pathlib import Path


DECIDING = ("*.json", "*.jinja", "*.model", "*.safetensors")
PART = 2**20


def fingerprint(folder: str | Path) -> str:
    """Of configurations, tokenizer and weights, 64 hexadecimal digits; cards and code do not count.

    Of a file of weights, its size, first and last megabyte are read: 14 GB take no longer than 14 MB.
    """
    folder, digest = Path(folder), hashlib.sha256()
    for file in sorted({file for pattern in DECIDING for file in folder.glob(pattern)}):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as content:
            digest.update(content.read(PART if file.suffix == ".safetensors" else -1))
            if file.suffix == ".safetensors" and size > PART:
                content.seek(max(PART, size - PART))
                digest.update(content.read())
    return digest.hexdigest()
