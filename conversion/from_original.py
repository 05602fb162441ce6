"""An original LLaVA or M3 checkpoint as a `Source`: its configuration, weights, tokenizer and preprocessing."""

import logging
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from modeling_m3 import M3LlavaConfig, M3LlavaProcessor
from modeling_m3.parts_m3 import LEADING_TOKENS

from .chat_templates import chat_template_for, choose_chat_template
from .lora import is_adapter, merged_tensors
from .mapping import (
    CHECKPOINT_KEYS,
    CHECKPOINT_VISION_PREFIX,
    CLIP_KEYS,
    EMBEDDING_KEY,
    HEAD_KEY,
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
    same_values,
    stored_tensors,
    unwrapped,
)
from .source import Source, build_processor, generation_config, naming
from .tokenizer import build_tokenizer
from .vision import VisionTower, find_vision_tower


logger = logging.getLogger(__name__)

VOCABULARY_MULTIPLE = 64  # rows of the embedding, for the sake of matrix kernels


def read_original(
    folder: Path,
    original: dict[str, Any],
    *,
    name: str,
    model_base: str | Path | None,
    vision_tower: str | None,
    chat_template: str | None,
) -> Source:
    """Reads all but the weights' values.

    Args:
        folder: the checkpoint.
        original: its `config.json`.
        name: by which the chat template is chosen where none is given.
        model_base, vision_tower, chat_template: as of `convert`.

    Raises:
        ConversionError: what is wrong with the checkpoint.
    """
    config_file = folder / "config.json"
    arguments = translate_config(original, str(config_file))
    for setting in unknown_settings(original):
        logger.warning("%s: the setting %s is not known and has no effect on what is written", config_file, setting)
    base, checkpoint = _base(folder, model_base)  # has what such a folder may lack: weights and tokenizer
    vision = find_vision_tower(original, folder, checkpoint, vision_tower)
    _fit_to_tower(arguments, vision)
    with naming(base):
        tokenizer = build_tokenizer(base, model_config=original)
    rows = _check_vocabulary(original, checkpoint, tokenizer, folder)
    with naming(config_file):
        config = M3LlavaConfig(**_with_vocabulary(arguments, tokenizer, rows), vision_config=vision.config)
    head = checkpoint.get(HEAD_KEY)
    if config.tie_word_embeddings and head is not None and not same_values(head, checkpoint[EMBEDDING_KEY]):
        # The original's loader ties after it has read the weights (`load_pretrained_model`, by `low_cpu_mem_usage`).
        logger.warning(
            "%s: tie_word_embeddings is true, so that %s, which has values of its own, is left out",
            config_file,
            HEAD_KEY,
        )
    config.trained_scales = config.visual_token_scales
    if not original.get("matryoshka_vis_token_scale"):
        config.trained_scales = [max(config.visual_token_scales)]
    template = chat_template or choose_chat_template(original["model_type"], name)
    with naming(vision.folder or config_file):
        processor = _processor(config, tokenizer, vision, original, template)
    tensors = [(checkpoint, CHECKPOINT_KEYS)]
    if vision.tensors is not None:
        without_vision = {CHECKPOINT_VISION_PREFIX + "{rest}": None, **CHECKPOINT_KEYS}
        tensors = [(checkpoint, without_vision), (vision.tensors, CLIP_KEYS)]
    return Source(
        config=config,
        tensors=tensors,
        rows=rows,
        processor=processor,
        generation_config=generation_config(original, base, tokenizer, template, config.text_config.vocab_size),
        folders=(folder, base, vision.folder),
    )


def _fit_to_tower(arguments: dict[str, Any], vision: VisionTower) -> None:
    """What the settings mean for this tower: layers are counted from the last one there is, and SigLIP's tokens are all of patches.

    Source: the original's way with SigLIP, which takes the last layer out of the tower, and every token of the one before it
    (LLaVA-NeXT's `siglip_encoder.py`).
    """
    if vision.num_missing_layers:
        arguments["vision_feature_layer"] += vision.num_missing_layers
    if LEADING_TOKENS[vision.config["model_type"]] == 0:
        arguments["vision_feature_select_strategy"] = "default"


def _processor(
    config: M3LlavaConfig,
    tokenizer: PreTrainedTokenizerBase,
    vision: VisionTower,
    original: dict[str, Any],
    chat_template: str,
) -> M3LlavaProcessor:
    """The processor that prepares images and prompts as the original does, with a template of `CHAT_TEMPLATES`."""
    template = chat_template_for(tokenizer, chat_template)
    if original.get("mm_use_im_start_end"):
        template = template.replace("<image>", "<im_start><image><im_end>")
    do_pad = original.get("image_aspect_ratio") == "pad"
    return build_processor(config, tokenizer, template, do_pad=do_pad, **vision.preprocessing)


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
