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
"""What the M3 model takes, in the words of its documentation, and what it returns."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
    ModelOutput,
)
from transformers.utils import auto_docstring

from .visual_tokens import ImageLayout


# Before 5.24 the cache, in arguments of `forward` and in outputs, is `past_key_values`; then `cache`.
CACHE_NAME = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


IMAGE_ARGUMENTS = r"""
    pixel_values (`torch.FloatTensor` of shape `(images, channels, height, width)` or `(images, tiles, channels, height, width)`, or a list with one tensor per image, *optional*):
        One view per image, or its tiles, zeros after the last.
    image_sizes (`torch.LongTensor` of shape `(images, 2)`, *optional*):
        (height, width) of the original images in pixels. Needed where the padding of tiles is cut off.
    num_visual_tokens (`torch.LongTensor` of shape `(images,)`, `list[int]` or `int`, *optional*):
        Visual tokens per tile, for all images or for each. The finest scale by default, and where the processor wrote 0
        for `"auto"`, among which `generate` chooses.
    visual_token_sampling (`str`, *optional*):
        `"average"`, `"spatial"` or `"sequential"`; the configuration's by default.
    image_tile_grids (`torch.LongTensor` of shape `(images, 2)`, *optional*):
        (rows, columns) of tiles of every image, (0, 0) for one view, as the processor cut them.
    image_grid_pinpoints (`list[list[int]]`, *optional*):
        For pixels without their grids: the (height, width) pairs they were cut by; the configuration's by default.
"""
FORWARD_ARGUMENTS = f"""{IMAGE_ARGUMENTS}
    mm_encoder_outputs (`dict`, *optional*):
        `{{"image": get_image_features(...)}}`, in place of `pixel_values`.
    encoded_images (`M3LlavaEncodedImages`, *optional*):
        `encode_images(...)`, in place of `pixel_values`, for any `num_visual_tokens` without the vision tower.
    past_key_values (`Cache`, *optional*):
        Keys and values of the tokens before `input_ids`.
    cache (`Cache`, *optional*):
        The same. Before 5.24 only the other name was known.
"""
TRAINING_ARGUMENTS = f"""{FORWARD_ARGUMENTS}
    matryoshka_scales (`list[int]`, *optional*):
        Train at these numbers of visual tokens at once: `loss` is then the average of the losses at each of them
        (`scale_losses`). `input_ids` and `labels`, or `shift_labels`, are made at the largest, or at a larger one. See
        `objective_m3.py`.
"""


@dataclass
class M3LlavaEncodedImages(ModelOutput):
    """
    Images after vision tower and projector, before pooling: all that their visual tokens, at every scale, are made from.

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(all tiles, 1 + patches, vision hidden size)`):
            The output of the vision tower's selected layer.
        tile_features (`torch.FloatTensor` of shape `(all tiles, tokens per tile, hidden_size)`):
            What the projector made of it: the finest visual tokens of every tile, image after image.
        layouts (`list[ImageLayout]`):
            How the visual tokens of every image are laid out, and how many tiles it has.
        timestamps (`list[float]`, *optional*):
            Of a video, when each frame is shown, in seconds.
        hidden_states, attentions (`tuple[torch.FloatTensor]`, *optional*):
            The vision tower's, if they were asked for.
    """

    last_hidden_state: torch.FloatTensor | None = None
    tile_features: torch.FloatTensor | None = None
    layouts: list[ImageLayout] | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    timestamps: list[float] | None = None

    @classmethod
    def cat(cls, encoded: "Sequence[M3LlavaEncodedImages]") -> "M3LlavaEncodedImages":
        """Images and frames that were encoded one after the other, as if they had been together: what prompts show, in reading
        order. Raises `ValueError` for frames that are kept at different numbers of visual tokens."""
        kept = sorted({one.tile_features.shape[1] for one in encoded})
        if len(kept) != 1:
            raise ValueError(f"Frames are kept at {kept} visual tokens: encode all at the same number, at least one.")
        return cls(
            tile_features=torch.cat([one.tile_features for one in encoded]),
            layouts=[layout for one in encoded for layout in one.layouts],
        )


class _WithImages(ModelOutput):
    def to_tuple(self) -> tuple:
        """A plain tuple, as those of transformers' own multimodal outputs."""
        return tuple(value.to_tuple() if isinstance(value, ModelOutput) else value for value in super().to_tuple())


@auto_docstring
@dataclass
class M3LlavaModelOutputWithPast(_WithImages, BaseModelOutputWithPast):
    r"""
    image_hidden_states (`torch.FloatTensor` of shape `(all visual tokens, hidden_size)`, *optional*):
        The visual tokens of all images, as they stand in the sequence.
    image_outputs (`BaseModelOutputWithPooling`, *optional*):
        What `get_image_features` returned.
    """

    image_hidden_states: torch.FloatTensor | None = None
    image_outputs: BaseModelOutputWithPooling | None = None


@auto_docstring
@dataclass
class M3LlavaCausalLMOutputWithPast(_WithImages, CausalLMOutputWithPast):
    r"""
    loss (`torch.FloatTensor` of shape `(1,)`, *optional*, returned when `labels` is provided):
        Next-token prediction loss; with `matryoshka_scales`, its average over them.
    logits (`torch.FloatTensor` of shape `(batch_size, sequence_length, vocab_size)`, *optional*):
        Scores of every token of the vocabulary, before the softmax. None with `matryoshka_scales`.
    image_hidden_states (`torch.FloatTensor` of shape `(all visual tokens, hidden_size)`, *optional*):
        The visual tokens of all images, as they stand in the sequence.
    image_outputs (`BaseModelOutputWithPooling`, *optional*):
        What `get_image_features` returned.
    scale_losses (`torch.FloatTensor` of shape `(scales,)`, *optional*, returned when `matryoshka_scales` is provided):
        The loss at every scale, without gradients.
    """

    image_hidden_states: torch.FloatTensor | None = None
    image_outputs: BaseModelOutputWithPooling | None = None
    scale_losses: torch.FloatTensor | None = None
