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
"""The Matryoshka objective: the next-token loss averaged over scales (paper equation 3.2), at little more than one's cost.

The original writes a prompt, encodes its images and runs the language model anew for every scale, and keeps all of it until
one backward. Here images are encoded once, coarser prompts are cut out of the finest one, logits are computed only where
there is a label, and one scale is done with, gradients included, before the next begins.

Shapes use: b prompts, s sequence length, i images, m scales, d hidden size of the language model.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import logging

from .outputs_m3 import M3LlavaEncodedImages
from .visual_tokens import as_plain, check_num_visual_tokens


logger = logging.get_logger(__name__)


def matryoshka_loss(
    model: nn.Module,
    scales: list[int],
    encoded: M3LlavaEncodedImages | None,
    input_ids: torch.LongTensor | None,
    labels: torch.LongTensor | None,
    attention_mask: torch.Tensor | None = None,
    num_visual_tokens: list[int] | int | None = None,
    visual_token_sampling: str | None = None,
    shift_labels: torch.LongTensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss averaged over scales, and the loss at each, from inputs made at the finest of them or a finer one.

    Args:
        model: the `M3LlavaForConditionalGeneration` to train.
        scales: m numbers of visual tokens per tile, each for all images.
        encoded: the images, from `encode_images`; None for a batch of text.
        input_ids: (b, s), padded on either side.
        labels: (b, s), -100 wherever there is nothing to predict, placeholders included.
        attention_mask: (b, s); None if nothing is padding.
        num_visual_tokens: the scale that each image's placeholders were written at; None for the finest.
        visual_token_sampling: how tiles are reduced; the configuration's way by default.
        shift_labels: (b, s), in place of `labels`, as transformers has it: what is to be predicted after each position.
        kwargs: for the language model and the loss function, such as `num_items_in_batch`.

    Returns:
        The average, a scalar with gradients, and the losses (m,) without.

    Raises:
        ValueError: for scales the inputs cannot be cut to, for missing or wrong labels, for another number of placeholders
            than the images have, and for inputs of `forward` that cannot be cut along.
    """
    config, scales = model.config, as_plain(scales)
    layouts = [] if encoded is None else encoded.layouts
    written = check_num_visual_tokens(num_visual_tokens, config.visual_token_scales, len(layouts))
    _check_scales(scales, config.visual_token_scales, written)
    _check_inputs(input_ids, labels if shift_labels is None else shift_labels, attention_mask, kwargs)
    if shift_labels is not None:
        labels = nn.functional.pad(shift_labels, (1, 0), value=-100)
        if (labels[:, -1] == -100).all():
            labels = labels[:, :-1]
        else:  # a token stands where the last is followed by what is to be predicted, and nothing looks at it
            input_ids = nn.functional.pad(input_ids, (0, 1), value=int(config.image_token_id == 0))
            attention_mask = None if attention_mask is None else nn.functional.pad(attention_mask, (0, 1))
    placeholders = input_ids == config.image_token_id
    if (labels[placeholders] != -100).any():
        raise ValueError(
            f"labels ask to predict {int((labels[placeholders] != -100).sum())} placeholder(s) of images, which differ from "
            f"scale to scale. Set labels to -100 where input_ids is {config.image_token_id}."
        )
    lengths = [layout.count(scale) for layout, scale in zip(layouts, written)]
    if placeholders.sum() != sum(lengths):
        raise ValueError(
            f"The prompts have {int(placeholders.sum())} placeholders for {len(layouts)} image(s) of {lengths} visual tokens. "
            "Pass all that the processor returned, num_visual_tokens, image_sizes and image_tile_grids included."
        )

    if encoded is None:
        prompts = {"input_ids": input_ids, "attention_mask": attention_mask}
        return _loss_of_text(model, scales, prompts, _targets(labels), **kwargs)

    # Every prompt is cut before the language model runs: what a cut has to ask of the data would wait for that.
    prompts, targets = {}, {}
    for scale in scales:
        kept = [layout.count(scale) for layout in layouts]
        prompts[scale], cut = _cut(input_ids, labels, attention_mask, config.image_token_id, lengths, kept)
        targets[scale] = _targets(cut)

    def loss_at(tile_features: torch.Tensor, scale: int) -> torch.Tensor:
        images = replace(encoded, tile_features=tile_features)
        tokens = model.model.get_visual_tokens(images, scale, visual_token_sampling)
        images = {"image": BaseModelOutputWithPooling(pooler_output=tokens)}
        return _next_token_loss(model, {**prompts[scale], "mm_encoder_outputs": images}, targets[scale], **kwargs)

    return average_over_scales(loss_at, encoded.tile_features, scales, model)


def _targets(labels: torch.LongTensor) -> tuple[tuple[torch.LongTensor, torch.LongTensor], torch.LongTensor]:
    """The (rows, positions) after which there is something to predict, n each, and what: (n,). From labels (b, s)."""
    labels = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    places = (labels != -100).nonzero(as_tuple=True)
    return places, labels[places]


def _next_token_loss(
    model: nn.Module,
    inputs: dict[str, Any],
    targets: tuple[tuple[torch.LongTensor, torch.LongTensor], torch.LongTensor],
    **kwargs: Any,
) -> torch.Tensor:
    hidden = model.model(**inputs, use_cache=False, **kwargs).last_hidden_state
    # Most of the memory of a short prompt is logits over a whole vocabulary, and most positions have no label.
    rows, positions = (place.to(hidden.device) for place in targets[0])
    return model.loss_function(
        logits=model.get_logits(hidden[rows, positions]),
        labels=None,
        vocab_size=model.config.text_config.vocab_size,
        shift_labels=targets[1].to(hidden.device),
        **kwargs,
    )


def _loss_of_text(
    model: nn.Module,
    scales: list[int],
    inputs: dict[str, Any],
    targets: tuple[tuple[torch.LongTensor, torch.LongTensor], torch.LongTensor],
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of a batch without images, which is the same at every scale.

    A blank image takes part with a weight of zero, as in the original: so every trained parameter has a gradient, and
    where parameters are sharded, ranks with images do not wait for this one.
    """
    vision, device = model.config.vision_config, inputs["input_ids"].device
    blank = torch.zeros(1, 1, vision.num_channels, vision.image_size, vision.image_size, device=device)
    encoded = model.model.encode_images(blank)

    def loss_at(tile_features: torch.Tensor, scale: int) -> torch.Tensor:
        tokens = model.model.get_visual_tokens(replace(encoded, tile_features=tile_features), scale)
        return _next_token_loss(model, inputs, targets, **kwargs) + 0 * torch.cat(tokens).sum()

    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        loss = loss_at(encoded.tile_features, scales[0])
        return loss, loss.detach().repeat(len(scales))  # a copy, as Trainer scales the loss in place
    return average_over_scales(loss_at, encoded.tile_features, scales, model, all_alike=True)


def warn_of_adapters(vision_tower: nn.Module) -> None:
    """Warns where adapters were put around layers of the vision tower: names as q_proj are CLIP's too."""
    adapted = [name for name, module in vision_tower.named_modules() if hasattr(module, "base_layer")]
    if adapted:
        logger.warning_once(
            f"{len(adapted)} layers of the vision tower have adapters, {adapted[0]} first. To adapt the language model alone, "
            r'name its layers by their path: target_modules=r".*language_model.*\.(q_proj|v_proj)".'
        )


def average_over_scales(
    loss_at: Callable[[torch.Tensor, int], torch.Tensor],
    tile_features: torch.Tensor,
    scales: list[int],
    model: nn.Module,
    all_alike: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Averages `loss_at(tile_features, scale)` over scales, with one scale's graph in memory at a time.

    In one of two ways. Where it is known that only autograd has to do with gradients, those of each scale are taken at
    once, in the forward, and handed on by one backward: nothing is computed twice, and hooks on parameters, by which DDP
    synchronises, fire once. Anywhere else (FSDP, ZeRO-3, replicas of `nn.DataParallel`, reentrant checkpoints, losses in
    float16, which are scaled before any gradient is taken) each scale is a checkpoint, recomputed in an ordinary backward.

    Args:
        loss_at: gives a scalar.
        tile_features: (all tiles, tokens per tile, d).
        scales: m scales.
        model: whose parameters `loss_at` uses, all but those of vision tower and projector.
        all_alike: whether `loss_at` gives the same at every scale.

    Returns:
        The average, a scalar, and the losses (m,) without gradients.
    """
    encoder = {
        id(p) for part in ("vision_tower", "multi_modal_projector") for p in getattr(model.model, part).parameters()
    }
    parameters = [p for p in model.parameters() if p.requires_grad and id(p) not in encoder]
    trains = torch.is_grad_enabled() and (tile_features.requires_grad or len(parameters) > 0)
    if trains and len(scales) > 1:
        if _is_plain(model) and _is_wide(tile_features, parameters):
            taken = _take_gradients(loss_at, tile_features, scales[:1] if all_alike else scales, parameters)
            if taken is not None:
                gradients, losses = taken
                average = _KnownGradients.apply(losses.mean(), gradients, tile_features, *parameters)
                return average, losses.repeat(len(scales)) if all_alike else losses
        losses = [checkpoint(loss_at, tile_features, scale, use_reentrant=False) for scale in scales]
    else:
        losses = [loss_at(tile_features, scale) for scale in scales]
    losses = torch.stack(losses)
    return losses.mean(), losses.detach()


def _is_plain(model: nn.Module) -> bool:
    """Whether modules do nothing but their forward: hooks may gather, move or change what it uses (FSDP2, ZeRO-3)."""
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    return not any(getattr(module, kind) for module in model.modules() for kind in kinds)


def _is_wide(features: torch.Tensor, parameters: list[nn.Parameter]) -> bool:
    """Whether gradients are computed in types of float32's range, so that no loss has to be scaled before."""
    types, device = {tensor.dtype for tensor in (features, *parameters)}, features.device.type
    if torch.is_autocast_enabled(device):
        types.add(torch.get_autocast_dtype(device))
    return types <= {torch.bfloat16, torch.float32, torch.float64}


def _take_gradients(
    loss_at: Callable[[torch.Tensor, int], torch.Tensor],
    features: torch.Tensor,
    scales: list[int],
    parameters: list[nn.Parameter],
) -> tuple[list[torch.Tensor | None], torch.Tensor] | None:
    """The gradients of the mean loss, by features (None if frozen) and parameters, and the losses (m,).

    None where the first loss does not come from just these: from copies of them, or in a way that autograd cannot see.
    """
    # Cut off from the encoder's graph, so that the graph of a scale ends here and is freed with it.
    leaf = features.detach().requires_grad_(features.requires_grad)
    inputs = [leaf, *parameters] if leaf.requires_grad else parameters
    sums, losses = [None] * len(inputs), {}
    for scale in sorted(scales, reverse=True):  # the largest graph while there are no gradients yet
        loss = loss_at(leaf, scale) / len(scales)
        if not losses and _leaves(loss) != set(map(id, inputs)):
            return None
        losses[scale] = loss.detach() * len(scales)
        _add(sums, list(torch.autograd.grad(loss, inputs)))
    gradients = sums if leaf.requires_grad else [None, *sums]
    return gradients, torch.stack([losses[scale] for scale in scales])


def _leaves(loss: torch.Tensor) -> set[int]:
    """The ids of the tensors at which the graph of a loss ends."""
    nodes, seen, leaves = [loss.grad_fn], set(), set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        nodes.extend(before for before, _ in node.next_functions)
    return leaves


class _KnownGradients(torch.autograd.Function):
    """A loss whose gradients are known already. It delivers them where autograd does, to its inputs."""

    @staticmethod
    def forward(ctx, loss, gradients, features, *parameters):
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError(
                "The Matryoshka loss has been backpropagated already: its gradients are no longer stored."
            )
        for index, gradient in enumerate(gradients):  # one by one, so that they are never held twice
            if gradient is not None:
                gradients[index] = gradient * grad_output
        return None, None, *gradients


def _add(sums: list[torch.Tensor | None], gradients: list[torch.Tensor]) -> None:
    for index, (old, new) in enumerate(zip(sums, gradients)):
        gradients[index] = None  # freed as soon as it is added
        sums[index] = new if old is None else old + new


def _cut(
    input_ids: torch.LongTensor,
    labels: torch.LongTensor,
    attention_mask: torch.Tensor | None,
    image_token_id: int,
    lengths: list[int],
    kept: list[int],
) -> tuple[dict[str, torch.Tensor | None], torch.LongTensor]:
    """Prompts with fewer placeholders: the first `kept` of the `lengths` that each image has, and no more padding than needed.

    Images may be adjacent, so where one ends is known from `lengths` alone. Padding may be on either side; what is needed
    of it afterwards is on the right.

    Args:
        input_ids, labels: (b, s).
        attention_mask: (b, s) or None.
        lengths, kept: i numbers.

    Returns:
        `input_ids` and `attention_mask` for the model, and labels, each (b, length of the longest row).
    """
    stays = torch.ones_like(input_ids, dtype=torch.bool)
    if attention_mask is not None:
        content = (attention_mask != 0) | (labels != -100)
        seen = content.cumsum(dim=1)
        stays = content | ((seen > 0) & (seen < seen[:, -1:]))  # a gap in the mask is no padding
    within_image = [torch.arange(n, device=stays.device) < k for n, k in zip(lengths, kept)]
    stays[input_ids == image_token_id] = torch.cat(within_image)
    order = stays.sort(dim=1, descending=True, stable=True).indices[:, : stays.sum(dim=1).max()]
    padding = ~stays.gather(1, order)
    if attention_mask is not None:
        attention_mask = attention_mask.gather(1, order).masked_fill(padding, 0)
    elif padding.any():
        attention_mask = (~padding).long()
    no_image = int(image_token_id == 0)  # any id that is not the placeholder's
    inputs = {"input_ids": input_ids.gather(1, order).masked_fill(padding, no_image), "attention_mask": attention_mask}
    return inputs, labels.gather(1, order).masked_fill(padding, -100)


def _check_scales(scales: list[int], offered: list[int], written: list[int]) -> None:
    if not isinstance(scales, list) or not scales or len(set(scales)) != len(scales):
        raise ValueError(f"matryoshka_scales={scales!r}: give at least one scale, and none twice.")
    for scale in check_num_visual_tokens(list(scales), offered, len(scales), name="matryoshka_scales"):
        if written and scale > min(written):
            raise ValueError(
                f"matryoshka_scales={scales!r}: the inputs were made at num_visual_tokens={min(written)}, which has no "
                f"{scale} tokens to train with. Make them at {max(scales)} or more."
            )


def _check_inputs(
    input_ids: torch.Tensor | None, labels: torch.Tensor | None, attention_mask: torch.Tensor | None, kwargs: dict
) -> None:
    """Raises `ValueError` for what cannot be cut to a scale, and takes what is not the language model's out of `kwargs`."""
    if input_ids is None:
        raise ValueError(
            "matryoshka_scales needs input_ids, to cut prompts to every scale; inputs_embeds do not show how."
        )
    if labels is None:
        raise ValueError("matryoshka_scales averages losses: pass labels, or one num_visual_tokens in its place.")
    if labels.shape != input_ids.shape:
        raise ValueError(
            f"Labels of shape {tuple(labels.shape)} for input_ids of shape {tuple(input_ids.shape)}: give one for each token."
        )
    if attention_mask is not None and attention_mask.ndim != 2:
        raise ValueError(
            f"attention_mask of shape {tuple(attention_mask.shape)} cannot be cut to every scale: with matryoshka_scales, "
            "pass one of shape (batch, sequence length)."
        )
    for name in ("inputs_embeds", "position_ids", "past_key_values", "mm_encoder_outputs"):
        if kwargs.pop(name, None) is not None:
            raise ValueError(
                f"{name} cannot be given with matryoshka_scales, as it differs from scale to scale. Leave it out."
            )
    kwargs.pop("use_cache", None)  # nothing follows that could use one
    for name, value in kwargs.items():
        if isinstance(value, torch.Tensor) and name != "num_items_in_batch":
            raise ValueError(
                f"{name} of shape {tuple(value.shape)} cannot be given with matryoshka_scales, which does not know how to cut it "
                "to every scale. Leave it out."
            )
