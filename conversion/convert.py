"""From an original checkpoint to a folder that transformers loads: read, plan and check everything, then write."""

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from modeling_m3 import M3LlavaForConditionalGeneration

from .card import model_card
from .from_original import read_original
from .from_transformers import Tiling, is_transformers_layout, read_transformers
from .lora import is_adapter
from .mapping import OPTIONAL_NAMES, VOCABULARY_NAMES, original_keys, remap_key
from .original import ConversionError, StoredTensor, check_name, local_folder, read_json
from .quantization import Quantization, quantization_config, quantize_plan
from .source import Source, naming
from .whole import check_chat, check_weights, expected_shapes
from .writer import (
    WEIGHT_DTYPES,
    PlannedTensor,
    check_destination,
    new_folder,
    write_other_files,
    write_weights,
)


@dataclass(frozen=True)
class Conversion:
    """What was written."""

    destination: Path
    num_tensors: int
    num_dropped: int
    nbytes: int
    num_files: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"wrote {self.destination}: {self.num_tensors} tensors, {self.nbytes / 1e9:.2f} GB in {self.num_files} "
            f"file(s), {self.num_dropped} left out on purpose, {self.seconds:.0f} s"
        )


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    revision: str | None = None,
    model_base: str | Path | None = None,
    vision_tower: str | None = None,
    dtype: torch.dtype | None = None,
    quantize: Quantization | None = None,
    max_shard_size: int | str = "5GB",
    chat_template: str | None = None,
    tiling: Tiling = "original",
    model_id: str | None = None,
    license: str | None = None,
    hub_id: str | None = None,
    overwrite: bool = False,
) -> Conversion:
    """Converts an original LLaVA or M3 checkpoint, or one of transformers' own LLaVA or LLaVA-NeXT.

    Needs little memory, whatever the checkpoint's size.

    Args:
        source: the checkpoint's folder or its Hub id.
        revision: of the source, where it is on the Hub.
        destination: the folder to write. It appears under this name only when it is whole.
        model_base: where `source` is a LoRA adapter or a projector alone, the folder or Hub id of what it was trained on.
        vision_tower: a CLIP folder or Hub id in place of the one that the checkpoint's config names.
        dtype: to store the weights in; as they are stored by default.
        quantize: store the language model's layers in 4 bits ("nf4") or 8 ("int8"), as bitsandbytes has them.
        max_shard_size: of a weight file, in bytes or as `"5GB"`.
        chat_template: a key of `CHAT_TEMPLATES`; by default chosen by the checkpoint's name and language model, and in
            transformers' folders their own.
        tiling: of transformers' LLaVA-NeXT folders; see `read_transformers`.
        model_id: Hub id of the original, for the card; `source` by default.
        license: for the card; the one of the source's own card by default.
        hub_id: under which the new folder will be on the Hub, for the card's examples.
        overwrite: replace `destination` where it exists.

    Raises:
        ConversionError: anything that is wrong with the checkpoint or the request, in one line.
        OSError: a file that cannot be read or written.
    """
    start = time.monotonic()
    check_name(destination, "the folder to write")
    destination = Path(destination).resolve()
    check_destination(destination, overwrite)  # before a download that may take an hour
    folder = local_folder(source, revision=revision)
    config_file = folder / "config.json"
    name = str(model_id or (folder.resolve() if Path(source).is_dir() else source))
    base = local_folder(model_base) if model_base is not None and is_adapter(folder) else None
    # What PEFT saves on transformers' own folders has no configuration beside the adapter.
    layout = read_json(config_file if base is None or config_file.exists() else base / "config.json")
    if is_transformers_layout(layout):
        checkpoint = read_transformers(
            base or folder, folder if base else None, name=name, chat_template=chat_template, tiling=tiling
        )
    else:
        checkpoint = read_original(
            folder,
            layout,
            name=name,
            model_base=model_base,
            vision_tower=vision_tower,
            chat_template=chat_template,
        )
    check_apart(destination, *checkpoint.folders)
    tensors, num_dropped = plan(checkpoint, dtype, config_file)
    config = checkpoint.config
    config.architectures = [M3LlavaForConditionalGeneration.__name__]
    config.dtype = next(tensor.dtype for tensor in tensors if tensor.name == VOCABULARY_NAMES[0])
    if quantize is not None:
        config.quantization_config = quantization_config(quantize, config.dtype)
        tensors = quantize_plan(tensors, config, quantize)
    card = model_card(
        destination.name,
        name,
        config,
        trained_for_scales=len(config.trained_scales) > 1,
        quantization=quantize,
        hub_id=hub_id,
        source=folder,
        license=license,
    )

    files = write_checkpoint(destination, checkpoint, tensors, card, max_shard_size=max_shard_size, overwrite=overwrite)
    nbytes = sum(tensor.nbytes for tensor in tensors)
    return Conversion(destination, len(tensors), num_dropped, nbytes, len(files), time.monotonic() - start)


def write_checkpoint(
    destination: Path,
    source: Source,
    tensors: list[PlannedTensor],
    card: str,
    *,
    max_shard_size: int | str,
    overwrite: bool,
    check: Callable[[Path], None] | None = None,
) -> list[str]:
    """Writes the folder of a source, which appears only when it is whole. Returns the names of the weight files.

    Args:
        destination, max_shard_size, overwrite: as of `convert`.
        source: with the configurations and the processor.
        tensors: as planned.
        card: the text of `README.md`.
        check: called with the whole folder, under another name, before it appears; whatever it raises leaves nothing behind.

    Raises:
        ConversionError: the disk is full or cannot be written to.
    """
    nbytes = sum(tensor.nbytes for tensor in tensors)
    with new_folder(destination, overwrite=overwrite) as partial:
        free = shutil.disk_usage(partial).free
        if free < nbytes:
            raise ConversionError(
                f"{destination} needs {nbytes / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free on its disk"
            )
        with tqdm(total=nbytes, unit="B", unit_scale=True, desc="weights", disable=None) as bar:
            files = write_weights(partial, tensors, max_shard_size, bar.update)
        with naming(partial):
            write_other_files(partial, source.config, source.processor, source.generation_config, card)
        check_weights(partial, source.config)
        check_chat(partial)
        if check is not None:
            check(partial)
    return files


def plan(source: Source, dtype: torch.dtype | None, config_file: Path) -> tuple[list[PlannedTensor], int]:
    """Every parameter of the model with where it comes from, in the order of the files.

    Returns the tensors and how many of the source's are dropped on purpose.

    Raises:
        ConversionError: an unknown or missing key, or a shape that disagrees with the config.
    """
    with naming(config_file):
        expected = expected_shapes(source.config)
    planned: dict[str, PlannedTensor] = {}
    for tensors, table in source.tensors:
        for name, tensor in _remapped(tensors, table):
            named = f"{tensor.file}: {tensor.key}"
            if name in OPTIONAL_NAMES and name not in expected:
                continue
            if name not in expected:
                raise ConversionError(f"{named} has no place in the model that {config_file} describes: correct either")
            if name in planned:
                raise ConversionError(f"{named} and {planned[name].source.key} are both {name}: remove one")
            shape = (source.rows, *expected[name][1:]) if name in VOCABULARY_NAMES else expected[name]
            if tensor.shape != shape:
                raise ConversionError(
                    f"{named} has the shape {tensor.shape}, but {config_file} asks for {shape}: correct either"
                )
            planned[name] = PlannedTensor(name, expected[name], dtype or tensor.dtype, tensor)
    for name in (name for name in expected if name not in planned):
        tensors, table = next(s for s in reversed(source.tensors) if original_keys(name, s[1]))
        folder = next((tensor.file.parent for tensor in tensors.values()), config_file.parent)
        advice = "is the checkpoint whole?"
        if name == VOCABULARY_NAMES[1]:
            advice += " Where its head is its embedding, set tie_word_embeddings to true"
        raise ConversionError(
            f"{folder}: {' or '.join(original_keys(name, table))} is missing from the weights, but {config_file} asks for it: "
            f"{advice}"
        )
    num_dropped = sum(len(tensors) for tensors, _ in source.tensors) - len(planned)
    in_file_order = sorted(planned.values(), key=lambda tensor: (str(tensor.source.file), tensor.source.offset or 0))
    return in_file_order, num_dropped


def _remapped(tensors: dict[str, StoredTensor], table: dict[str, str | None]) -> Iterator[tuple[str, StoredTensor]]:
    """The tensors that the table does not drop, with their new names."""
    for key, tensor in tensors.items():
        try:
            name = remap_key(key, table)
        except KeyError as error:
            raise ConversionError(
                f"{tensor.file}: {tensor.key} is not a key of a LLaVA or M3 model: it cannot be converted"
            ) from error
        if name is None:
            continue
        if tensor.dtype not in WEIGHT_DTYPES:
            raise ConversionError(
                f"{tensor.file}: {tensor.key} is stored as {tensor.dtype}: convert an unquantized checkpoint"
            )
        yield name, tensor


def check_apart(destination: Path, *sources: Path | None) -> None:
    """Neither may the new folder be part of what is read, nor may replacing it remove what is read."""
    for source in (path.resolve() for path in sources if path is not None):
        if destination.is_relative_to(source) or source.is_relative_to(destination):
            raise ConversionError(f"{destination} and {source} overlap: name a folder outside of what is converted")
