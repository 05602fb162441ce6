"""From an original checkpoint to a folder that transformers loads: read, plan and check everything, then write."""

import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase

from modeling_m3 import (
    M3LlavaConfig,
    M3LlavaForConditionalGeneration,
    M3LlavaImageProcessorPil,
    M3LlavaProcessor,
)

from .card import model_card
from .chat_templates import BEGINNING, CHAT_TEMPLATES, choose_chat_template
from .lora import is_adapter, merged_tensors
from .mapping import (
    CHECKPOINT_KEYS,
    CHECKPOINT_VISION_PREFIX,
    CLIP_KEYS,
    EMBEDDING_KEY,
    OPTIONAL_NAMES,
    original_keys,
    remap_key,
    translate_config,
    unknown_settings,
)
from .original import (
    PROJECTOR_FILE,
    ConversionError,
    StoredTensor,
    file_tensors,
    has_model_weights,
    local_folder,
    read_json,
    stored_tensors,
    unwrapped,
)
from .quantization import Quantization, quantization_config, quantize_plan
from .tokenizer import build_tokenizer
from .vision import VisionTower, find_vision_tower
from .writer import (
    WEIGHT_DTYPES,
    PlannedTensor,
    check_destination,
    new_folder,
    write_other_files,
    write_weights,
)


logger = logging.getLogger(__name__)

VOCABULARY_MULTIPLE = 64  # rows of the embedding, for the sake of matrix kernels
_VOCABULARY_NAMES = ("model.language_model.embed_tokens.weight", "lm_head.weight")
_SAMPLING_SETTINGS = ("do_sample", "temperature", "top_p", "top_k")


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
    model_base: str | Path | None = None,
    vision_tower: str | None = None,
    dtype: torch.dtype | None = None,
    quantize: Quantization | None = None,
    max_shard_size: int | str = "5GB",
    chat_template: str | None = None,
    model_id: str | None = None,
    license: str | None = None,
    hub_id: str | None = None,
    overwrite: bool = False,
) -> Conversion:
    """Converts an original LLaVA or M3 checkpoint. Needs little memory, whatever the checkpoint's size.

    Args:
        source: the checkpoint's folder or its Hub id.
        destination: the folder to write. It appears under this name only when it is whole.
        model_base: where `source` is a LoRA adapter or a projector alone, the folder or Hub id of what it was trained on.
        vision_tower: a CLIP folder or Hub id in place of the one that the checkpoint's config names.
        dtype: to store the weights in; as they are stored by default.
        quantize: store the language model's layers in 4 bits ("nf4") or 8 ("int8"), as bitsandbytes has them.
        max_shard_size: of a weight file, in bytes or as `"5GB"`.
        chat_template: a key of `CHAT_TEMPLATES`; chosen by the checkpoint's name and language model by default.
        model_id: Hub id of the original, for the card; `source` by default.
        license: for the card; the one of the source's own card by default.
        hub_id: under which the new folder will be on the Hub, for the card's examples.
        overwrite: replace `destination` where it exists.

    Raises:
        ConversionError: anything that is wrong with the checkpoint or the request, in one line.
        OSError: a file that cannot be read or written.
    """
    start = time.monotonic()
    destination = Path(destination).resolve()
    check_destination(destination, overwrite)  # before a download that may take an hour
    folder = local_folder(source)
    config_file = folder / "config.json"
    original = read_json(config_file)
    arguments = translate_config(original, str(config_file))
    for setting in unknown_settings(original):
        logger.warning("%s: the setting %s is not known and has no effect on what is written", config_file, setting)
    base, checkpoint = _base(folder, model_base)  # has what such a folder may lack: weights and tokenizer
    vision = find_vision_tower(original, folder, checkpoint, vision_tower)
    _check_apart(destination, folder, base, vision.folder)
    with _naming(base):
        tokenizer = build_tokenizer(base, model_config=original)
    rows = _check_vocabulary(original, checkpoint, tokenizer, folder)
    with _naming(config_file):
        config = M3LlavaConfig(**_with_vocabulary(arguments, tokenizer, rows), vision_config=vision.config)
    tensors, num_dropped = plan(config, checkpoint, vision, dtype, rows, config_file)
    config.architectures = [M3LlavaForConditionalGeneration.__name__]
    config.dtype = next(tensor.dtype for tensor in tensors if tensor.name == _VOCABULARY_NAMES[0])
    if quantize is not None:
        config.quantization_config = quantization_config(quantize, config.dtype)
        tensors = quantize_plan(tensors, config, quantize)
    name = str(model_id or (folder.resolve() if Path(source).is_dir() else source))
    template = chat_template or choose_chat_template(original["model_type"], name)
    with _naming(vision.folder or config_file):
        processor = build_processor(config, tokenizer, vision, original, template)
    generation_config = _generation_config(original, base, tokenizer, template)
    trained = bool(original.get("matryoshka_vis_token_scale"))
    card = model_card(
        destination.name,
        name,
        config,
        trained_for_scales=trained,
        quantization=quantize,
        hub_id=hub_id,
        source=folder,
        license=license,
    )

    nbytes = sum(tensor.nbytes for tensor in tensors)
    with new_folder(destination, overwrite=overwrite) as partial:
        free = shutil.disk_usage(partial).free
        if free < nbytes:
            raise ConversionError(
                f"{destination} needs {nbytes / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free on its disk"
            )
        with tqdm(total=nbytes, unit="B", unit_scale=True, desc="weights", disable=None) as bar:
            files = write_weights(partial, tensors, max_shard_size, bar.update)
        with _naming(partial):
            write_other_files(partial, config, processor, generation_config, card)
    return Conversion(destination, len(tensors), num_dropped, nbytes, len(files), time.monotonic() - start)


def plan(
    config: M3LlavaConfig,
    checkpoint: dict[str, StoredTensor],
    vision: VisionTower,
    dtype: torch.dtype | None,
    rows: int,
    config_file: Path,
) -> tuple[list[PlannedTensor], int]:
    """Every parameter of the model that `config` describes with where it comes from, in the order of the files.

    Returns the tensors and how many of the original's are dropped on purpose.

    Raises:
        ConversionError: an unknown or missing key, or a shape that disagrees with the config.
    """
    with _naming(config_file), torch.device("meta"):
        expected = {name: tuple(p.shape) for name, p in M3LlavaForConditionalGeneration(config).state_dict().items()}
    if config.tie_word_embeddings:
        del expected["lm_head.weight"]
    sources = [(checkpoint, CHECKPOINT_KEYS)]
    if vision.tensors is not None:
        own = {key: tensor for key, tensor in checkpoint.items() if not key.startswith(CHECKPOINT_VISION_PREFIX)}
        sources = [(own, CHECKPOINT_KEYS), (vision.tensors, CLIP_KEYS)]
    planned: dict[str, PlannedTensor] = {}
    for tensors, table in sources:
        for name, tensor in _remapped(tensors, table):
            named = f"{tensor.file}: {tensor.key}"
            if name in OPTIONAL_NAMES and name not in expected:
                continue
            if name not in expected:
                raise ConversionError(f"{named} has no place in the model that {config_file} describes: correct either")
            if name in planned:
                raise ConversionError(f"{named} and {planned[name].source.key} are both {name}: remove one")
            shape = (rows, *expected[name][1:]) if name in _VOCABULARY_NAMES else expected[name]
            if tensor.shape != shape:
                raise ConversionError(
                    f"{named} has the shape {tensor.shape}, but {config_file} asks for {shape}: correct either"
                )
            planned[name] = PlannedTensor(name, expected[name], dtype or tensor.dtype, tensor)
    for name in (name for name in expected if name not in planned):
        of_vision = vision.tensors is not None and name.startswith("model.vision_tower.")
        keys = " or ".join(original_keys(name, CLIP_KEYS if of_vision else CHECKPOINT_KEYS))
        where = vision.folder if of_vision else config_file.parent
        raise ConversionError(
            f"{where}: {keys} is missing from the weights, but {config_file} asks for it: is the checkpoint whole?"
        )
    num_dropped = len(checkpoint) + len(vision.tensors or ()) - len(planned)
    in_file_order = sorted(planned.values(), key=lambda tensor: (str(tensor.source.file), tensor.source.offset or 0))
    return in_file_order, num_dropped


def _remapped(tensors: dict[str, StoredTensor], table: dict[str, str | None]) -> Iterator[tuple[str, StoredTensor]]:
    """The tensors that the table does not drop, with their new names."""
    for key, tensor in tensors.items():
        try:
            name = remap_key(key, table)
        except KeyError as error:
            raise ConversionError(
                f"{tensor.file}: {tensor.key} is not a key of an original LLaVA or M3 model: it cannot be converted"
            ) from error
        if name is None:
            continue
        if tensor.dtype not in WEIGHT_DTYPES:
            raise ConversionError(
                f"{tensor.file}: {tensor.key} is stored as {tensor.dtype}: convert an unquantized checkpoint"
            )
        yield name, tensor


def build_processor(
    config: M3LlavaConfig,
    tokenizer: PreTrainedTokenizerBase,
    vision: VisionTower,
    original: dict[str, Any],
    chat_template: str,
) -> M3LlavaProcessor:
    """The processor that prepares images and prompts as the original does, with a template of `CHAT_TEMPLATES`."""
    template = CHAT_TEMPLATES[chat_template]
    if not tokenizer("")["input_ids"]:  # no token begins the original's prompts
        template = template.removeprefix(BEGINNING)
    if original.get("mm_use_im_start_end"):
        template = template.replace("<image>", "<im_start><image><im_end>")
    image_processor = M3LlavaImageProcessorPil(
        do_pad=original.get("image_aspect_ratio") == "pad",
        image_grid_pinpoints=config.image_grid_pinpoints,
        **vision.preprocessing,
    )
    return M3LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        visual_token_scales=config.visual_token_scales,
        patch_merge_type=config.patch_merge_type,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        chat_template=template,
    )


def _base(folder: Path, model_base: str | Path | None) -> tuple[Path, dict[str, StoredTensor]]:
    """Where the language model lies, and all tensors: of a whole model its own; of an adapter or a projector, those of the
    model that it was trained on, with its own in their places.

    Source: the original's `load_pretrained_model` (`llava/model/builder.py`).
    """
    projector = folder / PROJECTOR_FILE
    is_projector = projector.exists() and (model_base is not None or not has_model_weights(folder))
    if not is_adapter(folder) and not is_projector:
        if model_base is not None:
            raise ConversionError(
                f"{folder} holds no LoRA adapter and no {PROJECTOR_FILE}, but --model-base {model_base} is given: leave it out"
            )
        return folder, unwrapped(stored_tensors(folder), EMBEDDING_KEY, folder)
    if model_base is None:
        what = f"only a projector, {PROJECTOR_FILE}: name the language model"
        if is_adapter(folder):
            trained_on = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
            what = f"a LoRA adapter of {trained_on!r}: name that model"
        raise ConversionError(f"{folder} is {what} with --model-base")
    base = local_folder(model_base)
    checkpoint = unwrapped(stored_tensors(base), EMBEDDING_KEY, base)
    if is_adapter(folder):
        return base, merged_tensors(folder, checkpoint, base)
    return base, checkpoint | file_tensors(projector)


def _check_apart(destination: Path, *sources: Path | None) -> None:
    """Neither may the new folder be part of what is read, nor may replacing it remove what is read."""
    for source in (path.resolve() for path in sources if path is not None):
        if destination.is_relative_to(source) or source.is_relative_to(destination):
            raise ConversionError(f"{destination} and {source} overlap: name a folder outside of what is converted")


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Names the file or folder that other code could not handle, in whatever way it says so."""
    try:
        yield
    except Exception as error:  # every library has its own types for a value it does not like
        text = " ".join(str(error).split())
        text = text if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {text}"
        raise ConversionError(text if str(file) in text else f"{file}: {text}") from error


def _check_vocabulary(
    original: dict[str, Any], checkpoint: dict[str, StoredTensor], tokenizer: PreTrainedTokenizerBase, folder: Path
) -> int:
    """The number of rows of the original's embedding, which its config and tokenizer must agree with."""
    embedding = checkpoint.get(EMBEDDING_KEY)
    if embedding is None:
        raise ConversionError(
            f"{folder}: {EMBEDDING_KEY} is missing from the weights, which have {len(checkpoint)} others, as "
            f"{next(iter(checkpoint), 'none')}: is it a whole LLaVA checkpoint?"
        )
    rows = embedding.shape[0]
    if original.get("vocab_size", rows) != rows:
        raise ConversionError(
            f"{embedding.file}: {embedding.key} has {rows} rows, but {folder / 'config.json'} has vocab_size "
            f"{original['vocab_size']}: correct either"
        )
    if original.get("mm_use_im_start_end") and tokenizer.convert_tokens_to_ids("<im_start>") >= rows:
        raise ConversionError(
            f"{folder / 'config.json'}: mm_use_im_start_end is true, but the embedding has no row for <im_start>: set "
            "it to false, or use the checkpoint's own tokenizer files"
        )
    return rows


def _with_vocabulary(arguments: dict[str, Any], tokenizer: PreTrainedTokenizerBase, rows: int) -> dict[str, Any]:
    """Room for the tokens that are new here, in whole multiples."""
    ids = max(tokenizer.get_vocab().values()) + 1  # added tokens may leave gaps, which len(tokenizer) does not count
    multiples = -(-max(rows, ids) // VOCABULARY_MULTIPLE)
    text_config = {
        **arguments["text_config"],
        "vocab_size": multiples * VOCABULARY_MULTIPLE,
        "pad_token_id": tokenizer.pad_token_id,
    }
    image_token_id = tokenizer.convert_tokens_to_ids(tokenizer.image_token)
    return {**arguments, "text_config": text_config, "image_token_id": image_token_id}


def _generation_config(
    original: dict[str, Any], folder: Path, tokenizer: PreTrainedTokenizerBase, chat_template: str
) -> GenerationConfig:
    """Token ids, and how to sample where the original samples.

    The original ships a temperature without `do_sample`, which has no effect and which transformers 5 refuses to save,
    and a `max_length` that counts the prompt, about which every call with `max_new_tokens` would warn. To be greedy is
    written down because `pipeline` samples where a checkpoint says nothing.
    """
    file = folder / "generation_config.json"
    given = {**original, **(read_json(file) if file.exists() else {})}
    kept = {"do_sample": False}
    if given.get("do_sample"):
        kept = {key: given[key] for key in _SAMPLING_SETTINGS if key in given}
    ends = given.get("eos_token_id", tokenizer.eos_token_id)
    if chat_template == "chatml":  # whose turns end with a token that need not be the vocabulary's end of sentence
        turn_end = tokenizer.get_vocab().get("<|im_end|>")
        ends = sorted({*(ends if isinstance(ends, list) else [ends]), turn_end} - {None})
    return GenerationConfig(
        bos_token_id=given.get("bos_token_id", tokenizer.bos_token_id),
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
        **kept,
    )
