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
"""The M3 model: pixels -> vision tower -> projector -> visual tokens at the asked scale -> language model.

Shapes use: b prompts, s sequence length, i images, t tiles of one image, n tokens per tile, d hidden size of the language
model. What happens to the visual tokens after the projector is in `visual_tokens.py`.
"""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import nn
from transformers import AutoModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring, can_return_tuple, torch_compilable_check

from .automatic_budget_m3 import M3LlavaAutomaticBudgetMixin
from .compiling_m3 import M3LlavaCompilingMixin
from .configuration_m3 import M3LlavaConfig
from .encoding_m3 import M3LlavaEncodingMixin
from .generation_m3 import ONE_KIND_OF_IMAGES, M3LlavaGenerationMixin
from .loading_m3 import M3LlavaLoadingMixin
from .objective_m3 import matryoshka_loss, warn_of_adapters
from .outputs_m3 import (
    CACHE_NAME,
    FORWARD_ARGUMENTS,
    IMAGE_ARGUMENTS,
    TRAINING_ARGUMENTS,
    M3LlavaCausalLMOutputWithPast,
    M3LlavaEncodedImages,
    M3LlavaModelOutputWithPast,
)
from .parts_m3 import finished_logits, without_last_norm
from .visual_tokens import as_lists, joined, laid_out


class M3LlavaUsedLayers(nn.ModuleList):
    """Holds all layers of the vision tower, so that its weights stay whole, and yields those whose output is used."""

    def __init__(self, layers: nn.ModuleList, num_used: int | None = None):  # None: all, as a slice has them
        super().__init__(layers)
        self.num_used = num_used

    def __iter__(self) -> Iterator[nn.Module]:
        return islice(super().__iter__(), self.num_used)


class M3LlavaMultiModalProjector(nn.Module):
    """`linear_1` to `linear_N` with an activation between them; no layer at all is the identity."""

    def __init__(self, config: M3LlavaConfig):
        super().__init__()
        self.depth = config.multimodal_projector_depth
        self.act = ACT2FN[config.projector_hidden_act]
        size_in, size_out = config.vision_config.hidden_size, config.text_config.hidden_size
        for i in range(1, self.depth + 1):
            self.add_module(f"linear_{i}", nn.Linear(size_in, size_out, bias=config.multimodal_projector_bias))
            size_in = size_out

    def forward(
        self, image_features: torch.Tensor, pool: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> torch.Tensor:
        for i in range(1, self.depth + 1):
            image_features = self.act(image_features) if i > 1 else image_features
            image_features = pool(image_features) if pool is not None and i == self.depth else image_features
            image_features = self.get_submodule(f"linear_{i}")(image_features)
        return image_features if pool is None or self.depth else pool(image_features)


@auto_docstring
class M3LlavaPreTrainedModel(M3LlavaLoadingMixin, M3LlavaAutomaticBudgetMixin, PreTrainedModel):
    config: M3LlavaConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if getattr(module, "image_newline", None) is not None:
            init.normal_(module.image_newline, std=self.config.text_config.hidden_size**-0.5)


@auto_docstring(
    custom_intro="""
    The vision tower, the projector and the language model without its head.
    """
)
class M3LlavaModel(M3LlavaPreTrainedModel, M3LlavaEncodingMixin):
    _auto_class = "AutoModel"  # saving copies the code along

    def __init__(self, config: M3LlavaConfig):
        super().__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        encoder = self.vision_tower.encoder
        encoder.layers = M3LlavaUsedLayers(encoder.layers, config.num_vision_layers)
        # CODEPATH: SigLIP has a norm of all tokens after its layers, CLIP one of the class token's own output.
        without_last_norm(self.vision_tower)
        self.multi_modal_projector = M3LlavaMultiModalProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        # CODEPATH: LLaVA-NeXT checkpoints end every row of tiles with `image_newline`; LLaVA-1.5 checkpoints have none.
        if config.image_grid_pinpoints is not None and config.patch_merge_type == "spatial_unpad":
            self.image_newline = nn.Parameter(torch.empty(config.text_config.hidden_size))
        else:
            self.image_newline = None
        self.post_init()

    def train(self, mode: bool = True) -> "M3LlavaModel":
        if mode:
            warn_of_adapters(self.vision_tower)
        return super().train(mode)

    @auto_docstring(
        custom_intro="""
        Images through the vision tower and the projector: what [`get_visual_tokens`] makes visual tokens of, at any scale.
        """,
        custom_args=IMAGE_ARGUMENTS,
    )
    def encode_images(
        self,
        pixel_values: torch.FloatTensor | list[torch.FloatTensor],
        image_sizes: torch.LongTensor | list[list[int]] | None = None,
        image_tile_grids: torch.LongTensor | list[list[int]] | None = None,
        image_grid_pinpoints: list[list[int]] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> M3LlavaEncodedImages:
        r"""
        Returns [`M3LlavaEncodedImages`]. Raises `ValueError` for sizes or grids that do not fit the pixels.
        """
        sizes, grids = as_lists(image_sizes, image_tile_grids)
        tiles, layouts = self.config.image_tiles(pixel_values, sizes, grids, image_grid_pinpoints)
        whole = pixel_values.flatten(0, -4) if isinstance(pixel_values, torch.Tensor) else None
        held = sum(layout.num_tiles for layout in layouts)
        tiles = whole if whole is not None and len(whole) == held else joined(tiles)  # which copies them
        return M3LlavaEncodedImages(**self._encode_tiles(tiles, **kwargs), layouts=layouts)

    @can_return_tuple
    @auto_docstring(
        custom_intro="""
        The visual tokens of every image: each tile is encoded and projected once, then pooled to its image's scale.
        """,
        custom_args=IMAGE_ARGUMENTS,
    )
    def get_image_features(
        self,
        pixel_values: torch.FloatTensor | list[torch.FloatTensor],
        image_sizes: torch.LongTensor | list[list[int]] | None = None,
        image_tile_grids: torch.LongTensor | list[list[int]] | None = None,
        num_visual_tokens: torch.LongTensor | list[int] | int | None = None,
        visual_token_sampling: str | None = None,
        image_grid_pinpoints: list[list[int]] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        r"""
        Returns `pooler_output`, a list with one tensor of shape (tokens, hidden_size) per image, and
        `last_hidden_state`, the output of the vision tower's selected layer, of shape (all tiles, patches and CLIP's class
        token, vision hidden size).

        Raises `ValueError` for sizes, grids or numbers of visual tokens that do not fit the pixels.
        """
        # All at once, and before the device has the vision tower's work to do, which a later fetch would wait for.
        sizes, grids, scales = as_lists(image_sizes, image_tile_grids, num_visual_tokens)
        encoded = self.encode_images(pixel_values, sizes, grids, image_grid_pinpoints, **kwargs)
        return self._image_outputs(encoded, scales, visual_token_sampling)

    def _image_outputs(self, encoded: M3LlavaEncodedImages, *scales_and_sampling: Any) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(
            last_hidden_state=encoded.last_hidden_state,
            pooler_output=self.get_visual_tokens(encoded, *scales_and_sampling),
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )

    def get_placeholder_mask(
        self,
        input_ids: torch.LongTensor | None,
        inputs_embeds: torch.FloatTensor,
        image_features: torch.FloatTensor | None = None,
    ) -> torch.BoolTensor:
        """
        Where the placeholders stand, (b, s).

        Args:
            input_ids: (b, s); without them the placeholders are recognised by their embedding.
            inputs_embeds: (b, s, d).
            image_features: (all visual tokens, d); if given, their number must be that of the placeholders.

        Raises:
            ValueError: if the numbers differ.
        """
        if input_ids is None:
            placeholder = torch.full((), self.config.image_token_id, dtype=torch.long, device=inputs_embeds.device)
            mask = (inputs_embeds == self.get_input_embeddings()(placeholder)).all(-1)
        else:
            mask = input_ids == self.config.image_token_id
        if image_features is not None:
            torch_compilable_check(
                mask.sum() == len(image_features),
                lambda: (
                    f"The prompt has {mask.sum()} placeholders for {len(image_features)} visual tokens. Pass all that the "
                    "processor returned, num_visual_tokens, image_sizes and image_tile_grids included."
                ),
            )
        return mask

    def _check_no_placeholders(self, input_ids: torch.LongTensor, cache: Cache | None) -> None:
        """Raises `ValueError` for a prompt whose images are missing: it would be answered as if they were words."""
        if cache is not None and input_ids.shape[1] == 1 or input_ids.is_meta:
            return  # a decoding step, which must not wait for the device; or nothing that could be asked
        length = 0 if cache is None else cache.get_seq_length()
        if isinstance(length, int) and length > 0:
            return  # what a chat goes on with, or what was drafted
        torch_compilable_check(
            ~(input_ids == self.config.image_token_id).any() | (length > 0),
            "The prompt has placeholders but there are no images: pass pixel_values and all else that the processor "
            "returned, or encoded_images.",
        )

    @can_return_tuple
    @auto_docstring(custom_args=FORWARD_ARGUMENTS)
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        image_sizes: torch.LongTensor | None = None,
        image_tile_grids: torch.LongTensor | None = None,
        num_visual_tokens: torch.LongTensor | list[int] | int | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        visual_token_sampling: str | None = None,
        image_grid_pinpoints: list[list[int]] | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        encoded_images: M3LlavaEncodedImages | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | M3LlavaModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        images = (mm_encoder_outputs or {}).get("image")
        if sum(given is not None for given in (pixel_values, images, encoded_images)) > 1:
            raise ValueError(ONE_KIND_OF_IMAGES)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)

        if pixel_values is not None:
            images = self.get_image_features(
                pixel_values,
                image_sizes=image_sizes,
                image_tile_grids=image_tile_grids,
                num_visual_tokens=num_visual_tokens,
                visual_token_sampling=visual_token_sampling,
                image_grid_pinpoints=image_grid_pinpoints,
                return_dict=True,
            )
        elif encoded_images is not None:
            images = self._image_outputs(encoded_images, num_visual_tokens, visual_token_sampling)
        image_features = None
        if images is not None:
            image_features = joined(images.pooler_output).to(inputs_embeds.device, inputs_embeds.dtype)
            mask = self.get_placeholder_mask(input_ids, inputs_embeds, image_features)
            inputs_embeds = inputs_embeds.masked_scatter(mask.unsqueeze(-1).to(inputs_embeds.device), image_features)
        elif input_ids is not None:
            self._check_no_placeholders(input_ids, past_key_values if cache is None else cache)

        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **{CACHE_NAME: past_key_values if cache is None else cache},
            **kwargs,
        )
        return M3LlavaModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=image_features,
            image_outputs=images,
        )


@auto_docstring(
    custom_intro="""
    M3 with a language modelling head: answers questions about images at any number of visual tokens.
    """
)
class M3LlavaForConditionalGeneration(M3LlavaPreTrainedModel, M3LlavaCompilingMixin, M3LlavaGenerationMixin):
    _auto_class = "AutoModelForImageTextToText"  # saving copies the code along
    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: M3LlavaConfig):
        super().__init__(config)
        self.model = M3LlavaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def get_logits(self, hidden_states: torch.FloatTensor) -> torch.FloatTensor:
        """
        The head's output as the language model's family has it: scaled or softcapped where its configuration says so.

        Args:
            hidden_states: (..., d), the last of the language model.

        Returns:
            (..., vocabulary).
        """
        return finished_logits(self.lm_head(hidden_states), self.config.text_config)

    @auto_docstring(custom_intro="See [`M3LlavaModel.get_image_features`].", custom_args=IMAGE_ARGUMENTS)
    def get_image_features(
        self,
        pixel_values: torch.FloatTensor | list[torch.FloatTensor],
        image_sizes: torch.LongTensor | list[list[int]] | None = None,
        image_tile_grids: torch.LongTensor | list[list[int]] | None = None,
        num_visual_tokens: torch.LongTensor | list[int] | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        return self.model.get_image_features(pixel_values, image_sizes, image_tile_grids, num_visual_tokens, **kwargs)

    @auto_docstring(custom_intro="See [`M3LlavaModel.encode_images`].", custom_args=IMAGE_ARGUMENTS)
    def encode_images(
        self,
        pixel_values: torch.FloatTensor | list[torch.FloatTensor],
        image_sizes: torch.LongTensor | list[list[int]] | None = None,
        image_tile_grids: torch.LongTensor | list[list[int]] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> M3LlavaEncodedImages:
        return self.model.encode_images(pixel_values, image_sizes, image_tile_grids, **kwargs)

    def encode_video(self, *args: Any, **kwargs: Any) -> M3LlavaEncodedImages:
        """See [`M3LlavaModel.encode_video`]."""
        return self.model.encode_video(*args, **kwargs)

    def get_visual_tokens(
        self,
        encoded: M3LlavaEncodedImages,
        num_visual_tokens: torch.LongTensor | list[int] | int | None = None,
        visual_token_sampling: str | None = None,
    ) -> list[torch.FloatTensor]:
        """See [`M3LlavaModel.get_visual_tokens`]."""
        return self.model.get_visual_tokens(encoded, num_visual_tokens, visual_token_sampling)

    @can_return_tuple
    @auto_docstring(custom_args=TRAINING_ARGUMENTS)
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        image_sizes: torch.LongTensor | None = None,
        image_tile_grids: torch.LongTensor | None = None,
        num_visual_tokens: torch.LongTensor | list[int] | int | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        visual_token_sampling: str | None = None,
        image_grid_pinpoints: list[list[int]] | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        encoded_images: M3LlavaEncodedImages | None = None,
        matryoshka_scales: list[int] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | M3LlavaCausalLMOutputWithPast:
        if matryoshka_scales is not None:
            if pixel_values is not None and encoded_images is not None:
                raise ValueError(ONE_KIND_OF_IMAGES)
            encoded = encoded_images
            sizes, grids, written = as_lists(image_sizes, image_tile_grids, num_visual_tokens)
            written = laid_out(written, self.config.visual_token_scales)
            if pixel_values is not None:
                encoded = self.model.encode_images(pixel_values, sizes, grids, image_grid_pinpoints)
            loss, scale_losses = matryoshka_loss(
                self,
                matryoshka_scales,
                encoded,
                input_ids=input_ids,
                labels=labels,
                attention_mask=attention_mask,
                num_visual_tokens=written,
                visual_token_sampling=visual_token_sampling,
                position_ids=position_ids,
                past_key_values=past_key_values if cache is None else cache,
                inputs_embeds=inputs_embeds,
                mm_encoder_outputs=mm_encoder_outputs,
                **kwargs,
            )
            return M3LlavaCausalLMOutputWithPast(loss=loss, scale_losses=scale_losses)
        shift_labels = kwargs.pop("shift_labels", None)  # the loss's alone
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            image_sizes=image_sizes,
            image_tile_grids=image_tile_grids,
            num_visual_tokens=num_visual_tokens,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=past_key_values if cache is None else cache,
            inputs_embeds=inputs_embeds,
            visual_token_sampling=visual_token_sampling,
            image_grid_pinpoints=image_grid_pinpoints,
            mm_encoder_outputs=mm_encoder_outputs,
            encoded_images=encoded_images,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.get_logits(outputs[0][:, kept, :])

        loss = None
        if labels is not None or shift_labels is not None:
            if shift_labels is not None:
                kwargs["shift_labels"] = shift_labels.contiguous()  # which transformers takes for granted
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        return M3LlavaCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            image_outputs=outputs.image_outputs,
        )


__all__ = ["M3LlavaForConditionalGeneration", "M3LlavaModel", "M3LlavaPreTrainedModel"]
