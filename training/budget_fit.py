"""Fits the choice behind `num_visual_tokens="auto"` on questions that were answered at every scale.

Two kinds of small networks are fitted: before an answer, from the signals of the coarse pass to how likely each scale is right;
after the beginning of an answer, from that and the answer's confidence to the same. What is predicted for a question comes
from networks that saw no question about its picture, so that prices of tokens are chosen on what is new to them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from modeling_m3.automatic_budget_m3 import (
    AutomaticBudget,
    Network,
    choose_after,
    choose_before,
    features_after,
    probability,
)

from .budget_samples import Samples


FOLDS = 4
ENSEMBLE = 3  # networks whose mean is one network, three times as wide
SURE = 0.97
PROBE_TOKENS = 8
KEEPS = (0.9, 0.93, 0.95, 0.97, 0.98, 0.99, 0.995, 1.0)
PRICES = np.geomspace(0.01, 8, 25)


@dataclass
class Predicted:
    """What networks say of n questions.

    Attributes:
        before: (n, s) logits.
        after: by index of the scale answered at, (n, s) chances.
    """

    before: np.ndarray
    after: dict[int, np.ndarray]


@dataclass
class Outcome:
    """What a choice came to: score, tokens of all passes and answers looked at, (n,) each."""

    score: np.ndarray
    tokens: np.ndarray
    looks: np.ndarray
    scale: np.ndarray


def fit(
    samples: Samples, start: int, keeps: Sequence[float] = KEEPS, seed: int = 0, progress: Callable[[int], object] = int
) -> tuple[AutomaticBudget, Predicted]:
    """The choice, and what was predicted for each question without it.

    Args:
        samples: of all questions.
        start: the scale of the first pass.
        keeps: shares of the finest scale's score for which prices are chosen.
        seed: of the networks and of the folds.
        progress: is told of every network that is fitted, `number_of_networks` in all.
    """
    scales = [int(scale) for scale in samples.scales]
    first, weights = scales.index(start), equal_weights(samples.kinds)
    predicted = _out_of_fold(samples, first, weights, seed, progress)
    before = _network(samples.signals[:, first].astype(np.float32), samples.scores, weights, 48, 30, seed, progress)
    after = {}
    for index in range(first, len(scales) - 1):
        features = features_after(predicted.before, samples.confidences[:, index])
        after[scales[index]] = _network(features, samples.scores, weights, 16, 20, seed, progress)
    prices = choose_prices(samples, predicted, first, weights, keeps)
    width = samples.signals.shape[2]
    choice = AutomaticBudget(scales, start, width, PROBE_TOKENS, SURE, prices, before, after)
    return AutomaticBudget.from_bytes(choice.to_bytes(), "what was fitted"), predicted  # rounded as it is stored


def number_of_networks(scales: Sequence[int], start: int) -> int:
    """How many `fit` fits."""
    return (FOLDS + 1) * ENSEMBLE * (len(scales) - list(scales).index(start))


def equal_weights(kinds: np.ndarray) -> np.ndarray:
    """(n,) with which every kind of question counts the same, and all together 1."""
    _, index, counts = np.unique(kinds, return_inverse=True, return_counts=True)
    return 1 / counts[index] / len(counts)


def predict(choice: AutomaticBudget, samples: Samples) -> Predicted:
    """What a fitted choice says of questions."""
    first = choice.scales.index(choice.start)
    before = choice.before(samples.signals[:, first].astype(np.float32))
    after = {
        choice.scales.index(scale): probability(network(features_after(before, samples.confidences[:, choice.scales.index(scale)])))
        for scale, network in choice.after.items()
    }
    return Predicted(before, after)


def outcome(samples: Samples, predicted: Predicted, first: int, prices: tuple[float, float]) -> Outcome:
    """What comes of the decisions at these prices."""
    scales, rows = [int(scale) for scale in samples.scales], np.arange(len(samples))
    chances = probability(predicted.before)
    scale = choose_before(chances, scales, first, prices[0])
    tokens = samples.tokens[:, first] + np.where(scale == first, 0, samples.tokens[rows, scale])
    looks = np.zeros(len(samples))
    unsure = chances[rows, scale] < SURE
    for index in range(first, len(scales) - 1):
        looked = (scale == index) & unsure
        choice = np.where(looked, choose_after(predicted.after[index], scales, index, prices[1]), scale)
        tokens = tokens + np.where(choice != scale, samples.tokens[rows, choice], 0)
        looks, scale = looks + looked, choice
    return Outcome(samples.scores[rows, scale], tokens, looks, scale)


def choose_prices(
    samples: Samples, predicted: Predicted, first: int, weights: np.ndarray, keeps: Sequence[float]
) -> list[tuple[float, float, float]]:
    """For each share to keep, ascending, the prices before and after an answer that keep it with the fewest tokens.

    The two prices are a path: for each price of the best mean of both, the ratio between them is the same.
    """
    full = (samples.scores[:, -1] * weights).sum()
    table = []
    for ratio in np.geomspace(0.1, 4, 9):
        for price in PRICES:
            found = outcome(samples, predicted, first, (price, price * ratio))
            table.append(((found.score * weights).sum() / full, (found.tokens * weights).sum(), price, price * ratio))
    finest = 0.0
    chosen = []
    for keep in sorted(keeps):
        enough = [row for row in table if row[0] >= keep]
        _, _, before, after = min(enough, key=lambda row: row[1]) if enough else (0, 0, finest, finest)
        chosen.append((float(keep), float(before), float(after)))
    return chosen


def _out_of_fold(
    samples: Samples, first: int, weights: np.ndarray, seed: int, progress: Callable[[int], object]
) -> Predicted:
    groups, index = np.unique(samples.groups, return_inverse=True)
    folds = np.random.default_rng(seed).permutation(len(groups))[index] % FOLDS
    signals, scales = samples.signals[:, first].astype(np.float32), len(samples.scales)
    before = np.zeros((len(samples), scales), dtype=np.float32)
    for fold in range(FOLDS):
        seen = folds != fold
        network = _network(signals[seen], samples.scores[seen], weights[seen], 48, 30, seed, progress)
        before[~seen] = network(signals[~seen])
    after = {}
    for answered in range(first, scales - 1):
        features = features_after(before, samples.confidences[:, answered])
        after[answered] = np.zeros((len(samples), scales))
        for fold in range(FOLDS):
            seen = folds != fold
            network = _network(features[seen], samples.scores[seen], weights[seen], 16, 20, seed, progress)
            after[answered][~seen] = probability(network(features[~seen]))
    return Predicted(before, after)


def _network(
    features: np.ndarray,
    scores: np.ndarray,
    weights: np.ndarray,
    hidden: int,
    epochs: int,
    seed: int,
    progress: Callable[[int], object],
) -> Network:
    """The mean of an ensemble, as one network."""
    mean, deviation = features.mean(0), features.std(0) + 1e-6
    inputs = torch.from_numpy((features - mean) / deviation)
    targets, weights = torch.from_numpy(scores), torch.from_numpy(weights / weights.mean()).float()
    members = []
    for member in range(ENSEMBLE):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1000 * seed + member)
            members.append(_train(inputs, targets, weights, hidden, epochs))
        progress(1)
    first, first_bias, second, second_bias = zip(*members)
    return Network(
        mean,
        deviation,
        np.concatenate(first, axis=1),
        np.concatenate(first_bias),
        np.concatenate(second) / ENSEMBLE,
        np.mean(second_bias, axis=0),
    )


def _train(
    inputs: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, hidden: int, epochs: int
) -> tuple[np.ndarray, ...]:
    model = torch.nn.Sequential(
        torch.nn.Linear(inputs.shape[1], hidden),
        torch.nn.ReLU(),
        torch.nn.Dropout(0.2),
        torch.nn.Linear(hidden, targets.shape[1]),
    )
    batches = max(4, len(inputs) // 1024)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=epochs * batches)
    for _ in range(epochs):
        for chosen in torch.randperm(len(inputs)).chunk(batches):
            loss = torch.nn.functional.binary_cross_entropy_with_logits(
                model(inputs[chosen]), targets[chosen], weight=weights[chosen, None]
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    first, second = model[0], model[3]
    parts = first.weight.T, first.bias, second.weight.T, second.bias
    return tuple(part.detach().numpy() for part in parts)
