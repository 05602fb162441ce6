"""What a folder is, for the commands: an M3 checkpoint, or one of the things that people give in its place.

Not part of a checkpoint: no file that travels with one imports this.
"""

from pathlib import Path
from typing import Any

from .configuration_m3 import M3LlavaConfig


def read_config(folder: Path) -> dict[str, Any]:
    """The content of a checkpoint's `config.json`. Raises `ValueError` where there is none, or it cannot be read."""
    from m3_conversion.json_files import read_json  # the package is imported without the conversion

    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} is not a checkpoint: it has no config.json.")
    config = read_json(file)
    if not isinstance(config, dict):
        raise ValueError(f"{file} holds a {type(config).__name__}, not an object: download or copy it again.")
    return config


def check_checkpoint(folder: Path) -> dict[str, Any]:
    """As `read_config`, of an M3 checkpoint.

    Raises:
        ValueError: the folder is no M3 checkpoint; for one that can be converted, by which command.
    """
    config = read_config(folder)
    if config.get("model_type") != M3LlavaConfig.model_type:
        hint = ""
        if "mm_vision_tower" in config:
            hint = f" It is an original LLaVA checkpoint; convert it first: m3-convert {folder} {folder.name}-hf"
        elif config.get("model_type") in ("llava", "llava_next"):
            hint = f" It is a LLaVA in transformers' format; convert it first: m3-convert {folder} {folder.name}-m3"
        raise ValueError(f"{folder} is not an M3 checkpoint: its model_type is {config.get('model_type')!r}.{hint}")
    return config


def no_such_folder(name: str) -> str:
    """Says that a name is neither a folder nor an id on the Hub, which checkpoints there are beside it, and what makes one."""
    parent = Path(name).parent
    beside = sorted(str(config.parent) for config in parent.glob("*/config.json")) if parent.is_dir() else []
    there = (
        f"Checkpoints there: {', '.join(beside[:5])}{', ...' if len(beside) > 5 else ''}."
        if beside
        else "No checkpoint is there."
    )
    return (
        f"There is no folder {name}, and an id on the Hub has an owner, as OWNER/NAME. {there} `m3-convert SRC {name}` makes it of a "
        "LLaVA."
    )
