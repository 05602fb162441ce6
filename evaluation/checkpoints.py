"""Which checkpoint it is: a fingerprint of what decides its answers. Imports nothing heavy."""

import hashlib
import json
from pathlib import Path


AUTOMATIC_BUDGET_FILE = "automatic_budget.safetensors"  # as modeling_m3.automatic_budget_m3 has it
DECIDING = ("*.json", "*.jinja", "*.model", "*.safetensors")
START_OF_A_TENSOR = 2**14


def fingerprint(folder: str | Path, with_choice: bool = False) -> str:
    """Of configurations, tokenizer and weights, 64 hexadecimal digits; cards and code do not count.

    The choice behind `num_visual_tokens="auto"` decides answers only where it chooses: it counts `with_choice`.

    Of weights, names, types and shapes are read and the first 16 KiB of every tensor: 14 GB take no longer than 14 MB, and
    whatever trained a part of the model changed it there.

    Raises:
        ValueError: where the folder has no `config.json`, no weights in safetensors, or a file of weights is none.
    """
    folder, digest = Path(folder), hashlib.sha256()
    files = sorted({file for pattern in DECIDING for file in folder.glob(pattern)})
    files = [file for file in files if with_choice or file.name != AUTOMATIC_BUDGET_FILE]
    if not (folder / "config.json").is_file() or not any(file.suffix == ".safetensors" for file in files):
        raise ValueError(f"{folder} is no checkpoint: it lacks config.json or *.safetensors.")
    for file in files:
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        if file.suffix == ".safetensors":
            _add_weights(digest, file)
        else:
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _add_weights(digest, file: Path) -> None:
    with file.open("rb") as content:
        header = content.read(int.from_bytes(content.read(8), "little"))
        try:
            tensors = json.loads(header)
        except ValueError as error:
            raise ValueError(f"{file} is no file of weights in safetensors: {error}") from None
        digest.update(header)
        start = content.tell()
        for name, tensor in sorted(tensors.items()):
            if name != "__metadata__":
                first, last = tensor["data_offsets"]
                content.seek(start + first)
                digest.update(content.read(min(last - first, START_OF_A_TENSOR)))
