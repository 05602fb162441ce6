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
"""How `generate` carries the images of M3: encoded once, in the first step, and repeated by prompt.

Part of the model; apart from it because only this depends on the releases of transformers that differ here.
"""

import inspect
from typing import Any

import torch
from transformers import GenerationMixin
from transformers.generation import CandidateGenerator
from transformers.generation import utils as generation_utils
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .outputs_m3 import CACHE_NAME, M3LlavaEncodedImages


# What describes images among the model's inputs. `generate` needs them for the first step only.
IMAGE_INPUTS = (
    "pixel_values",
    "image_sizes",
    "num_visual_tokens",
    "visual_token_sampling",
    "image_grid_pinpoints",
    "image_tile_grids",
)

ONE_KIND_OF_IMAGES = "Pass only one of pixel_values, encoded_images and mm_encoder_outputs: each is the images"


class M3LlavaGenerationMixin(GenerationMixin):
    """`generate` for a model with `get_image_features` and `model.get_placeholder_mask`."""

    def generate(self, *args: Any, encoded_images: M3LlavaEncodedImages | None = None, **kwargs: Any) -> Any:
        """
        As in transformers, and from images that were encoded before.

        Args:
            encoded_images: what `encode_images` returned, in place of `pixel_values`. With `num_visual_tokens` as the
                prompt was made with it, several calls answer at several scales, and the vision tower runs no more.
        """
        if CACHE_NAME != "cache" and "cache" in kwargs:  # Before 5.24: the newer name
            kwargs[CACHE_NAME] = kwargs.pop("cache")
        if encoded_images is not None:
            if kwargs.get("pixel_values") is not None:
                raise ValueError(ONE_KIND_OF_IMAGES)
            scales, sampling = (kwargs.pop(name, None) for name in ("num_visual_tokens", "visual_token_sampling"))
            with torch.no_grad():
                tokens = self.get_visual_tokens(encoded_images, scales, sampling)
            kwargs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=tokens)}
        return super().generate(*args, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        inputs_embeds: torch.FloatTensor | None = None,
        is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        inputs = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        # Images enter the cache in the first step. transformers drops the inputs it knows by name, not all of ours.
        if not is_first_iteration and kwargs.get("use_cache", True):
            for name in (*IMAGE_INPUTS, "mm_encoder_outputs"):
                inputs.pop(name, None)
        return inputs

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.LongTensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[torch.LongTensor | None, dict[str, Any]]:
        # transformers repeats every image in place, [A, A, B, B], where beams or several answers to a prompt with two
        # images need [A, B, A, B]; newer releases know better, but change what the caller passed. So: encode the images
        # here, unless `generate` has done so, and repeat them by prompt.
        if expand_size == 1:
            return input_ids, model_kwargs
        image_inputs = {name: model_kwargs.pop(name) for name in IMAGE_INPUTS if name in model_kwargs}
        encoded = (model_kwargs.pop("mm_encoder_outputs", None) or {}).get("image")
        if image_inputs.get("pixel_values") is not None:
            encoded = self.get_image_features(**image_inputs, return_dict=True)
        expanded = {}
        if encoded is not None:
            embeds = model_kwargs.get("inputs_embeds")
            features = torch.cat(list(encoded.pooler_output))
            mask = self.model.get_placeholder_mask(input_ids if embeds is None else None, embeds, features)
            images = _repeat_by_prompt(encoded.pooler_output, mask.sum(-1).tolist(), expand_size)
            expanded = {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=images)}}
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        return input_ids, model_kwargs | expanded

    def _get_candidate_generator(self, *, model_kwargs: dict[str, Any], **kwargs: Any) -> CandidateGenerator:
        # A language model that assists drafts from the text alone: it takes no images, and transformers would pass them.
        assistant = kwargs.get("assistant_model")
        if assistant is not None and "pixel_values" not in inspect.signature(assistant.forward).parameters:
            hidden = (*IMAGE_INPUTS, "mm_encoder_outputs")
            model_kwargs = {name: value for name, value in model_kwargs.items() if name not in hidden}
        return super()._get_candidate_generator(model_kwargs=model_kwargs, **kwargs)

    def _prefill(
        self, input_ids: torch.LongTensor, generation_config: Any, model_kwargs: dict, *args: Any, **kwargs: Any
    ):
        # Before 5.24 encoded images cannot be cut along with the prompt: the answer would not have seen them.
        has_images = model_kwargs.get("pixel_values") is not None or model_kwargs.get("mm_encoder_outputs")
        cuts_images = hasattr(generation_utils, "_slice_mm_encoder_output")
        if generation_config.prefill_chunk_size is not None and has_images and not cuts_images:
            raise ValueError(
                f"prefill_chunk_size={generation_config.prefill_chunk_size}: this release of transformers cannot prefill a "
                "prompt with images in chunks. Leave it out, or upgrade transformers."
            )
        return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)


def _repeat_by_prompt(images: list[torch.Tensor], placeholders: list[int], repeats: int) -> list[torch.Tensor]:
    """Repeats each prompt's images as a group, given how many placeholders each prompt has."""
    remaining, repeated = iter(images), []
    for count in placeholders:
        group = []
        while count > 0:
            group.append(next(remaining))
            count -= len(group[-1])
        repeated += group * repeats
    return repeated
