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
"""What differs between vision towers, and between language models, found from their configurations.

Shapes use: i images, n tokens per image, d hidden size.
"""

import copy
from typing import Any

import torch
from torch import nn


# Vision towers by model_type, each with how many tokens it has before those of the patches: CLIP's class token, and none.
# SigLIP 2 at a fixed resolution is a `siglip_vision_model` too.
LEADING_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0}


def leading_tokens(vision_config: Any) -> int:
    """How many tokens, the class token, stand before those of the patches in the tower's hidden states.

    Raises:
        ValueError: for a tower that is not supported, by its name.
    """
    if vision_config.model_type not in LEADING_TOKENS:
        raise ValueError(
            f"A vision tower of model_type {vision_config.model_type!r} is not supported: use one of {', '.join(LEADING_TOKENS)}, "
            "whose pictures are a square grid of patches."
        )
    return LEADING_TOKENS[vision_config.model_type]


def without_head(vision_config: Any) -> Any:
    """The tower's configuration without SigLIP's head, which pools a picture to one vector: M3 has no use for it."""
    # Before 5.24 the setting may be there, but is no field of the configuration: without it there is a head.
    if getattr(vision_config, "vision_use_head", vision_config.model_type == "siglip_vision_model"):
        vision_config = copy.deepcopy(vision_config)
        vision_config.vision_use_head = False
    return vision_config


class M3LlavaUnusedNorm(nn.LayerNorm):
    """Holds the weights of the norm after a tower's last layer, so that they stay whole, and changes nothing.

    Visual tokens are hidden states, as in LLaVA: the output of a layer, before that norm.
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states


def without_last_norm(vision_tower: nn.Module) -> None:
    """Has a tower return the output of its last layer as it is, (i, n, d), in place. CLIP does so by itself."""
    norm = vision_tower.post_layernorm
    vision_tower.post_layernorm = M3LlavaUnusedNorm(norm.normalized_shape, eps=norm.eps)


def finished_logits(logits: torch.Tensor, text_config: Any) -> torch.Tensor:
    """What a family's own causal language model does to the output of its head: scaling and softcapping.

    They are settings of the family's configuration, but not part of the base model, nor of the head's weights.
    `m3-create` compares logits with the family's own, so that nothing is missing here unnoticed.

    Args:
        logits: of any shape.
        text_config: of the language model.
    """
    if (divisor := getattr(text_config, "logits_scaling", None)) is not None:  # Granite
        logits = logits / divisor
    if (factor := getattr(text_config, "logit_scale", None)) is not None:  # Cohere
        logits = logits * factor
    if (cap := getattr(text_config, "final_logit_softcapping", None)) is not None:  # Gemma
        logits = torch.tanh(logits / cap) * cap
    return logits
