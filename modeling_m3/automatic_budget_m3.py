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
loads every `*.safetensors` of a folder as weights finds none in it. It holds a print of the weights that it was fitted on; a
model of others does without it.
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

from .weights_print_m3 import StoredWeights, print_of_folder, print_of_tensors, weight_files


logger = logging.get_logger(__name__)

AUTOMATIC_BUDGET_FILE = "automatic_budget.safetensors"
FORMAT = "M3 automatic budget 1"
DEFAULT_KEEP = 0.99


def read_signals(hidden_states: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """What the first decision reads: (b, 2 d), float32, the middle and the last layer at the end of prompts that end together.

    Args:
        hidden_states: of all layers, (b, s, d) each, the embeddings first.
    """
    last = hidden_states[-1][:, -1]
    middle = hidden_states[len(hidden_states) // 2][:, -1].to(last.device)  # of a model that is spread over devices
    return torch.cat([middle, last], dim=-1).float()


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

    def check(self, features: int, scales: int) -> None:
        """Raises `ValueError` unless its numbers are finite, and those from so many features to logits at so many scales."""
        hidden = self.first_bias.size
        expected = [(features,), (features,), (features, hidden), (hidden,), (hidden, scales), (scales,)]
        arrays = list(vars(self).values())
        if [array.shape for array in arrays] != expected or not all(np.isfinite(array).all() for array in arrays):
            raise ValueError(f"a network has shapes {[array.shape for array in arrays]}, not {expected}, or no numbers")


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
        print: of the stored weights that it was fitted on, see `weights_print_m3.py`; None for a choice that is bound to none.
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
        print: str | None = None,
    ):
        self.scales, self.start, self.width = scales, start, width
        self.probe_tokens, self.sure, self.keep, self.prices = probe_tokens, sure, keep, prices
        self.before, self.after, self.print = before, after, print

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
        bound = {} if self.print is None else {"print": self.print}
        header = json.dumps({"__metadata__": {"format": FORMAT, "choice": json.dumps(stored), **bound}}).encode()
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
            choice = cls(**stored, **networks, print=header.get("print"))
            choice._check_content()
            return choice
        except (LookupError, ValueError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            raise ValueError(
                f"{name} is no choice that m3-budget stored: {error}. Fit it anew, or remove it."
            ) from error

    def _check_content(self) -> None:
        """Raises `ValueError` unless one can choose by this."""
        scales, shares = self.scales, [self.sure, self.keep]
        counts = [*scales, self.width, self.probe_tokens]
        if any(type(count) is not int or count < 1 for count in counts) or scales != sorted(set(scales)):
            raise ValueError(f"scales, width and probe_tokens are {counts}")
        if self.start not in scales[:-1]:
            raise ValueError(f"it starts at {self.start!r} of scales {scales}")
        numbers = [*shares, *np.concatenate(self.prices).tolist()]
        if any(type(number) not in (int, float) for number in numbers) or not all(0 < share <= 1 for share in shares):
            raise ValueError(f"its shares are {shares} and its prices {self.prices}")
        prices = np.array(self.prices)
        if prices.shape[1:] != (3,) or not np.isfinite(prices).all() or (np.diff(prices[:, 0]) < 0).any():
            raise ValueError(f"its prices are {self.prices}")
        if self.print is not None and not isinstance(self.print, str):
            raise ValueError(f"its print is {self.print!r}")
        looked_at = scales[scales.index(self.start) : -1]
        if list(self.after) != looked_at:
            raise ValueError(f"it has networks after answers at {list(self.after)}, not {looked_at}")
        self.before.check(self.width, len(scales))
        for network in self.after.values():
            network.check(len(scales) + 9, len(scales))


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


@dataclass
class _Stored:
    """A choice as it lies beside the weights that a model was loaded from.

    Args:
        file: its path.
        content: of the file, understood when it is first needed.
        weights: that lie beside it.
        in_memory: the print of the model where it will be stored as other tensors than those, right after loading.
        carries_on: whether the model still is what was loaded.
    """

    file: str
    content: bytes
    weights: StoredWeights
    in_memory: str | None
    choice: AutomaticBudget | None = None
    carries_on: bool = False


class M3LlavaAutomaticBudgetMixin:
    """Keeps the choice with the model: what is stored is understood when it is first needed, and goes wherever the model goes."""

    _automatic_budget: Any = None
    _stored_automatic_budget: _Stored | None = None

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
            weights = StoredWeights([] if kwargs.get("variant") else weight_files(Path(file).parent))
            other_tensors = getattr(model, "is_quantized", False) or model.dtype == torch.float16
            in_memory = print_of_tensors(model.state_dict()) if other_tensors else None
            model._stored_automatic_budget = _Stored(file, Path(file).read_bytes(), weights, in_memory)
        return loaded

    @property
    def automatic_budget(self) -> AutomaticBudget | None:
        """The choice behind `num_visual_tokens="auto"`, None where none was fitted on these weights. May be set.

        Raises:
            ValueError: what is stored is no choice, or one for another model.
        """
        return self._find_automatic_budget()[0]

    @automatic_budget.setter
    def automatic_budget(self, choice: AutomaticBudget | None) -> None:
        self._automatic_budget, self._stored_automatic_budget = choice, None

    def _find_automatic_budget(self) -> tuple[AutomaticBudget | None, str]:
        """The choice, and why there is none where there is none."""
        stored = self._stored_automatic_budget
        if stored is None:
            return self._automatic_budget, "no choice was fitted for this checkpoint"
        if stored.choice is None:
            stored.choice = AutomaticBudget.from_bytes(stored.content, stored.file)
        adapted = getattr(self, "_hf_peft_config_loaded", False)
        if stored.choice.print is not None and (adapted or stored.choice.print != stored.weights.print()):
            return None, f"the choice in {stored.file} was fitted on other weights than this model's"
        stored.choice.check(self.config.visual_token_scales, 2 * self.config.text_config.hidden_size, stored.file)
        return stored.choice, ""

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        stored = self._stored_automatic_budget
        if stored is not None and stored.weights.print() is not None:  # asked for before its files may be replaced
            weights = args[1] if len(args) > 1 else kwargs.get("state_dict")
            stored.carries_on = stored.in_memory is not None and stored.in_memory == print_of_tensors(
                self.state_dict() if weights is None else weights
            )
        super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            self._save_automatic_budget(Path(save_directory))

    def _upload_modified_files(self, working_dir: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        self._save_automatic_budget(Path(working_dir))
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def _save_automatic_budget(self, folder: Path) -> None:
        file, stored = folder / AUTOMATIC_BUDGET_FILE, self._stored_automatic_budget
        if stored is not None:
            content = stored.content
            if stored.carries_on and (saved := print_of_folder(folder)) is not None:
                content = content.replace(stored.weights.print().encode(), saved.encode())  # if it was fitted on those
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
