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
"""Images and frames of videos through the vision tower and the projector, and the visual tokens that are made of them.

Part of the model; apart from it because a prompt is not needed for it.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from .outputs_m3 import M3LlavaEncodedImages
from .visual_tokens import SAMPLINGS, as_lists, check_choice, check_num_visual_tokens, laid_out, pool_tiles


TILES_AT_ONCE = 64  # through the vision tower, where no gradients are needed
PER_LAYER = ("output_hidden_states", "output_attentions")


class M3LlavaEncodingMixin:
    """Encoding for a model with `vision_tower`, `multi_modal_projector` and `image_newline`."""

    def _encode_tiles(
        self, tiles: torch.Tensor, pool: Callable[[torch.Tensor], torch.Tensor] | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """The tower's outputs and the projector's for tiles, (tiles, channels, height, width); what `pool` leaves of them.

        Where no gradients are needed, many tiles go through in parts, so that what is between layers needs no more memory.
        """
        if (
            len(tiles) > TILES_AT_ONCE
            and pool is None
            and not torch.is_grad_enabled()
            and not any(kwargs.get(name) for name in PER_LAYER)
        ):
            parts = [self._encode_tiles(some, **kwargs) for some in tiles.split(TILES_AT_ONCE)]
            return {name: torch.cat([part[name] for part in parts]) for name in ("last_hidden_state", "tile_features")}
        outputs = self.vision_tower(tiles, **kwargs)
        features = outputs.last_hidden_state
        # CODEPATH: LLaVA checkpoints drop CLIP's class token; those trained with the original's `cls_patch` keep it.
        kept = features[:, self.config.num_leading_tokens :]
        return {
            "last_hidden_state": features,
            "tile_features": self.multi_modal_projector(kept, pool),
            "hidden_states": outputs.hidden_states,
            "attentions": outputs.attentions,
        }

    @torch.no_grad()
    def encode_video(
        self,
        pixel_values: torch.FloatTensor | Iterable[torch.FloatTensor],
        num_visual_tokens: int | None = None,
        frames_at_once: int = TILES_AT_ONCE,
    ) -> M3LlavaEncodedImages:
        """
        Frames through the vision tower and the projector, as `encode_images`, but a few at a time, and only what is asked for
        is kept of each: memory grows by no more than that with the length of a video. Without gradients.

        Args:
            pixel_values: (frames, channels, height, width), or parts of it one after the other, as the processor's
                `stream_video` makes them while a video is decoded.
            num_visual_tokens: the most that a frame may cost later; the finest scale by default. Coarser ones are made of it.
            frames_at_once: how many go through the vision tower together.

        Returns:
            [`M3LlavaEncodedImages`] with `tile_features` of shape (frames, `num_visual_tokens`, d), to be given to the processor
            as a video, and to `generate` as `encoded_images`.

        Raises:
            ValueError: for a number the configuration does not offer, and for pixels that are no frames.
        """
        if type(frames_at_once) is not int or frames_at_once < 1:
            raise ValueError(f"frames_at_once={frames_at_once!r} must be a whole number from 1.")
        [scale] = check_num_visual_tokens(num_visual_tokens, self.config.visual_token_scales, 1)
        features = []
        for part in [pixel_values] if isinstance(pixel_values, torch.Tensor) else pixel_values:
            part = part[:, 0] if part.ndim == 5 and part.shape[1] == 1 else part  # as the processor has it among tiles
            if part.ndim != 4:
                raise ValueError(
                    f"Frames have the shape {tuple(part.shape)}: expected (frames, channels, height, width). Images that are cut "
                    "into tiles are encoded by encode_images."
                )
            for frames in part.split(frames_at_once):
                tiles = self._encode_tiles(frames.to(self.device))["tile_features"]
                pooled = (
                    tiles
                    if self.config.keeps_class_token
                    else pool_tiles(tiles, scale, self.config.visual_token_sampling)
                )
                features.append(pooled)
        if not features:
            raise ValueError("There are no frames: give at least one.")
        features = torch.cat(features)
        layouts = [self.config.image_layout(None, None)] * len(features)
        times = getattr(pixel_values, "timestamps", None)
        return M3LlavaEncodedImages(tile_features=features, layouts=layouts, timestamps=times)

    def get_visual_tokens(
        self,
        encoded: M3LlavaEncodedImages,
        num_visual_tokens: torch.LongTensor | list[int] | int | None = None,
        visual_token_sampling: str | None = None,
    ) -> list[torch.FloatTensor]:
        """
        The visual tokens of encoded images at one scale, or at each image's own; the vision tower does not run again.

        Args:
            encoded: what `encode_images` or `encode_video` returned.
            num_visual_tokens: tokens per tile, for all images or for each; the finest scale by default.
            visual_token_sampling: how tiles are reduced to them; the configuration's way by default.

        Returns:
            One (`ImageLayout.count(scale)`, d) per image.

        Raises:
            ValueError: for a number the configuration does not offer, and for an unknown sampling.
        """
        sampling = visual_token_sampling or self.config.visual_token_sampling
        check_choice("visual_token_sampling", sampling, SAMPLINGS)
        if sampling != self.config.visual_token_sampling and encoded.tile_features.shape[1] < self.config.grid_side**2:
            raise ValueError(
                f"visual_token_sampling={sampling!r}: this video was encoded to {encoded.tile_features.shape[1]} tokens a frame, "
                "which were sampled already. Encode it at the finest number."
            )
        layouts, offered = encoded.layouts, self.config.visual_token_scales
        [numbers] = as_lists(num_visual_tokens)
        scales = check_num_visual_tokens(laid_out(numbers, offered), offered, len(layouts))
        newline = self.image_newline
        if newline is not None:
            newline = newline.to(encoded.tile_features.device, encoded.tile_features.dtype)
        features, counts = encoded.tile_features, [layout.num_tiles for layout in layouts]
        if self.config.keeps_class_token:
            images = features.split(counts)
        elif len(set(scales)) == 1:  # with one kernel for all
            images = pool_tiles(features, scales[0], sampling).split(counts)
        else:
            images = [pool_tiles(tiles, scale, sampling) for tiles, scale in zip(features.split(counts), scales)]
        return [layout.merge(tiles, newline) for tiles, layout in zip(images, layouts)]
