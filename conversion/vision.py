"""Where a checkpoint's vision tower comes from: its weights, its configuration and its preprocessing."""

import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from modeling_m3.parts_m3 import leading_tokens

from .mapping import CHECKPOINT_VISION_PREFIX, CLIP_KEYS, PATCH_EMBEDDING_KEY, TRANSFORMERS_KEYS, remap_key
from .original import ConversionError, StoredTensor, local_folder, read_json, stored_tensors, unwrapped
from .source import naming


logger = logging.getLogger(__name__)

# `openai/clip-vit-large-patch14-336`, the tower of every released LLaVA-1.5, LLaVA-NeXT and M3 checkpoint.
BUILT_IN_NAME = "clip-vit-large-patch14-336"
BUILT_IN_CONFIG = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "projection_dim": 768,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
BUILT_IN_PREPROCESSING = {
    "do_resize": True,
    "size": {"shortest_edge": 336},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 336, "width": 336},
    "do_normalize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
_TOWER_TYPES = {
    "clip": "clip_vision_model",
    "clip_vision_model": "clip_vision_model",
    "siglip": "siglip_vision_model",
    "siglip_vision_model": "siglip_vision_model",
}
_PREPROCESSING_KEYS = {*BUILT_IN_PREPROCESSING, "do_rescale", "rescale_factor", "do_convert_rgb"}


@dataclass(frozen=True)
class VisionTower:
    """What to build tower and image processor from. `tensors` is None where the checkpoint's own weights count.

    `num_missing_layers` are the last ones that a checkpoint's own weights leave out, as LLaVA's code for SigLIP does.
    """

    config: dict[str, Any]
    preprocessing: dict[str, Any]
    tensors: dict[str, StoredTensor] | None
    folder: Path | None
    num_missing_layers: int = 0


def find_vision_tower(
    config: dict[str, Any], folder: Path, checkpoint: dict[str, StoredTensor], named: str | None
) -> VisionTower:
    """Finds the vision tower by the original's rule (`llava/model/multimodal_encoder/clip_encoder.py`).

    A checkpoint's own weights count only where its config says they were trained: `unfreeze_mm_vision_tower: true`.

    Args:
        config: the original `config.json`.
        folder: the checkpoint, beside which a relative `mm_vision_tower` may lie.
        checkpoint: its tensors.
        named: a CLIP or SigLIP folder or Hub id instead of the config's `mm_vision_tower`.

    Raises:
        ConversionError: a tower is needed and not found, or is neither CLIP nor SigLIP.
    """
    name = named or config.get("mm_vision_tower")
    if not isinstance(name, str) or not name:
        raise ConversionError(
            f"{folder / 'config.json'}: mm_vision_tower is {name!r}: name a CLIP or SigLIP folder with --vision-tower"
        )
    trained = bool(config.get("unfreeze_mm_vision_tower", False))
    held = any(key.startswith(CHECKPOINT_VISION_PREFIX) for key in checkpoint)
    if trained and not held and not named:
        raise ConversionError(
            f"{folder / 'config.json'}: unfreeze_mm_vision_tower is true, but the checkpoint holds no vision weights: "
            "give those it was trained with by --vision-tower"
        )
    inside = trained and held
    if inside and named:
        logger.info(
            "the checkpoint's own vision weights count (unfreeze_mm_vision_tower: true): %s gives no weights", named
        )
    if held and not trained:
        logger.info(
            "the checkpoint's own vision weights do not count (no unfreeze_mm_vision_tower: true): %s's do", name
        )

    # As it is called and where it lies: "." has no parent of a name, and a link lies elsewhere.
    beside = (Path(os.path.abspath(folder)).parent / name, folder.resolve().parent / name)
    tower = next((path for path in (Path(name), *beside) if path.is_dir()), None)
    if tower is None and inside and Path(name).name == BUILT_IN_NAME:
        return VisionTower(BUILT_IN_CONFIG, BUILT_IN_PREPROCESSING, None, None)
    if tower is None:
        try:
            tower = local_folder(name, weights=not inside)
        except ConversionError as error:
            raise ConversionError(f"vision tower {error}; name another with --vision-tower") from error
    described = tower_config(tower)
    preprocessing = tower_preprocessing(tower, described)
    if not inside:
        return VisionTower(described, preprocessing, tower_tensors(tower), tower)
    numbered = re.compile(re.escape(f"{CHECKPOINT_VISION_PREFIX}encoder.layers.") + r"(\d+)\.")
    num_held = 1 + max((int(match[1]) for match in map(numbered.match, checkpoint) if match), default=-1)
    with naming(tower / "config.json"):
        missing = AutoConfig.for_model(**described).num_hidden_layers - num_held
    selected = -2 if (layer := config.get("mm_vision_select_layer")) is None else layer
    if missing <= 0 or not isinstance(selected, int) or not selected + missing < 0:
        return VisionTower(described, preprocessing, None, tower)  # what does not fit, the plan says
    return VisionTower({**described, "num_hidden_layers": num_held}, preprocessing, None, tower, missing)


def tower_config(tower: Path) -> dict[str, Any]:
    """What the folder of a CLIP or SigLIP, a whole one or its vision model, says about the vision model.

    Raises:
        ConversionError: it is the folder of something else.
    """
    file = tower / "config.json"
    config = read_json(file)
    kind = config.get("model_type")
    if kind not in _TOWER_TYPES:
        raise ConversionError(
            f"{file}: model_type {kind!r} is not a vision tower that is supported: name the folder of a CLIP or a SigLIP, which "
            "SigLIP 2 at a fixed resolution is too"
        )
    described = config.get("vision_config", config)
    return {**described, "model_type": _TOWER_TYPES[kind]}


def tower_tensors(tower: Path) -> dict[str, StoredTensor]:
    """The tensors of a CLIP or SigLIP folder, whose keys `CLIP_KEYS` reads."""
    return unwrapped(stored_tensors(tower), PATCH_EMBEDDING_KEY, tower, ("", "vision_model."))


def tower_preprocessing(tower: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Our image processor's arguments for a tower with such a configuration, from its folder."""
    found = preprocessing_arguments(read_preprocessing(tower))
    side = config.get("image_size", 224)  # the default of both
    return {"crop_size": {"height": side, "width": side}, **found}  # SigLIP's settings name none, as nothing is cropped


def read_preprocessing(folder: Path) -> dict[str, Any]:
    """The image processor's settings, from where releases before and after 5 keep them."""
    file = folder / "preprocessor_config.json"
    if file.is_file() or not (folder / "processor_config.json").is_file():
        return read_json(file)
    return read_json(folder / "processor_config.json").get("image_processor", {})


@dataclass(frozen=True)
class SomeTower:
    """A vision tower on its own, or one that is taken out of a LLaVA or an M3: what a new model is built from.

    `table` reads the keys of `tensors`; `layer` is the one whose output visual tokens are made of.
    """

    config: dict[str, Any]
    preprocessing: dict[str, Any]
    tensors: dict[str, StoredTensor]
    table: dict[str, str | None]
    folder: Path
    layer: int


def read_tower(name: str | Path) -> SomeTower:
    """The vision tower of a CLIP or SigLIP folder or Hub id, or of an M3, or of a LLaVA of transformers'.

    Raises:
        ConversionError: it is something else, by its name, or it is not whole.
    """
    folder = local_folder(name)
    config = read_json(folder / "config.json")
    if config.get("model_type") not in ("m3_llava", "llava", "llava_next") or "vision_config" not in config:
        described = tower_config(folder)
        settings = tower_preprocessing(folder, described)
        return SomeTower(described, settings, tower_tensors(folder), CLIP_KEYS, folder, layer=-2)
    described = config["vision_config"]
    with naming(folder / "config.json"):
        leading_tokens(AutoConfig.for_model(**{"model_type": "clip_vision_model", **described}))
    named = ((_name(key), tensor) for key, tensor in stored_tensors(folder).items())
    tensors = {name: tensor for name, tensor in named if name is not None and name.startswith("model.vision_tower.")}
    side = described.get("image_size", 224)
    settings = {"crop_size": {"height": side, "width": side}, **preprocessing_arguments(read_preprocessing(folder))}
    layer = config.get("vision_feature_layer", -2)
    if not isinstance(layer, int):
        raise ConversionError(
            f"{folder / 'config.json'}: vision_feature_layer is {layer!r}: only one layer is supported"
        )
    table = {name: name for name in tensors}
    return SomeTower(described, settings, tensors, table, folder, layer)


def _name(key: str) -> str | None:
    try:
        return remap_key(key, TRANSFORMERS_KEYS)
    except KeyError:
        return None  # of a part that is not taken


def preprocessing_arguments(config: dict[str, Any]) -> dict[str, Any]:
    """Our image processor's arguments, from another's settings; sizes were plain numbers before transformers 4.25."""
    found = {key: config[key] for key in sorted(_PREPROCESSING_KEYS & config.keys()) if config[key] is not None}
    if str(config.get("image_processor_type")).startswith("Siglip"):
        found.setdefault("do_center_crop", False)
    if isinstance(found.get("size"), int):
        found["size"] = {"shortest_edge": found["size"]}
    if isinstance(found.get("crop_size"), int):
        found["crop_size"] = {"height": found["crop_size"], "width": found["crop_size"]}
    return found
