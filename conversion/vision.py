"""Where a checkpoint's vision tower comes from: its weights, its configuration and its preprocessing."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .mapping import CHECKPOINT_VISION_PREFIX
from .original import ConversionError, StoredTensor, local_folder, read_json, stored_tensors, unwrapped


logger = logging.getLogger(__name__)

# `openai/clip-vit-large-patch14-336`, the tower of every released LLaVA-1.5, LLaVA-NeXT and M3 checkpoint.
BUILT_IN_NAME = "clip-vit-large-patch14-336"
BUILT_IN_CONFIG = {
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
_PREPROCESSING_KEYS = {*BUILT_IN_PREPROCESSING, "do_rescale", "rescale_factor", "do_convert_rgb"}


@dataclass(frozen=True)
class VisionTower:
    """What to build tower and image processor from. `tensors` is None where the checkpoint's own weights count."""

    config: dict[str, Any]
    preprocessing: dict[str, Any]
    tensors: dict[str, StoredTensor] | None
    folder: Path | None


def find_vision_tower(
    config: dict[str, Any], folder: Path, checkpoint: dict[str, StoredTensor], named: str | None
) -> VisionTower:
    """Finds the vision tower by the original's rule (`llava/model/multimodal_encoder/clip_encoder.py`).

    A checkpoint's own weights count only where its config says they were trained: `unfreeze_mm_vision_tower: true`.

    Args:
        config: the original `config.json`.
        folder: the checkpoint, beside which a relative `mm_vision_tower` may lie.
        checkpoint: its tensors.
        named: a CLIP folder or Hub id instead of the config's `mm_vision_tower`.

    Raises:
        ConversionError: a tower is needed and not found, or is no CLIP.
    """
    name = named or config.get("mm_vision_tower")
    if not isinstance(name, str) or not name:
        raise ConversionError(
            f"{folder / 'config.json'}: mm_vision_tower is {name!r}: name a CLIP folder with --vision-tower"
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
    tensors = None
    if not inside:
        tensors = unwrapped(stored_tensors(tower), "embeddings.class_embedding", tower, ("", "vision_model."))
    return VisionTower(
        _config(tower), preprocessing_arguments(read_json(tower / "preprocessor_config.json")), tensors, tower
    )


def _config(tower: Path) -> dict[str, Any]:
    """`vision_config` of a CLIPModel, all of a CLIPVisionModel."""
    file = tower / "config.json"
    config = read_json(file)
    if config.get("model_type") not in ("clip", "clip_vision_model"):
        raise ConversionError(f"{file}: model_type {config.get('model_type')!r}: only CLIP vision towers are supported")
    return {**config.get("vision_config", config), "model_type": "clip_vision_model"}


def preprocessing_arguments(config: dict[str, Any]) -> dict[str, Any]:
    """Our image processor's arguments, from another's settings; sizes were plain numbers before transformers 4.25."""
    found = {key: config[key] for key in sorted(_PREPROCESSING_KEYS & config.keys())}
    if isinstance(found.get("size"), int):
        found["size"] = {"shortest_edge": found["size"]}
    if isinstance(found.get("crop_size"), int):
        found["crop_size"] = {"height": found["crop_size"], "width": found["crop_size"]}
    return found
