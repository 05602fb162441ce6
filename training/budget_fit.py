"""Fits the choice behind `num_visual_tokens="auto"` on questions that were answered at every scale.

Two kinds of small networks are fitted: before an answer, from the signals of the coarse pass to how likely each scale is right;
after the beginning of an answer, from that and the answer's confidence to the same. What is predicted for a question comes
from networks that saw no question about its picture, so that prices of tokens are chosen on what is new to them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from m3_evaluation.signals import PROBE_TOKENS
from modeling_m3.automatic_budget_m3 import (
    DEFAULT_KEEP,
    AutomaticBudget,
    Network,
    best_scale,
    features_after,
    probability,
)

from .budget_samples import Samples


FOLDS = 4
ENSEMBLE = 3  # networks whose mean is one network, three times as wide
SURE = 0.99
KEEPS = (0.9, 0.93, 0.95, 0.97, 0.98, 0.99, 0.995, 1.0)
LEAST, LEAST_PICTURES = 500, 50  # questions, and pictures that they are about
WIDEST = 0.05  # half the width of an interval of the share that is kept
LEAST_GAIN = 0.02  # of the finest scale over the first pass
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
    """What a choice came to, (n,) each.

    Attributes:
        score: of the answer.
        tokens: visual tokens of all passes.
        scale: index of the one that is answered at.
        path: the passes, as "9 36? 576": at 9, at 36 whose answer was looked at, at 576.
    """

    score: np.ndarray
    tokens: np.ndarray
    scale: np.ndarray
    path: np.ndarray


def check_numbers(questions: int, pictures: int) -> None:
    """Raises `ValueError` where questions, or the pictures that they are about, are too few whatever is answered."""
    if questions < LEAST or pictures < LEAST_PICTURES:
        raise ValueError(
            f"{questions} question(s) about {pictures} picture(s) are too few to tell what share of accuracy is kept: at least "
            f"{LEAST} questions about {LEAST_PICTURES} pictures are needed."
        )


def check_labelled(samples: Samples, start: int) -> None:
    """Raises `ValueError` where questions are too few to tell what is kept, or none of them needs more tokens."""
    pictures = len(set(samples.groups.tolist()))
    check_numbers(len(samples), pictures)
    finest, first = samples.scores[:, -1], samples.scores[:, list(samples.scales).index(start)]
    weights = equal_weights(samples.kinds)
    if (finest * weights).sum() - (first * weights).sum() < LEAST_GAIN:
        raise ValueError(
            f"At {samples.scales[-1]} visual tokens these questions are answered {(finest * weights).sum():.1%} right, at {start} "
            f"{(first * weights).sum():.1%}: none needs detail, so there is nothing to choose. Add questions that do."
        )
    # Of the share that is kept, where each question weighs the same.
    difference = (finest - first) / finest.mean() / len(samples)
    width = 1.96 * _error(samples, difference - difference.mean())
    if width > WIDEST:
        raise ValueError(
            f"{len(samples)} questions about {pictures} pictures tell the share of accuracy that is kept to {100 * width:.1f} "
            f"points: at least {int(np.ceil(pictures * (width / WIDEST) ** 2))} pictures are needed, for {100 * WIDEST:g} points."
        )


def fit(
    samples: Samples,
    start: int,
    keep: float = DEFAULT_KEEP,
    keeps: Sequence[float] = KEEPS,
    seed: int = 0,
    progress: Callable[[int], object] = int,
) -> tuple[AutomaticBudget, Predicted]:
    """The choice, and what was predicted for each question without it.

    Args:
        samples: of all questions.
        start: the scale of the first pass.
        keep: the share that is kept where a user asks for none.
        keeps: shares of the finest scale's score for which prices are chosen.
        seed: of the networks and of the folds.
        progress: is told of every network that is fitted, `number_of_networks` in all.
    """
    scales = [int(scale) for scale in samples.scales]
    first, weights = scales.index(start), equal_weights(samples.kinds)
    predicted = _out_of_fold(samples, first, weights, seed, progress)
    signals = samples.signals[:, first].astype(np.float32)
    before = fit_network(signals, samples.scores, weights, 48, 30, seed, progress)
    after = {}
    for index in range(first, len(scales) - 1):
        features = features_after(predicted.before, samples.confidences[:, index])
        after[scales[index]] = fit_network(features, samples.scores, weights, 32, 60, seed, progress)
    prices = choose_prices(samples, predicted, first, weights, keeps)
    width = signals.shape[1]
    choice = AutomaticBudget(scales, start, width, PROBE_TOKENS, SURE, keep, prices, before, after)
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
    before = choice.before(samples.signals[:, choice.scales.index(choice.start)].astype(np.float32))
    after = {
        choice.scales.index(scale): probability(
            network(features_after(before, samples.confidences[:, choice.scales.index(scale)]))
        )
        for scale, network in choice.after.items()
    }
    return Predicted(before, after)


def outcome(samples: Samples, predicted: Predicted, first: int, prices: tuple[float, float]) -> Outcome:
    """What comes of the decisions at these prices."""
    scales, rows = [int(scale) for scale in samples.scales], np.arange(len(samples))
    chances = probability(predicted.before)
    scale = best_scale(chances, scales, first, prices[0])
    tokens = samples.tokens[:, first] + np.where(scale == first, 0, samples.tokens[rows, scale])
    names = np.array([f" {number}" for number in scales], dtype="U40")
    path = np.char.add(str(scales[first]), np.where(scale == first, "", names[scale]))
    unsure = chances[rows, scale] < SURE
    for index in range(first, len(scales) - 1):
        looked = (scale == index) & unsure
        choice = np.where(looked, best_scale(predicted.after[index], scales, index, prices[1]), scale)
        tokens = tokens + np.where(choice != scale, samples.tokens[rows, choice], 0)
        path = np.char.add(np.char.add(path, np.where(looked, "?", "")), np.where(choice != scale, names[choice], ""))
        scale = choice
    return Outcome(samples.scores[rows, scale], tokens, scale, path)


def choose_prices(
    samples: Samples, predicted: Predicted, first: int, weights: np.ndarray, keeps: Sequence[float]
) -> list[tuple[float, float, float]]:
    """For each share to keep, ascending, the prices before and after an answer that keep it with the fewest tokens.

    What is kept must exceed the share by a standard error, so that fewer questions to fit on take more tokens. Where no prices
    do, tokens are free.
    """
    table = []
    for ratio in np.geomspace(0.1, 4, 9):
        for price in PRICES:
            found = outcome(samples, predicted, first, (price, price * ratio))
            kept, error = kept_share(samples, found.score, weights)
            table.append((kept - error, (found.tokens * weights).sum(), price, price * ratio))
    chosen = []
    for keep in sorted(keeps):
        enough = [row for row in table if row[0] >= keep]
        _, _, before, after = min(enough, key=lambda row: row[1]) if enough else (0, 0, 0.0, 0.0)
        chosen.append((float(keep), float(before), float(after)))
    return chosen


def kept_share(samples: Samples, score: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """The share of the finest scale's score that scores (n,) keep, and its standard error, where pictures are independent."""
    finest = samples.scores[:, -1]
    full = (finest * weights).sum()
    kept = (score * weights).sum() / full
    return float(kept), float(_error(samples, weights * (score - kept * finest)) / full)


def _error(samples: Samples, values: np.ndarray) -> float:
    """The standard error of a sum of values (n,) whose mean is 0, where pictures are independent and questions about one are not."""
    by_picture = np.bincount(np.unique(samples.groups, return_inverse=True)[1], values)
    return np.sqrt((by_picture**2).sum())


def _out_of_fold(
    samples: Samples, first: int, weights: np.ndarray, seed: int, progress: Callable[[int], object]
) -> Predicted:
    groups, index = np.unique(samples.groups, return_inverse=True)
    folds = np.random.default_rng(seed).permutation(len(groups))[index] % FOLDS
    signals, scales = samples.signals[:, first].astype(np.float32), len(samples.scales)
    before = np.zeros((len(samples), scales), dtype=np.float32)
    for fold in range(FOLDS):
        seen = folds != fold
        network = fit_network(signals[seen], samples.scores[seen], weights[seen], 48, 30, seed, progress)
        before[~seen] = network(signals[~seen])
    after = {}
    for answered in range(first, scales - 1):
        features = features_after(before, samples.confidences[:, answered])
        after[answered] = np.zeros((len(samples), scales))
        for fold in range(FOLDS):
            seen = folds != fold
            network = fit_network(features[seen], samples.scores[seen], weights[seen], 32, 60, seed, progress)
            after[answered][~seen] = probability(network(features[~seen]))
    return Predicted(before, after)


def fit_network(
    features: np.ndarray,
    scores: np.ndarray,
    weights: np.ndarray,
    hidden: int,
    epochs: int,
    seed: int,
    progress: Callable[[int], object] = int,
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
