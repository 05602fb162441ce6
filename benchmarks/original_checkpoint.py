"""Checkpoints in the original's format, of a real size and with random weights, written without being held in memory.

Keys, shapes and files are those of the published ones. `bin` is LLaVA-1.5's: `pytorch_model-*.bin` with an index, the
vision tower in a folder of its own. `safetensors` is LLaVA-1.6's: `model-*.safetensors`, a trained vision tower inside.
Settings are the golden checkpoints', the tokenizer is Vicuna's, both from the tests' fixtures.
"""

import json
import math
import os
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tqdm import tqdm
from transformers import CLIPVisionConfig

from m3_conversion.mapping import CHECKPOINT_KEYS, CLIP_KEYS, remap_key

from .random_checkpoint import SHAPES, random_config


GOLDENS = Path(__file__).resolve().parents[1] / "tests" / "fixtures" / "goldens"
VOCABULARY = 32000
VISION_PREFIX = "model.vision_tower.vision_tower.vision_model."
_TOWER_SETTINGS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_BYTES = 2  # of a float16

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Layout:
    """How a published checkpoint is stored. A shard holds at most `shard_bytes`, as transformers wrote them then."""

    golden: str
    stem: str
    extension: str
    shard_bytes: int
    tower_inside: bool


LAYOUTS = {
    "bin": Layout("llava15-m3", "pytorch_model", "bin", 10 * 10**9, tower_inside=False),
    "safetensors": Layout("llava-next-m3", "model", "safetensors", 5 * 10**9, tower_inside=True),
}


@dataclass(frozen=True)
class Original:
    """A checkpoint and its vision tower's folder. `read` are those whose weights a conversion reads."""

    checkpoint: Path
    tower: Path
    read: tuple[Path, ...]


def write_original(size: str, layout_name: str, folder: Path, shard_bytes: int | None = None) -> Original:
    """Writes a checkpoint and its vision tower into `folder`, float16. What is there already is kept.

    Holds a few dozen megabytes, whatever the size.

    Args:
        size: a key of `SHAPES`.
        layout_name: a key of `LAYOUTS`.
        folder: where both get folders of their own, named by size and layout.
        shard_bytes: at most so many in a file, in place of the layout's.

    Raises:
        FileNotFoundError: the tests' fixtures are not there, because this is not a clone of the repository.
    """
    if not GOLDENS.is_dir():
        raise FileNotFoundError(
            f"{GOLDENS} is missing, where settings and tokenizer lie: run from a clone of the repository"
        )
    layout = LAYOUTS[layout_name]
    checkpoint, tower = folder / f"{size}-{layout_name}", folder / f"{size}-vision-tower"
    if not (tower / "config.json").exists():
        _write_tower(tower, random_config(size).vision_config)
    if not (checkpoint / "config.json").exists():
        _write_checkpoint(checkpoint, size, layout, shard_bytes or layout.shard_bytes)
    return Original(checkpoint, tower, (checkpoint,) if layout.tower_inside else (checkpoint, tower))


def original_shapes(size: str, layout: Layout) -> Shapes:
    """Every tensor of a checkpoint by its original key, in the order of the original's modules."""
    vision = random_config(size).vision_config
    language = SHAPES[size]
    hidden, intermediate = language["hidden_size"], language["intermediate_size"]
    heads = language["num_attention_heads"]
    keys_and_values = hidden // heads * language.get("num_key_value_heads", heads)
    shapes: Shapes = {"model.embed_tokens.weight": (VOCABULARY, hidden)}
    for i in range(language["num_hidden_layers"]):
        shapes |= {
            f"model.layers.{i}.self_attn.q_proj.weight": (hidden, hidden),
            f"model.layers.{i}.self_attn.k_proj.weight": (keys_and_values, hidden),
            f"model.layers.{i}.self_attn.v_proj.weight": (keys_and_values, hidden),
            f"model.layers.{i}.self_attn.o_proj.weight": (hidden, hidden),
            f"model.layers.{i}.mlp.gate_proj.weight": (intermediate, hidden),
            f"model.layers.{i}.mlp.up_proj.weight": (intermediate, hidden),
            f"model.layers.{i}.mlp.down_proj.weight": (hidden, intermediate),
            f"model.layers.{i}.input_layernorm.weight": (hidden,),
            f"model.layers.{i}.post_attention_layernorm.weight": (hidden,),
        }
    shapes["model.norm.weight"] = (hidden,)
    if layout.tower_inside:
        shapes |= {VISION_PREFIX + key: shape for key, shape in vision_shapes(vision).items()}
    shapes |= {
        "model.mm_projector.0.weight": (hidden, vision.hidden_size),
        "model.mm_projector.0.bias": (hidden,),
        "model.mm_projector.2.weight": (hidden, hidden),
        "model.mm_projector.2.bias": (hidden,),
    }
    if layout.golden == "llava-next-m3":
        shapes["model.image_newline"] = (hidden,)
    return {**shapes, "lm_head.weight": (VOCABULARY, hidden)}


def vision_shapes(config: CLIPVisionConfig) -> Shapes:
    """Every tensor of CLIP's vision encoder by its key within it."""
    hidden, intermediate, patch = config.hidden_size, config.intermediate_size, config.patch_size
    shapes: Shapes = {
        "embeddings.class_embedding": (hidden,),
        "embeddings.patch_embedding.weight": (hidden, 3, patch, patch),
        "embeddings.position_embedding.weight": ((config.image_size // patch) ** 2 + 1, hidden),
    }

    def with_bias(name: str, *shape: int) -> Shapes:
        return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}

    shapes |= with_bias("pre_layrnorm", hidden)
    for i in range(config.num_hidden_layers):
        layer = f"encoder.layers.{i}"
        for projection in ("k_proj", "v_proj", "q_proj", "out_proj"):
            shapes |= with_bias(f"{layer}.self_attn.{projection}", hidden, hidden)
        shapes |= with_bias(f"{layer}.layer_norm1", hidden)
        shapes |= with_bias(f"{layer}.mlp.fc1", intermediate, hidden)
        shapes |= with_bias(f"{layer}.mlp.fc2", hidden, intermediate)
        shapes |= with_bias(f"{layer}.layer_norm2", hidden)
    return {**shapes, **with_bias("post_layernorm", hidden)}


def _tower_shapes(config: CLIPVisionConfig) -> Shapes:
    """A CLIP folder's tensors."""
    return {f"vision_model.{key}": shape for key, shape in vision_shapes(config).items()}


def weight_bytes(shapes: Shapes) -> int:
    return sum(_BYTES * math.prod(shape) for shape in shapes.values())


def check_converted(folder: Path, size: str, layout_name: str) -> int:
    """Compares the first and the last row of every tensor of a conversion with what was written. Returns how many.

    Raises:
        RuntimeError: a tensor is not what it should be, missing, or one too many.
    """
    layout = LAYOUTS[layout_name]
    expected = {remap_key(key, CHECKPOINT_KEYS): (key, shape) for key, shape in original_shapes(size, layout).items()}
    if not layout.tower_inside:
        for key, shape in _tower_shapes(random_config(size).vision_config).items():
            expected[remap_key(key, CLIP_KEYS)] = (key, shape)
    found = set()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():
                key, shape = expected.get(name, (None, None))
                if key is None or not all(_same_row(weights.get_slice(name), key, shape, row) for row in (0, -1)):
                    raise RuntimeError(f"{file}: {name} is not what was written as {key}: conversion is wrong")
                found.add(name)
    if found != expected.keys():
        raise RuntimeError(f"{folder} lacks {sorted(expected.keys() - found)}: conversion is wrong")
    return len(found)


def _same_row(converted: Any, key: str, shape: tuple[int, ...], row: int) -> bool:
    """Whether a slice of safetensors has the values of a row, counted from the end where it is negative."""
    row %= shape[0]
    row_bytes = _BYTES * math.prod(shape[1:])
    values = b"".join(_random_values(key, row_bytes, row * row_bytes))
    same = converted[row : row + 1].contiguous().flatten()
    return same.dtype == torch.float16 and same.view(torch.uint8).numpy().tobytes() == values


def _write_tower(folder: Path, config: CLIPVisionConfig) -> None:
    shapes = _tower_shapes(config)
    golden = next((GOLDENS / "openai").iterdir())
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(golden / "preprocessor_config.json", folder / "preprocessor_config.json")
    with tqdm(total=weight_bytes(shapes), unit="B", unit_scale=True, desc=folder.name, disable=None) as bar:
        _write_values(folder / "model.safetensors", shapes, bar.update)
    settings = {name: getattr(config, name) for name in (*_TOWER_SETTINGS, "image_size", "patch_size", "hidden_act")}
    _write_json(folder / "config.json", {"model_type": "clip_vision_model", "torch_dtype": "float16", **settings})


def _write_checkpoint(folder: Path, size: str, layout: Layout, shard_bytes: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(GOLDENS / "tokenizer_v1" / name, folder / name)
    shutil.copyfile(GOLDENS / layout.golden / "generation_config.json", folder / "generation_config.json")
    shapes = original_shapes(size, layout)
    shards = _shards(shapes, shard_bytes)
    weight_map = {}
    with tqdm(total=weight_bytes(shapes), unit="B", unit_scale=True, desc=folder.name, disable=None) as bar:
        for number, shard in enumerate(shards, start=1):
            name = f"{layout.stem}-{number:05}-of-{len(shards):05}.{layout.extension}"
            _write_values(folder / name, shard, bar.update)
            weight_map |= dict.fromkeys(shard, name)
    index = {"metadata": {"total_size": weight_bytes(shapes)}, "weight_map": weight_map}
    _write_json(folder / f"{layout.stem}.{layout.extension}.index.json", index)
    language = {"num_key_value_heads": SHAPES[size]["num_attention_heads"], **SHAPES[size]}
    config = {
        **json.loads((GOLDENS / layout.golden / "config.json").read_text(encoding="utf-8")),
        **language,
        "vocab_size": VOCABULARY,
        "torch_dtype": "float16",
        "mm_hidden_size": random_config(size).vision_config.hidden_size,
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "unfreeze_mm_vision_tower": layout.tower_inside,
    }
    _write_json(folder / "config.json", config)  # last: a folder that has it is whole


def _write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _shards(shapes: Shapes, shard_bytes: int) -> list[Shapes]:
    """The tensors in order; a new file begins where one would grow too large."""
    shards: list[Shapes] = [{}]
    for key, shape in shapes.items():
        if shards[-1] and weight_bytes({**shards[-1], key: shape}) > shard_bytes:
            shards.append({})
        shards[-1][key] = shape
    return shards


def _write_values(file: Path, shapes: Shapes, progress: Callable[[int], object]) -> None:
    """A weight file, on the disk when this returns: its structure first, then values into the room it leaves for them."""
    starts = (_safetensors_structure if file.suffix == ".safetensors" else _bin_structure)(file, shapes)
    with open(file, "r+b") as output:
        for key, shape in shapes.items():
            output.seek(starts[key])
            for values in _random_values(key, _BYTES * math.prod(shape)):
                output.write(values)
                progress(len(values))
        output.flush()
        os.fsync(output.fileno())


def _safetensors_structure(file: Path, shapes: Shapes) -> dict[str, int]:
    """Writes the header. Returns where in the file each tensor's values start.

    Source of the layout: https://github.com/huggingface/safetensors#format
    """
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for key, shape in shapes.items():
        start, end = end, end + _BYTES * math.prod(shape)
        header[key] = {"dtype": "F16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    return {key: 8 + len(text) + header[key]["data_offsets"][0] for key in shapes}


def _bin_structure(file: Path, shapes: Shapes) -> dict[str, int]:
    """Has torch write all but the values, for which it leaves room. Returns as `_safetensors_structure`."""
    with torch.serialization.skip_data():  # memory that nobody touches is none
        torch.save({key: torch.empty(shape, dtype=torch.float16) for key, shape in shapes.items()}, file)
    starts = {}
    with zipfile.ZipFile(file) as archive, open(file, "rb") as opened:
        records = {record.filename.partition("/")[2]: record for record in archive.infolist()}
        for i, key in enumerate(shapes):  # torch numbers them as they come
            opened.seek(records[f"data/{i}"].header_offset)
            header = opened.read(30)  # of zip: name and extra field of these lengths follow, then what is stored
            lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
            starts[key] = records[f"data/{i}"].header_offset + 30 + lengths
    return starts


def _random_values(key: str, nbytes: int, position: int = 0) -> Iterator[memoryview]:
    """Bytes of a tensor, from a position in it: one block of random values, begun somewhere and anew at its end."""
    block = _random_block()
    start = (zlib.crc32(key.encode()) * _BYTES + position) % len(block)
    while nbytes:
        values = block[start : start + nbytes]
        yield values
        nbytes -= len(values)
        start = 0


@cache
def _random_block() -> memoryview:
    values = 0.02 * torch.randn(1 << 23, generator=torch.Generator().manual_seed(0))
    return memoryview(values.half().view(torch.uint8).numpy())
