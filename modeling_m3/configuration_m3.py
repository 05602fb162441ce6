# Copyright 2026 The M3 for Hugging Face authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Configuration of M3: a LLaVA model (vision tower, projector, language model) whose visual tokens come in nested scales."""

import os
from typing import Any

from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig, strict

from .parts_m3 import leading_tokens, without_head
from .visual_tokens import (
    MERGE_TYPES,
    SAMPLINGS,
    ImageLayout,
    ascending_scales,
    check_choice,
    check_pinpoints,
    check_scales,
    default_scales,
    keeps_class_token,
    split_tiles,
    tile_grid,
)


# What families of language models call the number of positions that they have.
CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len")


# trf-ignore: TRF057 - auto_docstring knows only models in transformers' own tree: here it writes "configuration of a None"
@strict
class M3LlavaConfig(PreTrainedConfig):
    r"""
    Configuration of [`M3LlavaForConditionalGeneration`]. Built with no arguments it is LLaVA-1.5-7B-M3.

    Args:
        vision_config (`dict` or `CLIPVisionConfig` or `SiglipVisionConfig`, *optional*):
            The vision tower; CLIP-ViT-L/14-336 by default. SigLIP's is kept without its pooling head.
        text_config (`dict` or the configuration of any causal language model, *optional*):
            The language model; Llama-7B with room for the `<image>` token by default.
        image_token_id (`int`, *optional*, defaults to 32000):
            Id of the placeholder that stands for one visual token. `image_token_index` is an alias.
        vision_feature_layer (`int`, *optional*, defaults to -2):
            Index into the vision tower's hidden states (0: its embeddings). Later layers are not computed.
        vision_feature_select_strategy (`"default"` or `"full"`, *optional*, defaults to `"default"`):
            `"full"` keeps the class token, the original's `cls_patch`; pooling is then impossible. SigLIP has none to keep.
        projector_hidden_act (`str`, *optional*, defaults to `"gelu"`):
            Activation between the projector's linear layers.
        multimodal_projector_bias (`bool`, *optional*, defaults to `True`):
            Whether the projector's linear layers have a bias.
        multimodal_projector_depth (`int`, *optional*, defaults to 2):
            Number of linear layers in the projector: 2 is the original's `mlp2x_gelu`, 1 `linear`, 0 `identity`.
        visual_token_scales (`list[int]`, *optional*):
            The numbers of visual tokens a tile can be reduced to, ascending in whatever order they are given. For
            CLIP-ViT-L/14-336 `[1, 9, 36, 144, 576]` (paper section 4.1); may be widened with any `(side / k) ** 2` that
            the grid of patches has.
        trained_scales (`list[int]`, *optional*):
            Those of them that it was trained at, which it answers best at; `None` where that is not known, and none of
            them where its projector is new.
        visual_token_sampling (`"average"`, `"spatial"` or `"sequential"`, *optional*, defaults to `"average"`):
            How a tile is reduced: the method, or one of the training-free baselines of paper Table 4.
        patch_merge_type (`"flat"`, `"spatial"` or `"spatial_unpad"`, *optional*, defaults to `"flat"`):
            How the tiles of one image are laid out as a sequence (LLaVA-NeXT).
        image_grid_pinpoints (`list`, *optional*):
            (height, width) pairs in pixels that an image may be resized to before it is cut into tiles (LLaVA-NeXT).
            `None`: every image is one square view (LLaVA-1.5).
        tie_word_embeddings (`bool`, *optional*, defaults to `False`):
            Whether the language model's head shares the weights of its input embedding.
    """

    model_type = "m3_llava"
    attribute_map = {"image_token_index": "image_token_id"}
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}
    _auto_class = "AutoConfig"  # saving copies the code along

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    image_token_id: int = 32000
    vision_feature_layer: int = -2
    vision_feature_select_strategy: str = "default"
    projector_hidden_act: str = "gelu"
    multimodal_projector_bias: bool = True
    multimodal_projector_depth: int = 2
    visual_token_scales: Any = None  # also numpy's or torch's numbers, which become a list of Python's
    trained_scales: list[int] | None = None
    visual_token_sampling: str = "average"
    patch_merge_type: str = "flat"
    image_grid_pinpoints: list | tuple | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        self.vision_config = _sub_config(
            self.vision_config,
            "clip_vision_model",
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
            projection_dim=768,
        )
        self.vision_config = without_head(self.vision_config)
        # 32064: the 32000 pieces of Llama's vocabulary, `<image>`, and padding to a multiple of 64.
        self.text_config = _sub_config(self.text_config, "llama", vocab_size=32064)
        self.tie_word_embeddings = self.tie_word_embeddings or self.text_config.tie_word_embeddings
        super().__post_init__(**kwargs)
        self.auto_map = {
            "AutoConfig": "configuration_m3.M3LlavaConfig",
            "AutoModel": "modeling_m3.M3LlavaModel",
            "AutoModelForImageTextToText": "modeling_m3.M3LlavaForConditionalGeneration",
            "AutoModelForMultimodalLM": "modeling_m3.M3LlavaForConditionalGeneration",
            **(getattr(self, "auto_map", None) or {}),
        }
        check_choice("visual_token_sampling", self.visual_token_sampling, SAMPLINGS)
        check_choice("patch_merge_type", self.patch_merge_type, MERGE_TYPES)
        self._check_tower()
        if self.visual_token_scales is None:
            self.visual_token_scales = default_scales(self.grid_side, self.keeps_class_token)
        if self.image_grid_pinpoints is not None:
            self.image_grid_pinpoints = [list(pair) for pair in self.image_grid_pinpoints]
        self._check()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, ascending_scales(value) if name == "visual_token_scales" else value)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> tuple[dict, dict]:
        """As in transformers.

        Raises `ValueError` for the folder of another model, of which transformers would only warn, and for what names nothing:
        for None, it would ask the Hub for a repository called "None".
        """
        check_name(pretrained_model_name_or_path)
        config, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        model_type = config.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ValueError(
                f"{pretrained_model_name_or_path} is no M3 checkpoint: its model_type is {model_type!r}. A LLaVA can be made one: "
                f"m3-convert {pretrained_model_name_or_path} NEW_FOLDER"
            )
        return config, kwargs

    @property
    def keeps_class_token(self) -> bool:
        """Whether every tile has one visual token more, the class token."""
        return keeps_class_token(self.vision_feature_select_strategy)

    @property
    def num_leading_tokens(self) -> int:
        """Tokens of the vision tower before those of the patches that are left out: the class token, where there is one."""
        return 0 if self.keeps_class_token else leading_tokens(self.vision_config)

    def image_layout(self, grid: tuple[int, int] | None, size: list[int] | None) -> ImageLayout:
        """How this model lays out the visual tokens of an image with such a grid of tiles and (height, width)."""
        return ImageLayout(grid, size, self.patch_merge_type, self.keeps_class_token)

    def image_tiles(
        self, pixel_values: Any, sizes: list | None, grids: list | None, pinpoints: list | None = None
    ) -> tuple[list, list[ImageLayout]]:
        """The tiles of every image, and how its visual tokens are laid out: from what describes images among the inputs.

        Raises `ValueError` for sizes or grids that do not fit the pixels.
        """
        pinpoints = pinpoints or self.image_grid_pinpoints
        if grids is None and sizes and pinpoints and any(image.ndim == 4 and len(image) > 1 for image in pixel_values):
            grids = [tile_grid(size, pinpoints, self.vision_config.image_size) for size in sizes]
        tiles, grids = split_tiles(pixel_values, grids)
        if sizes and len(sizes) != len(grids):
            raise ValueError(
                f"image_sizes has {len(sizes)} rows for {len(grids)} image(s): pass one (height, width) each."
            )
        return tiles, [self.image_layout(*facts) for facts in zip(grids, sizes or [None] * len(grids))]

    @property
    def context_length(self) -> int | None:
        """Tokens of the longest prompt that the language model has positions for; `None` where it knows no limit."""
        named = (getattr(self.text_config, name, None) for name in CONTEXT_NAMES)
        return next((value for value in named if type(value) is int and value > 0), None)

    @property
    def grid_side(self) -> int:
        """Patches along one side of a tile: 24 for CLIP-ViT-L/14-336."""
        return self.vision_config.image_size // self.vision_config.patch_size

    @property
    def num_vision_layers(self) -> int:
        """How many of the vision tower's layers `vision_feature_layer` needs."""
        depth = self.vision_config.num_hidden_layers
        return self.vision_feature_layer if self.vision_feature_layer >= 0 else depth + 1 + self.vision_feature_layer

    def _check_tower(self) -> None:
        """Raises `ValueError` that names what it is about a tower that there is no square grid of patches from."""
        if not leading_tokens(self.vision_config) and self.keeps_class_token:
            raise ValueError(
                f'vision_feature_select_strategy="full" keeps the class token, which a {self.vision_config.model_type} has not: '
                'use "default", which keeps every patch.'
            )
        sides = self.vision_config.image_size, self.vision_config.patch_size
        if not all(isinstance(side, int) for side in sides):
            raise ValueError(
                f"vision_config has image_size={sides[0]!r} and patch_size={sides[1]!r}: each must be one number, as the grid of "
                "patches is a square."
            )

    def _check(self) -> None:
        """Raises `ValueError` that names the value for a combination that no model can be built from."""
        check_scales(self.visual_token_scales, self.grid_side)
        given, only = (self.visual_token_scales, self.patch_merge_type), ([self.grid_side**2], "flat")
        if self.keeps_class_token and given != only:
            raise ValueError(
                f'vision_feature_select_strategy="full" keeps the class token, which belongs to no square grid: it goes with '
                f"visual_token_scales={only[0]} and patch_merge_type={only[1]!r} only, not {given[0]} and {given[1]!r}."
            )
        if self.image_grid_pinpoints is not None:
            check_pinpoints(self.image_grid_pinpoints, self.vision_config.image_size)
        if not 0 <= self.num_vision_layers <= self.vision_config.num_hidden_layers:
            raise ValueError(
                f"vision_feature_layer={self.vision_feature_layer} is not a hidden state of a vision tower with "
                f"{self.vision_config.num_hidden_layers} layers."
            )
        sizes = self.vision_config.hidden_size, self.text_config.hidden_size
        if self.multimodal_projector_depth < 0 or (self.multimodal_projector_depth == 0 and sizes[0] != sizes[1]):
            raise ValueError(
                f"multimodal_projector_depth={self.multimodal_projector_depth}: it must be 1 or more, or 0 (identity) "
                f"where vision tower and language model have the same hidden size (here {sizes[0]} and {sizes[1]})."
            )


def check_name(name: Any) -> None:
    """Raises `ValueError` for what is neither the name of a folder nor an id on the Hub."""
    if not isinstance(name, (str, os.PathLike)) or not str(name).strip():
        raise ValueError(f"{name!r} names no checkpoint: give its folder, or its id on the Hub.")


def _sub_config(config: dict | PreTrainedConfig | None, model_type: str, **defaults) -> PreTrainedConfig:
    """The configuration that a dict describes; `model_type` with `defaults` where there is none."""
    if isinstance(config, PreTrainedConfig):
        return config
    if config is None:
        return AutoConfig.for_model(model_type, **defaults)
    return AutoConfig.for_model(**{"model_type": model_type, **config})


__all__ = ["M3LlavaConfig"]
