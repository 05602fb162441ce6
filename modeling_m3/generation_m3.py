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

from .automatic_generation_m3 import AutomaticGeneration
from .outputs_m3 import CACHE_NAME, M3LlavaEncodedImages
from .visual_tokens import AUTO_NUMBER, as_lists, check_num_visual_tokens, laid_out


# What describes images among the model's inputs. `generate` needs them for the first step only.
IMAGE_INPUTS = (
    "pixel_values",
    "image_sizes",
    "num_visual_tokens",
    "visual_token_sampling",
    "image_grid_pinpoints",
    "image_tile_grids",
)

# Those of them that have an entry for every image, besides the pixels.
PER_IMAGE = ("image_sizes", "image_tile_grids", "num_visual_tokens")

# What the authors' `generate` and transformers' LLaVA are told, and how it is said here.
FOREIGN_NAMES = {
    "matryoshka_vis_token_scale": "it is num_visual_tokens here, given to the processor: processor(..., num_visual_tokens=36)",
    "images": "pixels are pixel_values here: pass all that the processor returned, model.generate(**inputs)",
    "vision_feature_layer": "it is a fact of the checkpoint: set vision_feature_layer in its configuration",
    "vision_feature_select_strategy": "it is a fact of the checkpoint: set vision_feature_select_strategy in its configuration",
}

ONE_KIND_OF_IMAGES = "Pass only one of pixel_values, encoded_images and mm_encoder_outputs: each is the images"


class M3LlavaGenerationMixin(GenerationMixin):
    """`generate` for a model with `get_image_features` and `model.get_placeholder_mask`."""

    def generate(self, *args: Any, encoded_images: M3LlavaEncodedImages | None = None, **kwargs: Any) -> Any:
        """
        As in transformers, and from images that were encoded before.

        Args:
            encoded_images: what `encode_images` returned, in place of `pixel_values`. With `num_visual_tokens` as the
                prompt was made with it, several calls answer at several scales, and the vision tower runs no more.
            auto_keep: where `num_visual_tokens` was "auto", the share of the finest scale's accuracy to keep, 0.99 by
                default; or an attribute of the generation configuration. With `return_dict_in_generate`, the output has what
                was chosen for each image, `num_visual_tokens`, and what all passes of each prompt took,
                `visual_tokens_spent`.

        With a cache (`past_key_values`), images whose placeholders are in it may be given again or left out. Raises
        `ValueError` for other images than the prompt needs.
        """
        if CACHE_NAME != "cache" and "cache" in kwargs:  # Before 5.24: the newer name
            kwargs[CACHE_NAME] = kwargs.pop("cache")
        for name in FOREIGN_NAMES.keys() & kwargs.keys():
            raise ValueError(f"{name} is no argument of generate: {FOREIGN_NAMES[name]}.")
        keep = kwargs.pop("auto_keep", None)
        if kwargs.get("num_visual_tokens") is not None and (numbers := self._automatic_numbers(kwargs)) is not None:
            return self._generate_automatically(numbers, keep, encoded_images, *args, **kwargs)
        input_ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        self._check_context(input_ids, encoded_images, kwargs)
        if encoded_images is not None:
            if kwargs.get("pixel_values") is not None:
                raise ValueError(ONE_KIND_OF_IMAGES)
            scales, sampling = (kwargs.pop(name, None) for name in ("num_visual_tokens", "visual_token_sampling"))
            with torch.no_grad():
                tokens = self.get_visual_tokens(encoded_images, scales, sampling)
            kwargs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=tokens)}
        is_assistant = getattr(kwargs.get("generation_config"), "is_assistant", False)
        assistant = kwargs.get("assistant_model")
        draws_on = None
        if kwargs.get("pixel_values") is not None and hasattr(assistant, "encode_images"):
            draws_on = _encode(assistant, {name: kwargs[name] for name in IMAGE_INPUTS if name in kwargs})
        length = int(_length_of_cache(kwargs))
        if input_ids is not None and length > 0 and not is_assistant:  # which is called anew for every draft
            kwargs = self._without_cached_images(input_ids, length, kwargs)
        if draws_on is not None:  # what this model sees is not what its assistant would: each encodes by itself
            images = {name: kwargs.pop(name) for name in IMAGE_INPUTS if name in kwargs}
            own = {"image": _encode(self, images)} if images.get("pixel_values") is not None else {}
            kwargs["mm_encoder_outputs"] = {**own, "assistant": draws_on}
        return super().generate(*args, **kwargs)

    def _check_context(self, input_ids: Any, encoded: M3LlavaEncodedImages | None, kwargs: dict[str, Any]) -> None:
        """Raises `ValueError` for prompts with images that are longer than the language model's context, before they are
        encoded: many frames are soon too many. It names the numbers of visual tokens at which they would fit."""
        context = self.config.context_length
        if input_ids is None or input_ids.ndim != 2 or context is None or input_ids.shape[1] <= context:
            return
        rope = getattr(self.config.text_config, "rope_parameters", None) or {}
        mask, layouts = kwargs.get("attention_mask"), encoded.layouts if encoded is not None else None
        lengths = (torch.ones_like(input_ids) if mask is None or mask.ndim != 2 else mask).sum(1)
        if layouts is None and kwargs.get("pixel_values") is not None:
            facts = as_lists(kwargs.get("image_sizes"), kwargs.get("image_tile_grids"))
            _, layouts = self.config.image_tiles(kwargs["pixel_values"], *facts, kwargs.get("image_grid_pinpoints"))
        if layouts is None or rope.get("rope_type") == "dynamic" or lengths.max() <= context:
            return
        longest = int(lengths.argmax())
        placeholders = (input_ids == self.config.image_token_id).sum(1).tolist()
        length, visual = int(lengths[longest]), placeholders[longest]
        text, alone = length - visual, len(input_ids) == 1
        costs = {scale: sum(layout.count(scale) for layout in layouts) for scale in self.config.visual_token_scales}
        fitting = [scale for scale, cost in costs.items() if alone and text + cost <= context]
        if fitting:
            advice = f"At num_visual_tokens={fitting[-1]} it has {text + costs[fitting[-1]]}."
        elif alone:
            advice = f"Its {len(layouts)} pictures do not fit even at {min(costs)} each: give fewer, or another model."
        else:
            advice = "Give a smaller num_visual_tokens, or fewer pictures."
        raise ValueError(
            f"A prompt has {length} tokens, {visual} of them visual, which is more than the language model's context of "
            f"{context}. {advice}"
        )

    def _automatic_numbers(self, kwargs: dict[str, Any]) -> list[int] | None:
        """The numbers of visual tokens, where the model is to choose one of them."""
        [numbers] = as_lists(kwargs["num_visual_tokens"])
        return numbers if isinstance(numbers, list) and AUTO_NUMBER in numbers else None

    def _generate_automatically(
        self,
        numbers: list[int],
        keep: float | None,
        encoded_images: M3LlavaEncodedImages | None,
        inputs: torch.LongTensor | None = None,
        generation_config: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        input_ids = kwargs.pop("input_ids", kwargs.pop("inputs", inputs))
        if generation_config is not None:
            kwargs["generation_config"] = generation_config
        if input_ids is None or kwargs.get("inputs_embeds") is not None:
            raise ValueError('num_visual_tokens="auto" needs input_ids, from which the prompt is laid out anew.')
        if args or _length_of_cache(kwargs) or kwargs.pop("mm_encoder_outputs", None):
            raise ValueError(
                'num_visual_tokens="auto" cannot go on from a cache or from mm_encoder_outputs, whose visual tokens are chosen. '
                "Give a number: what was chosen is num_visual_tokens of an output with return_dict_in_generate=True."
            )
        images = {name: kwargs.pop(name) for name in IMAGE_INPUTS if name in kwargs}
        sampling = images.pop("visual_token_sampling", None)
        images.pop("num_visual_tokens")
        given = images.get("pixel_values") is not None
        if given == (encoded_images is not None):
            raise ValueError(ONE_KIND_OF_IMAGES)
        encoded = {"image": encoded_images if encoded_images is not None else _encode(self, images, "encode_images")}
        assistant = kwargs.get("assistant_model")
        if given and hasattr(assistant, "encode_images"):
            encoded["assistant"] = _encode(assistant, images, "encode_images")
        if keep is None:
            keep = getattr(kwargs.get("generation_config") or self.generation_config, "auto_keep", None)
        mask = kwargs.pop("attention_mask", None)
        return AutomaticGeneration(self, input_ids, mask, encoded, numbers, sampling, keep, kwargs)()

    def _without_cached_images(self, input_ids: torch.LongTensor, length: int, kwargs: dict) -> dict[str, Any]:
        """The arguments of `generate` without the images whose placeholders are among the `length` tokens of the cache."""
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.shape[1] != input_ids.shape[1]:
            length = 0  # input_ids are the tokens after the cache
        is_placeholder = input_ids == self.config.image_token_id
        cached, new = torch.stack([is_placeholder[:, :length].sum(1), is_placeholder[:, length:].sum(1)]).tolist()
        encoded = (kwargs.get("mm_encoder_outputs") or {}).get("image")
        images = {name: kwargs[name] for name in IMAGE_INPUTS if kwargs.get(name) is not None}
        counts = []
        if encoded is not None:
            counts = [len(tokens) for tokens in encoded.pooler_output]
        elif "pixel_values" in images:
            sizes, grids, scales = as_lists(*(images.get(name) for name in PER_IMAGE))
            _, layouts = self.config.image_tiles(
                images["pixel_values"], sizes, grids, images.get("image_grid_pinpoints")
            )
            offered = self.config.visual_token_scales
            scales = check_num_visual_tokens(laid_out(scales, offered), offered, len(layouts))
            counts = [layout.count(scale) for layout, scale in zip(layouts, scales)]
            images |= {name: fact for name, fact in zip(PER_IMAGE, (sizes, grids, scales)) if fact is not None}
        if sum(counts) == sum(new):
            return kwargs
        kept = _images_after_cache(counts, cached, new)
        kwargs = {name: value for name, value in kwargs.items() if name not in (*IMAGE_INPUTS, "mm_encoder_outputs")}
        if not kept:
            return kwargs
        if encoded is not None:
            tokens = [encoded.pooler_output[index] for index in kept]
            return kwargs | {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=tokens)}}
        for name in PER_IMAGE:
            if name in images:
                images[name] = torch.tensor([images[name][index] for index in kept], device=input_ids.device)
        pixels = images["pixel_values"]
        images["pixel_values"] = pixels[kept] if isinstance(pixels, torch.Tensor) else [pixels[i] for i in kept]
        return kwargs | images

    def _maybe_prepare_encoder_kwargs_for_generation(
        self, inputs_tensor: torch.Tensor, model_kwargs: dict, model_input_name: str, generation_config: Any
    ) -> dict[str, Any]:
        # From 5.24 images, or None for them, are encoded before the prefill, of which they are a part where it is compiled.
        compiled = self._prefill_graphs is not None and generation_config.prefill_chunk_size is None
        if compiled or model_kwargs.get("pixel_values") is None:
            return model_kwargs
        return super()._maybe_prepare_encoder_kwargs_for_generation(
            inputs_tensor, model_kwargs, model_input_name, generation_config
        )

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
        expanded = {}
        if encoded is None and self._fitting_graph(input_ids, image_inputs | model_kwargs):
            expanded = image_inputs  # the prefill runs once for each prompt
        elif image_inputs.get("pixel_values") is not None:
            encoded = self.get_image_features(**image_inputs, return_dict=True)
        if encoded is not None:
            embeds = model_kwargs.get("inputs_embeds")
            features = torch.cat(list(encoded.pooler_output))
            ids = input_ids if embeds is None else None
            length = int(_length_of_cache(model_kwargs))
            if length and ids is not None and self.model.get_placeholder_mask(ids, embeds).sum() != len(features):
                ids = ids[:, length:]  # the images before are in the cache
            mask = self.model.get_placeholder_mask(ids, embeds, features)
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
        elif assistant is not None and model_kwargs.get("mm_encoder_outputs"):
            outputs = model_kwargs["mm_encoder_outputs"]
            sizes = [model.config.text_config.hidden_size for model in (self, assistant)]
            if "assistant" not in outputs and sizes[0] != sizes[1]:
                raise ValueError(
                    f"encoded_images are of hidden size {sizes[0]}, the assistant's would be of {sizes[1]}: pass pixel_values, "
                    "which each encodes by itself."
                )
            images = {"image": outputs.get("assistant", outputs.get("image"))}
            model_kwargs = {**model_kwargs, "mm_encoder_outputs": images}
        return super()._get_candidate_generator(model_kwargs=model_kwargs, **kwargs)

    def _prefill(
        self,
        input_ids: torch.LongTensor,
        generation_config: Any,
        model_kwargs: dict,
        is_first_iteration: bool = True,
    ):
        # transformers takes no draft of an assistant for its first, and would have it draft without the images.
        is_first_iteration = is_first_iteration or not _length_of_cache(model_kwargs)
        # Before 5.24 encoded images cannot be cut along with the prompt: the answer would not have seen them.
        has_images = model_kwargs.get("pixel_values") is not None or model_kwargs.get("mm_encoder_outputs")
        cuts_images = hasattr(generation_utils, "_slice_mm_encoder_output")
        if generation_config.prefill_chunk_size is not None and has_images and not cuts_images:
            raise ValueError(
                f"prefill_chunk_size={generation_config.prefill_chunk_size}: this release of transformers cannot prefill a "
                "prompt with images in chunks. Leave it out, or upgrade transformers."
            )
        if self._prefill_graphs is not None and is_first_iteration and generation_config.prefill_chunk_size is None:
            outputs = self._prefill_by_graph(input_ids, model_kwargs)
            if outputs is not None:
                return outputs
        return super()._prefill(input_ids, generation_config, model_kwargs, is_first_iteration=is_first_iteration)


def _length_of_cache(kwargs: dict[str, Any]) -> int | torch.Tensor:
    """How many tokens are in the cache, under the older or the newer of its names; a static cache has a tensor."""
    cache = kwargs.get(CACHE_NAME, kwargs.get("past_key_values"))
    return 0 if cache is None else cache.get_seq_length()


@torch.no_grad()
def _encode(model: torch.nn.Module, images: dict[str, Any], way: str = "get_image_features") -> Any:
    pixels = images["pixel_values"]
    pixels = (
        pixels.to(model.device) if isinstance(pixels, torch.Tensor) else [image.to(model.device) for image in pixels]
    )
    return getattr(model, way)(**images | {"pixel_values": pixels}, return_dict=True)


def _images_after_cache(counts: list[int], cached: list[int], new: list[int]) -> list[int]:
    """Which images a prompt needs beyond its cache, if all of it are given.

    Args:
        counts: visual tokens of each image that was given, in reading order.
        cached, new: placeholders of each prompt that are in the cache, and after it.

    Raises:
        ValueError: if these are not the images of the prompts, or the cache ends inside of one.
    """
    kept, index = [], 0
    if sum(counts) == sum(cached) + sum(new):
        for placeholders in zip(cached, new):
            for is_new, missing in enumerate(placeholders):
                while missing > 0:
                    missing -= counts[index]
                    kept += [index] if is_new else []
                    index += 1
                if missing < 0:
                    raise ValueError("The cache ends inside an image: crop it to a length at which none is cut.")
        return kept
    raise ValueError(
        f"The images have {counts} visual tokens, but the prompts have {sum(new)} placeholders after the cache and "
        f"{sum(cached)} in it. Give the images of the placeholders after the cache, or those of all."
    )


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
