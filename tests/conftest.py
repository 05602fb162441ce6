"""What the tests share: the goldens, folders converted from them, and a model small enough to build in a blink."""

import same_environment  # noqa: F401  # isort: skip - before torch reads it
import json
import os
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file


GOLDENS = Path(__file__).parent / "fixtures" / "goldens"
CHECKPOINTS = ("llava15-m3", "llava-next-m3")


def torchvision_operators() -> torch.library.Library | None:
    """Lets PyPI's torchvision, a build for GPUs, be imported beside a build of torch for CPUs.

    It cannot load its own operators there, and refuses to be imported unless those that it describes to torch exist. None is
    used to prepare images.
    """
    try:
        torch.ops.load_library(Path(find_spec("torchvision").origin).with_name("_C.so"))
        return None
    except OSError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor")
        return library


OPERATORS = torchvision_operators() if find_spec("torchvision") else None  # kept: what it declares goes with it


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--screenshots", help="Folder for pictures of m3-demo's tabs, which go to a temporary one otherwise."
    )


@cache
def golden(name: str) -> dict[str, Any]:
    """A JSON file of the goldens' `expected` folder."""
    return json.loads((GOLDENS / "expected" / f"{name}.json").read_text(encoding="utf-8"))


@cache
def golden_tensors(name: str) -> dict[str, torch.Tensor]:
    return load_file(GOLDENS / "expected" / f"{name}.safetensors")


def commands_on_path() -> str:
    """A `PATH` on which the commands of this environment come first, as where it is activated."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])


def picture(name: str) -> Image.Image:
    return Image.open(GOLDENS / "images" / name)


def golden_cases(*prefixes: str) -> list:
    """(checkpoint, case) parameters: the cases whose id starts so, or all that are not cut short by the original."""
    return [
        pytest.param(checkpoint, case, id=f"{checkpoint}-{case['id']}")
        for checkpoint in CHECKPOINTS
        for case in golden(checkpoint)["cases"]
        if (case["id"].startswith(prefixes) if prefixes else not case["id"].startswith("trunc"))
    ]


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The golden checkpoints, converted once for all tests. Read-only by agreement."""
    from m3_conversion.convert import convert

    folder = tmp_path_factory.mktemp("converted")
    for name in CHECKPOINTS:
        convert(GOLDENS / name, folder / name)
    return {name: folder / name for name in CHECKPOINTS}


@pytest.fixture(scope="session")
def loaded(converted: dict[str, Path]) -> dict[str, tuple]:
    """(model, processor) of every golden checkpoint, float32, eager attention as in the goldens, PIL backend."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    import modeling_m3  # noqa: F401 - registers the classes

    return {
        name: (
            AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager").eval(),
            AutoProcessor.from_pretrained(folder, backend="pil"),
        )
        for name, folder in converted.items()
    }


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's project that has a package of each name that this repository's folders have."""
    project = tmp_path_factory.mktemp("project")
    repository = Path(__file__).parent.parent
    names = {folder.name for folder in repository.iterdir() if folder.is_dir() and folder.name.isidentifier()}
    assert {"conversion", "training", "model_cards", "benchmarks", "tests"} <= names
    for name in names - {"modeling_m3"}:
        (project / name).mkdir()
        (project / name / "__init__.py").write_text(f"raise ImportError('not our {name}, but the user s')")
    return project


def tiny_config(**overrides: Any):
    """A model with a 12x12 grid of patches and pictures of 24x24 pixels, a few thousand parameters."""
    from modeling_m3 import M3LlavaConfig

    settings = {
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": 24,
            "patch_size": 2,
        },
        "text_config": {
            "vocab_size": 99,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "initializer_range": 0.2,
        },
        "image_token_id": 98,
    }
    for name, value in overrides.items():
        settings[name] = {**settings[name], **value} if isinstance(value, dict) else value
    return M3LlavaConfig(**settings)
