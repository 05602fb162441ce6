"""The first stage: the vision tower learns what every patch shows, which stands for CLIP's pretraining.

Without it reading is not learned at all: the loss of an answer says too little about thousands of pixels. Most steps see
12x12 patches only, placed anywhere in the 24x24 grid of positions, which is four times as fast; the last ones see all.
"""

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset
from transformers import CLIPVisionModel

from modeling_m3 import M3LlavaImageProcessorPil

from .scenes import LABELS, PATCH, low_resolution_scene, scene, text_scene


NUM_LABELS = sum(classes for _, classes in LABELS)


class LabelledScenes(Dataset):
    """Scene `index` of an endless series, with the labels of its patches.

    Args:
        length: how many.
        view: side of the square in pixels.
        name: another name is another series.
    """

    def __init__(self, length: int, view: int, name: str = "vision"):
        self.length, self.view, self.name = length, view, name
        edge = {"height": view, "width": view}
        self.image_processor = M3LlavaImageProcessorPil(size={"shortest_edge": view}, crop_size=edge)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`pixel_values` (3, view, view), `labels` (view / 14, view / 14, 7), `corner` (2,): where in the grid it is."""
        seed = f"{self.name} {self.view} {index}"
        if index % 8 == 0:
            made = low_resolution_scene(seed, self.view)
        elif index % 8 < 3:
            made = scene(seed, view=self.view)
        else:
            made = text_scene(seed, self.view)
        pixel_values = self.image_processor(made.picture, return_tensors="pt")["pixel_values"][0]
        free = 24 - self.view // PATCH + 1
        corner = np.random.default_rng(index).integers(0, free, 2)
        return {
            "pixel_values": pixel_values,
            "labels": torch.from_numpy(made.labels),
            "corner": torch.from_numpy(corner),
        }


class PatchClassifier(nn.Module):
    """A vision tower with one linear head for all kinds of labels."""

    def __init__(self, vision_tower: CLIPVisionModel):
        super().__init__()
        self.vision_tower = vision_tower
        self.head = nn.Linear(vision_tower.config.hidden_size, NUM_LABELS)

    def forward(
        self, pixel_values: torch.Tensor, corner: torch.Tensor, labels: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """
        Args:
            pixel_values: (b, 3, h, w), h and w at most those of the vision tower.
            corner: (b, 2), row and column of the first patch in the tower's grid.
            labels: (b, rows, columns, 7).

        Returns:
            `logits`, (b, rows * columns, classes of all kinds), and `loss`, the sum over the kinds: of each, the mean
            over patches that show something and, with the same weight, over those that do not.
        """
        tower, embeddings = self.vision_tower, self.vision_tower.embeddings
        patches = embeddings.patch_embedding(pixel_values)
        rows = corner[:, :1] + torch.arange(patches.shape[2], device=corner.device)
        columns = corner[:, 1:] + torch.arange(patches.shape[3], device=corner.device)
        side = tower.config.image_size // tower.config.patch_size
        positions = (rows[:, :, None] * side + columns[:, None, :]).flatten(1) + 1
        hidden = patches.flatten(2).transpose(1, 2) + embeddings.position_embedding(positions)
        first = embeddings.class_embedding + embeddings.position_embedding.weight[0]
        hidden = torch.cat([first.expand(len(hidden), 1, -1), hidden], dim=1)
        hidden = tower.encoder(inputs_embeds=tower.pre_layrnorm(hidden)).last_hidden_state
        logits = self.head(hidden[:, 1:])
        if labels is None:
            return {"logits": logits}
        loss = logits.new_zeros(())
        for kind, kind_logits in enumerate(logits.split([classes for _, classes in LABELS], dim=-1)):
            target = labels[..., kind].flatten()
            each = cross_entropy(kind_logits.flatten(0, 1).float(), target, reduction="none")
            shown = (target > 0).float()
            loss = loss + (each * shown).sum() / shown.sum().clamp(min=1)
            loss = loss + (each * (1 - shown)).sum() / (1 - shown).sum().clamp(min=1)
        return {"loss": loss, "logits": logits}
