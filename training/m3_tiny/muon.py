"""The optimizer of every stage of m3-tiny: torch's Muon for the matrices of layers, AdamW for everything else.

With AdamW alone, the language model takes some 200 steps before it can compare a word with what is seen; so it takes 60.
And the vision tower, after 600 steps, reads half of all characters for a quarter.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


class MuonWithAdamW(torch.optim.Optimizer):
    """Two optimizers that a `Trainer` handles as one.

    Args:
        model: whose matrices are Muon's, if `layers.` is in their name.
        groups: of parameters, with `lr` and `weight_decay`. Muon's rate is three times the group's.
    """

    def __init__(self, model: nn.Module, groups: Iterable[dict[str, Any]]):
        named = model.named_parameters()
        of_layers = {id(weight) for name, weight in named if "layers." in name and weight.ndim == 2}
        muon, adamw = [], []
        for group in groups:
            matrices = [weight for weight in group["params"] if id(weight) in of_layers]
            others = [weight for weight in group["params"] if id(weight) not in of_layers]
            if matrices:
                muon.append({**group, "params": matrices, "lr": 3 * group["lr"]})
            if others:
                adamw.append({**group, "params": others})
        self.parts = [torch.optim.Muon(muon, adjust_lr_fn="match_rms_adamw"), torch.optim.AdamW(adamw, fused=True)]
        super().__init__(self._groups_of_parts(), {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = self._groups_of_parts()

    def _groups_of_parts(self) -> list[dict[str, Any]]:
        """The parts' own groups, not copies: a schedule changes their rates."""
        return [group for part in self.parts for group in part.param_groups]


class FloatMuon(torch.optim.Optimizer):
    """torch's Muon, which takes most of a step's time on CPUs that compute in float32 only: it wants bfloat16."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for weight in group["params"]:
                by_shape[weight.shape].append(weight)
            for shape, weights in by_shape.items():
                factor = group["lr"] * 0.2 * max(shape) ** 0.5
                for weight, update in zip(weights, orthogonal(torch.stack([*map(self._momentum, weights)]))):
                    weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-factor)

    def _momentum(self, weight: torch.Tensor) -> torch.Tensor:
        momentum = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
        return weight.grad.lerp(momentum.lerp_(weight.grad, 0.05), 0.95)


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """(n, rows, columns), every singular value near 1: the iteration of Newton and Schulz with Muon's numbers."""
    wide = matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices
    wide = wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        square = wide @ wide.mT
        wide = 3.4445 * wide + (-4.775 * square + 2.0315 * square @ square) @ wide
    return wide.mT if matrices.shape[1] > matrices.shape[2] else wide


class FloatMuonWithAdamW(MuonWithAdamW):
    """The same with `FloatMuon`."""

    def __init__(self, model: nn.Module, groups: list[dict[str, Any]]):
        super().__init__(model, groups)
        self.parts[0] = FloatMuon(self.parts[0].param_groups, {})
        self.param_groups = self._groups_of_parts()
