"""Original checkpoints for the tests: the goldens, changed, or stored in another of the formats that exist."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from conftest import GOLDENS
from safetensors.torch import load_file, save_file

from m3_conversion.__main__ import main


CLIP = "openai/clip-vit-tiny-patch14-336"
VISION = "model.vision_tower.vision_tower.vision_model."
NEW_VISION = "model.vision_tower."


def copy_golden(name: str, folder: Path) -> Path:
    """A copy that may be changed, with the CLIP folder beside it, where its config's relative path finds it."""
    shutil.copytree(GOLDENS / name, folder / name)
    shutil.copytree(GOLDENS / CLIP, folder / CLIP)
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return folder / name


def edit_json(file: Path, **changes: Any) -> None:
    """Sets keys; `...` removes one."""
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder in any format, without the code under test."""
    weights = {}
    for file in sorted(folder.glob("*.bin")):
        weights |= torch.load(file, weights_only=True)
    for file in sorted(folder.glob("*.safetensors")):
        weights |= load_file(file)
    return weights


def store(folder: Path, weights: dict[str, Any], layout: str = "model.safetensors") -> None:
    """Replaces the weights. `layout`: a file's name, an index's (two shards), or `legacy.bin` for torch before 1.6."""
    for file in (*folder.glob("*.bin*"), *folder.glob("*.safetensors*")):
        file.unlink()
    legacy, single = layout == "legacy.bin", not layout.endswith(".index.json")
    stem, extension = ("pytorch_model", "bin") if ".bin" in layout else ("model", "safetensors")
    keys = sorted(weights)
    half = len(keys) if single else len(keys) // 2
    names = [f"{stem}.{extension}"] if single else [f"{stem}-0000{i}-of-00002.{extension}" for i in (1, 2)]
    weight_map = {}
    for name, part in zip(names, (keys[:half], keys[half:])):
        held = {key: weights[key] for key in part}
        weight_map |= dict.fromkeys(part, name)
        if extension == "bin":
            torch.save(held, folder / name, _use_new_zipfile_serialization=not legacy)
        else:
            save_file({key: tensor.contiguous() for key, tensor in held.items()}, folder / name)
    if not single:
        (folder / layout).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def change_weights(folder: Path, changes: dict[str, Any], layout: str = "model.safetensors") -> None:
    """Stores the weights again with some of them set, or removed by None."""
    weights = {**read_weights(folder), **changes}
    store(folder, {key: value for key, value in weights.items() if value is not None}, layout)


def run(source: Path, destination: Path, *options: str) -> int:
    """The command's exit status."""
    return main([str(source), str(destination), *options])
