"""A checkpoint of transformers' own LLaVA or LLaVA-NeXT as a `Source`, in the layouts that releases from 4.36 on save."""

import logging
from pathlib import Path
from typing import Any, Literal

from transformers import AutoConfig, AutoProcessor, PreTrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from modeling_m3 import M3LlavaConfig
from modeling_m3.parts_m3 import LEADING_TOKENS
from modeling_m3.visual_tokens import check_pinpoints

from .chat_templates import chat_template_for, choose_chat_template
from .lora import merge_adapter
from .mapping import TRANSFORMERS_KEYS, VOCABULARY_NAMES, remap_key
from .original import ConversionError, StoredTensor, check_content, read_json, same_values, stored_tensors, unwrapped
from .plain_text import plain_text
from .source import Source, build_processor, generation_config, naming
from .vision import preprocessing_arguments, read_preprocessing


logger = logging.getLogger(__name__)

Tiling = Literal["original", "transformers"]
MODEL_TYPES = ("llava", "llava_next")
LANGUAGE_MODELS = ("llama", "mistral", "qwen2")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json")


def is_transformers_layout(config: dict[str, Any]) -> bool:
    """Whether a `config.json` is one of transformers' LLaVA classes. The first original LLaVA was a `llava` too."""
    return config.get("model_type") in MODEL_TYPES and "text_config" in config


def read_transformers(
    folder: Path, adapter: Path | None, *, name: str, chat_template: str | None, tiling: Tiling
) -> Source:
    """Reads all but the weights' values.

    Args:
        folder: the checkpoint.
        adapter: the folder of one that PEFT trained on it and saved.
        name: by which a chat template is chosen where the checkpoint has none.
        chat_template: a key of `CHAT_TEMPLATES` in place of the checkpoint's own.
        tiling: how LLaVA-NeXT's pictures are cut. Its resolutions are the original's (width, height) pairs, which
            transformers reads as (height, width): "original" reads them as the original does, as the model was trained.

    Raises:
        ConversionError: what is wrong with the checkpoint, or that it is of a kind that does not convert.
    """
    config_file = folder / "config.json"
    given = read_json(config_file)
    _check_kind(given, config_file)
    with naming(config_file), plain_text(folder) as plain:
        theirs = AutoConfig.from_pretrained(plain)
    prefixes = ("language_model.model.", "model.language_model.")
    strategy = theirs.vision_feature_select_strategy
    if theirs.vision_config.model_type == "siglip_vision_model":
        strategy = _without_class_token(strategy, config_file)
    tensors = unwrapped(stored_tensors(folder), "embed_tokens.weight", folder, prefixes)
    table: dict[str, str | None] = TRANSFORMERS_KEYS
    if adapter is not None:
        tensors, table = _with_adapter(tensors, folder, adapter)
    ties = _ties(theirs, tensors, folder)
    pinpoints = _pinpoints(theirs, tiling)
    with naming(config_file):
        config = M3LlavaConfig(
            vision_config=theirs.vision_config.to_dict(),
            text_config={**theirs.text_config.to_dict(), "tie_word_embeddings": ties},
            image_token_id=theirs.image_token_id,
            vision_feature_layer=theirs.vision_feature_layer,
            vision_feature_select_strategy=strategy,
            projector_hidden_act=theirs.projector_hidden_act,
            multimodal_projector_bias=getattr(theirs, "multimodal_projector_bias", True),
            image_grid_pinpoints=pinpoints,
            patch_merge_type="flat" if pinpoints is None else "spatial_unpad",
            tie_word_embeddings=ties,
        )
    config.trained_scales = [max(config.visual_token_scales)]
    for file in (folder / file_name for file_name in _TOKENIZER_FILES):
        if file.is_file():
            with open(file, "rb") as opened:
                check_content(file, opened.read(100))
    with naming(folder), plain_text(folder) as plain:
        own = AutoProcessor.from_pretrained(plain)
        tokenizer = _tokenizer(own.tokenizer, str(own.image_token), config, config_file)
        template = None if chat_template else getattr(own, "chat_template", None) or own.tokenizer.chat_template
        if not isinstance(template, str):  # old releases stored none
            template = chat_template_for(tokenizer, chat_template or _chosen(config, name))
        processor = build_processor(config, tokenizer, template, **{"do_pad": False, **_preprocessing(folder, config)})
    return Source(
        config=config,
        tensors=[(tensors, table)],
        rows=config.text_config.vocab_size,
        processor=processor,
        generation_config=generation_config(
            theirs.text_config.to_dict(), folder, tokenizer, chat_template or "", config.text_config.vocab_size
        ),
        folders=(folder, adapter),
    )


def _check_kind(config: dict[str, Any], file: Path) -> None:
    """Raises `ConversionError` for what no release of transformers makes of LLaVA, or M3 has no place for."""
    quantized = config.get("quantization_config")
    if quantized:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise ConversionError(f"{file}: its weights are quantized ({method}): start from the full-precision checkpoint")
    for part, supported in (("text_config", LANGUAGE_MODELS), ("vision_config", tuple(LEADING_TOKENS))):
        described = config.get(part)
        kind = described.get("model_type", supported[0]) if isinstance(described, dict) else supported[0]
        if kind not in supported:
            raise ConversionError(
                f"{file}: the model_type of {part} is {kind!r}: {', '.join(supported)} are supported, as of now"
            )
    layer = config.get("vision_feature_layer", -2)
    if not isinstance(layer, int):
        raise ConversionError(f"{file}: vision_feature_layer is {layer!r}: only the output of one layer is supported")
    if config.get("use_image_newline_parameter") is False:
        raise ConversionError(
            f"{file}: use_image_newline_parameter is false: rows of tiles without a newline are not supported"
        )


def _without_class_token(strategy: str, file: Path) -> str:
    """Ours for a tower whose tokens are all of patches, of which transformers' "full" keeps every one.

    Its "default" drops the first all the same, as if it were a class token.
    """
    if strategy != "full":
        raise ConversionError(
            f"{file}: vision_feature_select_strategy is {strategy!r}, which drops SigLIP's first patch: what is left is no square "
            "grid, and only 'full' is supported with this tower"
        )
    return "default"


def _name(key: str) -> str | None:
    try:
        return remap_key(key, TRANSFORMERS_KEYS)
    except KeyError:
        return key  # the plan names it


def _ties(config: PreTrainedConfig, tensors: dict[str, StoredTensor], folder: Path) -> bool:
    """Whether head and embedding are one: not where both are stored with other values, as transformers loads them."""
    named = {_name(key): tensor for key, tensor in tensors.items()}
    if not (config.tie_word_embeddings or getattr(config.text_config, "tie_word_embeddings", False)):
        return False
    if named.keys() >= {*VOCABULARY_NAMES} and not same_values(*(named[name] for name in VOCABULARY_NAMES)):
        logger.warning(
            "%s: tie_word_embeddings is true, but lm_head.weight has values of its own: they are kept", folder
        )
        return False
    return True


def _with_adapter(
    tensors: dict[str, StoredTensor], folder: Path, adapter: Path
) -> tuple[dict[str, StoredTensor], dict[str, str | None]]:
    """The tensors by their names here, which do not differ from release to release, with the adapter merged."""
    named = {_name(key): tensor for key, tensor in tensors.items()}
    named.pop(None, None)
    names = {name: name for name in TRANSFORMERS_KEYS.values() if name is not None}
    return merge_adapter(adapter, named, folder, _name), names


def _pinpoints(config: PreTrainedConfig, tiling: Tiling) -> list[list[int]] | None:
    if config.model_type != "llava_next":
        return None
    check_pinpoints(config.image_grid_pinpoints, config.vision_config.image_size)
    pairs = [list(pair) for pair in config.image_grid_pinpoints]
    return pairs if tiling == "transformers" else [pair[::-1] for pair in pairs]


def _preprocessing(folder: Path, config: M3LlavaConfig) -> dict[str, Any]:
    settings = read_preprocessing(folder)
    found = preprocessing_arguments(settings)
    if (
        settings.get("do_pad")
        and settings.get("image_processor_type", "").removesuffix("Fast") == "LlavaImageProcessor"
    ):
        found["do_pad"] = True  # to a square; LLaVA-NeXT's word for padding its tiles
    side = config.vision_config.image_size
    return {"crop_size": {"height": side, "width": side}, **found}


def _tokenizer(
    own: PreTrainedTokenizerBase, image_token: str, config: M3LlavaConfig, file: Path
) -> PreTrainedTokenizerFast:
    """The checkpoint's own, without what its class would make of it anew."""
    if not own.is_fast:
        raise ConversionError(f"{file.parent}: its tokenizer is a {type(own).__name__}, of which there is no fast one")
    if config.image_token_id < 0 or own.convert_ids_to_tokens(config.image_token_id) is None:
        raise ConversionError(
            f"{file}: image_token_index is {config.image_token_id}, but the tokenizer has no such token: correct either"
        )
    image_token_id = own.get_vocab().get(image_token)
    if image_token_id is None:
        raise ConversionError(
            f"{file.parent}: its processor writes {image_token!r} for a picture, which the tokenizer has no token for: use the "
            "tokenizer files of this checkpoint"
        )
    if image_token_id != config.image_token_id:
        raise ConversionError(
            f"{file}: image_token_index is {config.image_token_id}, but its processor writes {image_token!r} for a picture, "
            f"which the tokenizer has as {image_token_id}: set it to {image_token_id}, or use the tokenizer files of this checkpoint"
        )
    if image_token_id >= config.text_config.vocab_size:
        raise ConversionError(
            f"{file}: image_token_index is {image_token_id}, but the embedding has {config.text_config.vocab_size} rows: use the "
            "tokenizer files of this checkpoint"
        )
    named = {name: str(token) for name, token in own.special_tokens_map.items() if isinstance(token, str)}
    if (padding := named.get("unk_token") or named.get("eos_token")) is not None:
        named.setdefault("pad_token", padding)  # as LLaVA pads
    return PreTrainedTokenizerFast(
        tokenizer_object=own.backend_tokenizer,
        **{
            name: token for name, token in named.items() if name in ("bos_token", "eos_token", "unk_token", "pad_token")
        },
        image_token=image_token,
        model_max_length=own.model_max_length,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def _chosen(config: M3LlavaConfig, name: str) -> str:
    kind = config.text_config.model_type
    return "chatml" if kind == "qwen2" else choose_chat_template(f"llava_{kind}", name)
