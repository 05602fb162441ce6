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
"""Which number of visual tokens a prompt needs: the choice behind `num_visual_tokens="auto"`, and where it is stored.

A coarse pass, at `start` tokens, is followed by two decisions. Before anything is answered, the language model's hidden states
at the end of the prompt tell how likely each number gives the right answer; the number with the best of likelihood and price is
taken. After the beginning of an answer at that number, if it is not the finest, its log-probabilities tell again, and a finer
number may be taken. The price of a token follows from how much accuracy is to be kept.

The choice is a file of its own beside the weights, and a safetensors file without tensors: all is in its header, so whoever
loads every `*.safetensors` of a folder as weights finds none in it.
"""

import base64
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils import cached_file, logging


logger = logging.get_logger(__name__)

AUTOMATIC_BUDGET_FILE = "automatic_budget.safetensors"
FORMAT = "M3 automatic budget 1"
DEFAULT_KEEP = 0.99


def read_signals(hidden_states: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """What the first decision reads: (b, 2 d), float32, the middle and the last layer at the end of prompts that end together.

    Args:
        hidden_states: of all layers, (b, s, d) each, the embeddings first.
    """
    return torch.cat([hidden_states[len(hidden_states) // 2][:, -1], hidden_states[-1][:, -1]], dim=-1).float()


class Confidence:
    """How sure a model is of greedy answers, token after token.

    Args:
        rows: how many answers there are.
    """

    def __init__(self, rows: int, device: torch.device | str):
        self._sum, self._least, self._first, self._entropy, self._count = torch.zeros(5, rows, device=device)
        self._margin = torch.full((rows,), 50.0, device=device)

    def add(self, logits: torch.Tensor, going: torch.Tensor) -> None:
        """Takes the logits (rows, v) of the next token, of the rows (rows,) whose answer goes on."""
        logs = logits.float().log_softmax(-1)
        best, second = logs.topk(2, dim=-1).values.unbind(-1)
        self._first = torch.where(going & (self._count == 0), best, self._first)
        self._sum = self._sum + best * going
        self._least = torch.where(going, torch.minimum(self._least, best), self._least)
        self._margin = torch.where(going, torch.minimum(self._margin, best - second), self._margin)
        self._entropy = self._entropy - going * (logs.exp() * logs).sum(-1)
        self._count = self._count + going

    def values(self) -> torch.Tensor:
        """(rows, 6): the log-probability of the answer, of its least likely token, of its first; the least margin to another
        token; the sum of entropies; the number of tokens."""
        parts = (self._sum, self._least, self._first, self._margin, self._entropy, self._count)
        return torch.stack(parts, dim=-1)


@dataclass
class Network:
    """One hidden layer, from features of mean 0 and deviation 1 to logits; numpy, float32."""

    mean: np.ndarray
    deviation: np.ndarray
    first: np.ndarray
    first_bias: np.ndarray
    second: np.ndarray
    second_bias: np.ndarray

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Logits (b, s) of features (b, f)."""
        hidden = (features - self.mean) / self.deviation @ self.first + self.first_bias
        return np.maximum(hidden, 0) @ self.second + self.second_bias


class AutomaticBudget:
    """A choice that was fitted, by `m3-budget`, on questions whose answers are known.

    Args:
        scales: (s,) that it chooses from, ascending.
        start: the scale of the first pass.
        width: of the signals that it reads.
        probe_tokens: how much of an answer is looked at before it is kept or thrown away.
        sure: an answer that is as likely right as this before it is given, is not looked at.
        keep: the share of the finest scale's accuracy that is kept where nobody asks for another.
        prices: for each share of accuracy to keep, ascending, the price of 1,000 visual tokens before an answer and after it.
        before: from signals (b, width) to logits of a right answer at each scale, (b, s).
        after: by scale of the answer, from those logits and its confidence to better ones.
    """

    def __init__(
        self,
        scales: list[int],
        start: int,
        width: int,
        probe_tokens: int,
        sure: float,
        keep: float,
        prices: list[tuple[float, float, float]],
        before: Network,
        after: dict[int, Network],
    ):
        self.scales, self.start, self.width = scales, start, width
        self.probe_tokens, self.sure, self.keep, self.prices = probe_tokens, sure, keep, prices
        self.before, self.after = before, after

    def first_choice(self, signals: torch.Tensor, keep: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """After the first pass.

        Args:
            signals: (b, width), see `read_signals`.
            keep: the share of the finest scale's accuracy to keep.

        Returns:
            The logits (b, s) of a right answer at each scale, the chosen scales (b,), and whether the answer there is to be
            looked at (b,).
        """
        logits = self.before(signals.cpu().numpy())
        chances = probability(logits)
        choice = best_scale(chances, self.scales, self.scales.index(self.start), self.price(keep)[0])
        unsure = chances[np.arange(len(choice)), choice] < self.sure
        return logits, np.array(self.scales)[choice], unsure & (choice < len(self.scales) - 1)

    def next_choice(self, scale: int, logits: np.ndarray, confidence: torch.Tensor, keep: float) -> np.ndarray:
        """The scales (b,) to answer at after the beginning of an answer at `scale`: that one, or finer ones."""
        features = features_after(logits, confidence.cpu().numpy())
        chances, index = probability(self.after[scale](features)), self.scales.index(scale)
        return np.array(self.scales)[best_scale(chances, self.scales, index, self.price(keep)[1])]

    def price(self, keep: float) -> tuple[float, float]:
        """Before and after an answer, between those that were fitted; outside of them, the nearest."""
        keeps, before, after = np.array(self.prices).T
        return float(np.interp(keep, keeps, before)), float(np.interp(keep, keeps, after))

    def check(self, scales: list[int], width: int, name: str) -> None:
        """Raises `ValueError` unless this was fitted for a model of these scales and this width of signals."""
        if self.scales != scales or self.width != width:
            raise ValueError(
                f"{name} was fitted for scales {self.scales} and hidden states of "
                f"{self.width // 2}, this model has {scales} and {width // 2}. Fit it anew by m3-budget, or remove it."
            )

    def to_bytes(self) -> bytes:
        """The content of `AUTOMATIC_BUDGET_FILE`. Numbers of networks are stored in float16."""
        stored = {
            **{
                name: getattr(self, name)
                for name in ("scales", "start", "width", "probe_tokens", "sure", "keep", "prices")
            },
            "before": _encoded(self.before),
            "after": {str(scale): _encoded(network) for scale, network in self.after.items()},
        }
        header = json.dumps({"__metadata__": {"format": FORMAT, "choice": json.dumps(stored)}}).encode()
        header += b" " * (-len(header) % 8)
        return len(header).to_bytes(8, "little") + header

    @classmethod
    def from_bytes(cls, content: bytes, name: str) -> "AutomaticBudget":
        """Of what `to_bytes` made. Raises `ValueError` that names the file for anything else."""
        try:
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
            if header["format"] != FORMAT:
                raise ValueError(f"its format is {header['format']!r}")
            stored = json.loads(header["choice"])
            networks = {
                "before": _decoded(stored.pop("before")),
                "after": {int(scale): _decoded(network) for scale, network in stored.pop("after").items()},
            }
            return cls(**stored, **networks)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{name} is no choice that m3-budget stored: {error}. Fit it anew, or remove it."
            ) from error


class UnfittedBudget:
    """The rule for a checkpoint without a fitted choice: an answer is kept where it is as probable as `keep`, to its token.

    Coarse first, then the second finest scale, then the finest: careful, and dearer than a fitted choice.
    """

    probe_tokens, keep = 16, DEFAULT_KEEP

    def __init__(self, scales: list[int]):
        self.scales = scales
        self.start = self.scales[min(1, len(self.scales) - 2)]

    def first_choice(self, signals: torch.Tensor, keep: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rows = len(signals)
        return np.zeros((rows, len(self.scales))), np.full(rows, self.start), np.ones(rows, dtype=bool)

    def next_choice(self, scale: int, logits: np.ndarray, confidence: torch.Tensor, keep: float) -> np.ndarray:
        finer = self.scales[-2] if scale < self.scales[-2] else self.scales[-1]
        return np.where(confidence[:, 0].exp().cpu().numpy() >= keep, scale, finer)


def probability(logits: np.ndarray) -> np.ndarray:
    """The logistic function, whose argument is kept in a range."""
    return 1 / (1 + np.exp(-np.clip(logits, -30, 30)))


def features_after(logits: np.ndarray, confidence: np.ndarray) -> np.ndarray:
    """What the second decision reads: logits (b, s) of the first, and `Confidence.values` (b, 6), (b, s + 9)."""
    compressed = np.sign(confidence) * np.log1p(np.abs(confidence) * np.array([10, 10, 10, 1, 10, 1]))
    parts = [np.clip(logits, -9, 9), compressed, np.exp(confidence[:, :3])]
    return np.concatenate(parts, axis=1).astype(np.float32)


def best_scale(chances: np.ndarray, scales: list[int], here: int, price: float) -> np.ndarray:
    """The index (b,) of the scale to answer at, given chances (b, s) of a right answer at each.

    To stay at index `here` costs nothing more; a finer scale costs its own tokens, per 1,000 the price; none is coarser.
    """
    costs = np.array(scales, dtype=float) / 1000
    costs[here] = 0
    worth = chances - price * costs
    worth[:, :here] = -np.inf
    return worth.argmax(1)


class M3LlavaAutomaticBudgetMixin:
    """Keeps the choice with the model: what is stored is understood when it is first needed, and goes wherever the model goes."""

    _automatic_budget: Any = None
    _stored_automatic_budget: tuple[str, bytes] | None = None  # of which file, and its content

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if kwargs.get("output_loading_info") else loaded
        if (args[0] if args else kwargs.get("pretrained_model_name_or_path")) is None:
            return loaded  # of weights in memory: there is no folder to look into
        places = ("cache_dir", "revision", "token", "local_files_only", "subfolder")
        found = {name: kwargs[name] for name in places if kwargs.get(name) is not None}
        if getattr(model.config, "_commit_hash", None) is not None:
            found["revision"] = model.config._commit_hash
        file = cached_file(
            model.config._name_or_path,
            AUTOMATIC_BUDGET_FILE,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,  # the weights were there: offline, from the cache
            **found,
        )
        if file is not None:
            model._stored_automatic_budget = file, Path(file).read_bytes()
        return loaded

    @property
    def automatic_budget(self) -> AutomaticBudget | None:
        """The choice behind `num_visual_tokens="auto"`, None where none was fitted. May be set.

        Raises:
            ValueError: what is stored is no choice, or one for another model.
        """
        if self._automatic_budget is None and self._stored_automatic_budget is not None:
            file, content = self._stored_automatic_budget
            choice = AutomaticBudget.from_bytes(content, file)
            choice.check(self.config.visual_token_scales, 2 * self.config.text_config.hidden_size, file)
            self._automatic_budget = choice
        return self._automatic_budget

    @automatic_budget.setter
    def automatic_budget(self, choice: AutomaticBudget | None) -> None:
        self._automatic_budget, self._stored_automatic_budget = choice, None

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            self._save_automatic_budget(Path(save_directory))

    def _upload_modified_files(self, working_dir: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        self._save_automatic_budget(Path(working_dir))
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def _save_automatic_budget(self, folder: Path) -> None:
        file = folder / AUTOMATIC_BUDGET_FILE
        if self._stored_automatic_budget is not None:
            _, content = self._stored_automatic_budget
        elif self._automatic_budget is not None:
            content = self._automatic_budget.to_bytes()
        else:
            file.unlink(missing_ok=True)  # another model's
            return
        if file.is_file() and file.read_bytes() == content:
            return
        part = file.with_name(f".{file.name}.part")
        try:
            part.write_bytes(content)
            os.replace(part, file)
        finally:
            part.unlink(missing_ok=True)


def _encoded(network: Network) -> dict[str, Any]:
    return {
        name: [list(array.shape), base64.b64encode(array.astype("<f2").tobytes()).decode()]
        for name, array in asdict(network).items()
    }


def _decoded(stored: dict[str, Any]) -> Network:
    return Network(
        **{
            name: np.frombuffer(base64.b64decode(text), dtype="<f2").astype(np.float32).reshape(shape)
            for name, (shape, text) in stored.items()
        }
    )
