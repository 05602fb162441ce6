"""What an original's weights and settings are called here: the table of keys and the tables of the configuration."""

import ast
import re
from typing import Any

from .original import ConversionError


# The vision encoder of CLIP or SigLIP, as a name within it. Checkpoints and their own folders hold it under different prefixes.
_VISION_KEYS = {
    "embeddings.class_embedding": "model.vision_tower.embeddings.class_embedding",
    "embeddings.patch_embedding.weight": "model.vision_tower.embeddings.patch_embedding.weight",
    "embeddings.patch_embedding.bias": "model.vision_tower.embeddings.patch_embedding.bias",  # SigLIP's
    "embeddings.position_embedding.weight": "model.vision_tower.embeddings.position_embedding.weight",
    "pre_layrnorm.weight": "model.vision_tower.pre_layrnorm.weight",
    "pre_layrnorm.bias": "model.vision_tower.pre_layrnorm.bias",
    "encoder.layers.{i}.layer_norm1.weight": "model.vision_tower.encoder.layers.{i}.layer_norm1.weight",
    "encoder.layers.{i}.layer_norm1.bias": "model.vision_tower.encoder.layers.{i}.layer_norm1.bias",
    "encoder.layers.{i}.self_attn.q_proj.weight": "model.vision_tower.encoder.layers.{i}.self_attn.q_proj.weight",
    "encoder.layers.{i}.self_attn.q_proj.bias": "model.vision_tower.encoder.layers.{i}.self_attn.q_proj.bias",
    "encoder.layers.{i}.self_attn.k_proj.weight": "model.vision_tower.encoder.layers.{i}.self_attn.k_proj.weight",
    "encoder.layers.{i}.self_attn.k_proj.bias": "model.vision_tower.encoder.layers.{i}.self_attn.k_proj.bias",
    "encoder.layers.{i}.self_attn.v_proj.weight": "model.vision_tower.encoder.layers.{i}.self_attn.v_proj.weight",
    "encoder.layers.{i}.self_attn.v_proj.bias": "model.vision_tower.encoder.layers.{i}.self_attn.v_proj.bias",
    "encoder.layers.{i}.self_attn.out_proj.weight": "model.vision_tower.encoder.layers.{i}.self_attn.out_proj.weight",
    "encoder.layers.{i}.self_attn.out_proj.bias": "model.vision_tower.encoder.layers.{i}.self_attn.out_proj.bias",
    "encoder.layers.{i}.layer_norm2.weight": "model.vision_tower.encoder.layers.{i}.layer_norm2.weight",
    "encoder.layers.{i}.layer_norm2.bias": "model.vision_tower.encoder.layers.{i}.layer_norm2.bias",
    "encoder.layers.{i}.mlp.fc1.weight": "model.vision_tower.encoder.layers.{i}.mlp.fc1.weight",
    "encoder.layers.{i}.mlp.fc1.bias": "model.vision_tower.encoder.layers.{i}.mlp.fc1.bias",
    "encoder.layers.{i}.mlp.fc2.weight": "model.vision_tower.encoder.layers.{i}.mlp.fc2.weight",
    "encoder.layers.{i}.mlp.fc2.bias": "model.vision_tower.encoder.layers.{i}.mlp.fc2.bias",
    "post_layernorm.weight": "model.vision_tower.post_layernorm.weight",
    "post_layernorm.bias": "model.vision_tower.post_layernorm.bias",
    "embeddings.position_ids": None,  # 0, 1, 2, ...: the model makes it itself
    # SigLIP's head, which pools a picture to one vector.
    "head.probe": None,
    **{f"head.attention.in_proj_{kind}": None for kind in ("weight", "bias")},
    **{
        f"head.{part}.{kind}": None
        for part in ("attention.out_proj", "layernorm", "mlp.fc1", "mlp.fc2")
        for kind in ("weight", "bias")
    },
}
CHECKPOINT_VISION_PREFIX = "model.vision_tower.vision_tower.vision_model."

# The language model without its head. {i}: the same number on both sides.
_LANGUAGE_KEYS = {
    "embed_tokens.weight": "model.language_model.embed_tokens.weight",
    "layers.{i}.input_layernorm.weight": "model.language_model.layers.{i}.input_layernorm.weight",
    "layers.{i}.self_attn.q_proj.weight": "model.language_model.layers.{i}.self_attn.q_proj.weight",
    "layers.{i}.self_attn.q_proj.bias": "model.language_model.layers.{i}.self_attn.q_proj.bias",
    "layers.{i}.self_attn.k_proj.weight": "model.language_model.layers.{i}.self_attn.k_proj.weight",
    "layers.{i}.self_attn.k_proj.bias": "model.language_model.layers.{i}.self_attn.k_proj.bias",
    "layers.{i}.self_attn.v_proj.weight": "model.language_model.layers.{i}.self_attn.v_proj.weight",
    "layers.{i}.self_attn.v_proj.bias": "model.language_model.layers.{i}.self_attn.v_proj.bias",
    "layers.{i}.self_attn.o_proj.weight": "model.language_model.layers.{i}.self_attn.o_proj.weight",
    "layers.{i}.self_attn.o_proj.bias": "model.language_model.layers.{i}.self_attn.o_proj.bias",
    "layers.{i}.post_attention_layernorm.weight": "model.language_model.layers.{i}.post_attention_layernorm.weight",
    "layers.{i}.mlp.gate_proj.weight": "model.language_model.layers.{i}.mlp.gate_proj.weight",
    "layers.{i}.mlp.up_proj.weight": "model.language_model.layers.{i}.mlp.up_proj.weight",
    "layers.{i}.mlp.down_proj.weight": "model.language_model.layers.{i}.mlp.down_proj.weight",
    "norm.weight": "model.language_model.norm.weight",
    "layers.{i}.self_attn.rotary_emb.inv_freq": None,  # computed from rope_theta; saved before transformers 4.32
}

# A LLaVA checkpoint's keys. {n}: {i} // 2 + 1, the linear layer's count, as the activations between them have odd
# numbers. None: dropped on purpose. A key without a row is an error.
CHECKPOINT_KEYS: dict[str, str | None] = {
    **{"model." + key: name for key, name in _LANGUAGE_KEYS.items()},
    "lm_head.weight": "lm_head.weight",
    "model.mm_projector.weight": "model.multi_modal_projector.linear_1.weight",
    "model.mm_projector.bias": "model.multi_modal_projector.linear_1.bias",
    "model.mm_projector.{i}.weight": "model.multi_modal_projector.linear_{n}.weight",
    "model.mm_projector.{i}.bias": "model.multi_modal_projector.linear_{n}.bias",
    "model.image_newline": "model.image_newline",
    **{CHECKPOINT_VISION_PREFIX + key: name for key, name in _VISION_KEYS.items()},
}

# Those of transformers' own LLaVA, as releases from 4.36 on save it, or name it once it is loaded, as adapters do.
TRANSFORMERS_KEYS: dict[str, str | None] = {
    **{
        p + key: name
        for p in ("language_model.model.", "model.language_model.")
        for key, name in _LANGUAGE_KEYS.items()
    },
    **{
        p + key: name
        for p in (
            "vision_tower.vision_model.",
            "vision_tower.",
            "model.vision_tower.vision_model.",
            "model.vision_tower.",
        )
        for key, name in _VISION_KEYS.items()
    },
    **{
        f"{p}multi_modal_projector.linear_{n}.{kind}": f"model.multi_modal_projector.linear_{n}.{kind}"
        for p in ("", "model.")
        for n in (1, 2)
        for kind in ("weight", "bias")
    },
    "image_newline": "model.image_newline",
    "model.image_newline": "model.image_newline",
    "language_model.lm_head.weight": "lm_head.weight",
    "lm_head.weight": "lm_head.weight",
}

# Names of the parameters with a row for every token.
VOCABULARY_NAMES = ("model.language_model.embed_tokens.weight", "lm_head.weight")
EMBEDDING_KEY = "model.embed_tokens.weight"  # which every language model has
HEAD_KEY = "lm_head.weight"  # which those have that do not tie it to the embedding
PATCH_EMBEDDING_KEY = "embeddings.patch_embedding.weight"  # which every vision tower has

# The keys of a CLIP or SigLIP folder, for a checkpoint whose own vision weights do not count.
CLIP_KEYS: dict[str, str | None] = {
    **{"vision_model." + key: name for key, name in _VISION_KEYS.items()},
    **_VISION_KEYS,  # a vision model saved by transformers 5
    "visual_projection.weight": None,  # into the space shared with text, which LLaVA does not use
    "text_projection.weight": None,
    "logit_scale": None,
    "logit_bias": None,
    "text_model.{rest}": None,
}

# Names that the tables give and a model may do without: dropped where the configuration builds no such parameter.
OPTIONAL_NAMES = (
    "model.image_newline",  # read only where tiles are unpadded: anyres with spatial_unpad
    "lm_head.weight",  # tied to the embedding
)

LANGUAGE_MODELS = {
    "llava": "llama",  # LLaVA-1.5 as first released
    "llava_llama": "llama",
    "llava_mistral": "mistral",
}

# Settings that the language model's configuration has under the same name.
_TEXT_CONFIG_KEYS = {
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"),
    *("num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache"),
    *("pad_token_id", "bos_token_id", "eos_token_id", "rope_theta", "rope_scaling", "attention_dropout"),
    *("tie_word_embeddings", "attention_bias", "mlp_bias", "pretraining_tp", "sliding_window"),
}
# Defaults of the transformers 4.37 that the original ran on, where a setting is absent; later releases moved some.
_TEXT_CONFIG_DEFAULTS = {
    "llama": {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 10000.0},
    "mistral": {
        **{"max_position_embeddings": 131072, "rms_norm_eps": 1e-6, "rope_theta": 10000.0},
        **{"sliding_window": 4096, "num_key_value_heads": 8},
    },
}

# Settings that the conversion reads, here or elsewhere.
_READ_CONFIG_KEYS = {
    *("model_type", "torch_dtype", "dtype", "mm_vision_tower", "unfreeze_mm_vision_tower", "image_aspect_ratio"),
    *("matryoshka_vis_token_scale", "mm_patch_merge_type", "mm_vision_select_layer", "mm_vision_select_feature"),
    *("mm_projector_type", "image_grid_pinpoints", "mm_use_im_start_end", "mm_use_im_patch_token"),
    *("do_sample", "temperature", "top_p", "top_k"),
}
# Settings with no effect on an answer: of training, of other files, or a repetition of what the weights' shapes say.
_IGNORED_CONFIG_KEYS = {
    *("architectures", "transformers_version", "_name_or_path", "auto_map", "tokenizer_class", "max_length"),
    *("freeze_mm_mlp_adapter", "freeze_mm_vision_resampler", "tune_mm_mlp_adapter", "tune_mm_vision_resampler"),
    *("pretrain_mm_mlp_adapter", "mm_projector_lr", "mm_vision_tower_lr", "use_mm_proj", "mm_hidden_size"),
    *("mm_resampler_type", "tokenizer_padding_side", "tokenizer_model_max_length", "tune_entire_model"),
    *("image_crop_resolution", "image_split_resolution", "max_sequence_length", "vision_tower", "vision_tower_lr"),
    *("attn_implementation", "_attn_implementation", "_attn_implementation_autoset", "_flash_attn_2_enabled"),
    "gradient_checkpointing",
}
_REFUSED_CONFIG_KEYS = {
    "quantization_config": "quantized weights cannot be converted: start from the full-precision checkpoint",
    "s2": "multi-scale (S2) vision towers are not supported",
}


def remap_key(key: str, table: dict[str, str | None]) -> str | None:
    """The name here of an original key; None where the table drops it on purpose.

    Raises:
        KeyError: the table has no row for it.
    """
    if table.get(key) == key:  # tables of a whole model's names have no other rows, and many of them
        return key
    for template, name in table.items():
        match = re.fullmatch(_pattern(template), key)
        if match and name is None:
            return None
        if match:
            i = int(match.groupdict().get("i", 0))
            if "{n}" in name and i % 2:
                break
            return name.format(i=i, n=i // 2 + 1)
    raise KeyError(key)


def original_keys(name: str, table: dict[str, str | None]) -> list[str]:
    """The keys that the table would have taken a name here from."""
    keys = []
    for template, new_template in table.items():
        match = re.fullmatch(_pattern(new_template), name) if new_template else None
        if match:
            numbers = match.groupdict()
            keys.append(template.format(i=numbers.get("i") or 2 * (int(numbers.get("n") or 1) - 1)))
    return keys


def translate_config(original: dict[str, Any], source: str) -> dict[str, Any]:
    """The arguments of `M3LlavaConfig` but for `vision_config`, from an original `config.json` that `source` names.

    Raises:
        ConversionError: a setting that is not supported or makes no sense, by its name and value.
    """

    def refuse(key: str, advice: str) -> ConversionError:
        return ConversionError(f"{source}: {key} is {original[key]!r}: {advice}")

    for key, advice in _REFUSED_CONFIG_KEYS.items():
        if original.get(key):
            raise refuse(key, advice)
    pinpoints, merge_type = None, "flat"  # one view per image: there is nothing to merge
    aspect_ratio = original.get("image_aspect_ratio") or "square"
    if aspect_ratio == "anyres":
        pinpoints = _pinpoints(original.get("image_grid_pinpoints"), source)
        merge_type = original.get("mm_patch_merge_type") or "flat"
    elif aspect_ratio not in ("square", "pad"):
        raise refuse("image_aspect_ratio", "only square, pad and anyres are supported")
    if merge_type not in ("flat", "spatial", "spatial_unpad"):
        raise refuse("mm_patch_merge_type", "only flat, spatial and spatial_unpad are supported")
    select = original.get("mm_vision_select_feature") or "patch"
    if select not in ("patch", "cls_patch"):
        raise refuse("mm_vision_select_feature", "only patch and cls_patch are supported")
    scales = _scales(original.get("matryoshka_vis_token_scale"), source)
    if select == "cls_patch":  # a class token cannot be pooled: the one scale there is, which the model's config finds
        scales = None
    return {
        "text_config": _text_config(original, source),
        "vision_feature_layer": -2 if (layer := original.get("mm_vision_select_layer")) is None else layer,
        "vision_feature_select_strategy": {"patch": "default", "cls_patch": "full"}[select],
        "multimodal_projector_depth": _projector_depth(original.get("mm_projector_type") or "linear", source),
        "visual_token_scales": scales,
        "patch_merge_type": merge_type,
        "image_grid_pinpoints": pinpoints,
        "tie_word_embeddings": bool(original.get("tie_word_embeddings", False)),
    }


def unknown_settings(original: dict[str, Any]) -> list[str]:
    """The settings that no table knows, which therefore have no effect here."""
    return sorted(
        set(original) - _TEXT_CONFIG_KEYS - _READ_CONFIG_KEYS - _IGNORED_CONFIG_KEYS - set(_REFUSED_CONFIG_KEYS)
    )


def _pattern(template: str) -> str:
    return (
        re.escape(template).replace(r"\{i\}", r"(?P<i>\d+)").replace(r"\{n\}", r"(?P<n>\d+)").replace(r"\{rest\}", ".+")
    )


def _text_config(original: dict[str, Any], source: str) -> dict[str, Any]:
    model_type = original.get("model_type")
    if model_type == "m3_llava":
        raise ConversionError(f"{source}: model_type {model_type!r}: it is an M3 already, which loads as it is")
    if "text_config" in original:
        raise ConversionError(
            f"{source}: model_type {model_type!r} is no LLaVA: the original's and transformers' LLaVA and LLaVA-NeXT convert"
        )
    if "mpt" in str(model_type):
        raise ConversionError(f"{source}: model_type {model_type!r}: MPT language models are not supported")
    if model_type not in LANGUAGE_MODELS:
        known = ", ".join(LANGUAGE_MODELS)
        raise ConversionError(
            f"{source}: model_type {model_type!r} is not an original LLaVA's: it must be one of {known}"
        )
    language_model = LANGUAGE_MODELS[model_type]
    given = {key: value for key, value in original.items() if key in _TEXT_CONFIG_KEYS}
    given["tie_word_embeddings"] = bool(given.get("tie_word_embeddings"))
    return {"model_type": language_model, **_TEXT_CONFIG_DEFAULTS[language_model], **given}


def _projector_depth(projector_type: str, source: str) -> int:
    """How many linear layers: `mlp2x_gelu` names them (the original's `build_vision_projector`)."""
    match = re.fullmatch(r"mlp(\d+)x_gelu", projector_type)
    if match:
        return int(match[1])
    if projector_type not in ("linear", "identity"):
        advice = "only linear, mlp2x_gelu (any number) and identity are supported"
        raise ConversionError(f"{source}: mm_projector_type is {projector_type!r}: {advice}")
    return int(projector_type == "linear")


def _scales(scales: Any, source: str) -> list[int] | None:
    """A list, or its text: lists given on a command line were saved as they were typed."""
    if not scales:
        return None
    try:
        numbers = re.findall(r"[^\s,\[\]()]+", scales) if isinstance(scales, str) else scales
        return sorted({int(number) for number in numbers})
    except (TypeError, ValueError) as error:
        advice = "it must be a list of numbers of visual tokens, as [1, 9, 36, 144, 576]"
        raise ConversionError(f"{source}: matryoshka_vis_token_scale is {scales!r}: {advice}") from error


def _pinpoints(pinpoints: Any, source: str) -> list[list[int]]:
    """(width, height) pairs, or their text, as (height, width) pairs in the same order: on ties the first one wins."""
    try:
        pairs = ast.literal_eval(pinpoints) if isinstance(pinpoints, str) else pinpoints
        return [[int(height), int(width)] for width, height in pairs]
    except (TypeError, ValueError, SyntaxError) as error:
        advice = "anyres needs a list of (width, height) pairs, as [[336, 672], [672, 336], [672, 672]]"
        raise ConversionError(f"{source}: image_grid_pinpoints is {pinpoints!r}: {advice}") from error
