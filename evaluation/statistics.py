"""What outcomes at several scales say: sufficiency, the oracle, the best random mix, intervals, agreement, FLOPs.

Shapes use: n samples, s scales, ascending. Needs numpy only.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .operations import language_model


THRESHOLD = 0.5  # of a score that counts as sufficient: right for 0 and 1, ANLS and the VQA score
RESAMPLES = 2000
NORMAL_95 = 1.959963984540054
CHUNK = 4_000_000  # counts of resampled rows that are in memory at once


@dataclass(frozen=True)
class Choice:
    """What a choice of scales reaches.

    Attributes:
        performance: mean score at the chosen scales.
        tokens: mean cost of the chosen scales.
    """

    performance: float
    tokens: float


@dataclass(frozen=True)
class Mix:
    """Two fixed scales, drawn at random for each sample, `share` of them at the second."""

    performance: float
    tokens: float
    first: float
    second: float
    share: float


def sufficient(scores: np.ndarray, threshold: float = THRESHOLD) -> np.ndarray:
    """Which scores (n, s) count as right answers: those of at least `threshold`."""
    return np.asarray(scores) >= threshold


def first_sufficient(right: np.ndarray) -> np.ndarray:
    """The index of the coarsest scale that is right for each sample, (n,); -1 where none is."""
    right = np.asarray(right, dtype=bool)
    return np.where(right.any(1), right.argmax(1), -1)


def chosen(scores: np.ndarray, scales: Sequence[float] | np.ndarray, choice: np.ndarray) -> Choice:
    """What it reaches to answer every sample at the scale of index `choice`, (n,).

    `scales` may be what each scale costs each sample, (n, s), as where pictures have several tiles.
    """
    rows = np.arange(len(choice))
    costs = np.broadcast_to(np.asarray(scales, float), np.shape(scores))
    return Choice(float(np.asarray(scores)[rows, choice].mean()), float(costs[rows, choice].mean()))


def oracle_choice(scores: np.ndarray, threshold: float = THRESHOLD, never: int = 0) -> np.ndarray:
    """The index of the fewest tokens that are right for each sample (paper, section 4.2), (n,).

    `never`: the index that samples have which no scale answers: 0, the fewest tokens, as the paper's authors count, or -1, the
    finest.
    """
    first = first_sufficient(sufficient(scores, threshold))
    return np.where(first < 0, never % np.asarray(scores).shape[1], first)


def oracle(
    scores: np.ndarray, scales: Sequence[float] | np.ndarray, threshold: float = THRESHOLD, never: int = 0
) -> Choice:
    """The oracle: scores at the fewest tokens that are right. See `oracle_choice`."""
    return chosen(scores, scales, oracle_choice(scores, threshold, never))


def shares_of_complexity(scores: np.ndarray, scales: Sequence[int], threshold: float = THRESHOLD) -> dict[str, float]:
    """The share of samples whose fewest sufficient tokens are each scale, and "never"."""
    first = first_sufficient(sufficient(scores, threshold))
    shares = {str(scale): float((first == index).mean()) for index, scale in enumerate(scales)}
    return {**shares, "never": float((first < 0).mean())}


def mix_hull(tokens: Sequence[float], performance: Sequence[float]) -> list[tuple[float, float]]:
    """The corners (tokens, performance) of what random mixes of two fixed scales reach at best, ascending in tokens.

    From the cheapest scale to the cheapest of the best ones; what costs more is not better.
    """
    points = sorted(zip(map(float, tokens), map(float, performance)), key=lambda point: (point[0], -point[1]))
    hull: list[tuple[float, float]] = []
    for point in points:
        if hull and point[1] <= hull[-1][1]:
            continue
        while len(hull) > 1 and _rises(hull[-2], hull[-1]) <= _rises(hull[-1], point):
            hull.pop()
        if len(hull) == 1 and hull[0][0] == point[0]:
            continue
        hull.append(point)
    return hull


def best_mix(tokens: Sequence[float], performance: Sequence[float], mean_tokens: float) -> Mix:
    """The best random mix of two fixed scales that costs `mean_tokens` at most.

    Raises:
        ValueError: no scale is as cheap as that.
    """
    hull = mix_hull(tokens, performance)
    if mean_tokens < hull[0][0]:
        raise ValueError(f"mean_tokens={mean_tokens}: the cheapest scale costs {hull[0][0]:g}.")
    for (low, worse), (high, better) in zip(hull, hull[1:]):
        if mean_tokens < high:
            share = (mean_tokens - low) / (high - low)
            return Mix(worse + share * (better - worse), float(mean_tokens), low, high, share)
    last, best = hull[-1]
    return Mix(best, last, last, last, 0.0)


def wilson_interval(right: int, samples: int) -> tuple[float, float]:
    """The 95% interval of a share (Wilson's score interval), which holds at 0 and 1 too."""
    share, square = right / samples, NORMAL_95**2
    middle = (share + square / (2 * samples)) / (1 + square / samples)
    half = NORMAL_95 / (1 + square / samples) * math.sqrt(share * (1 - share) / samples + square / (4 * samples**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def resampled_means(values: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Means of the columns of `values` (n, c) over samples drawn with replacement: (resamples, c), rows stay together."""
    rows, counts = np.unique(np.asarray(values, dtype=float), axis=0, return_counts=True)
    generator, shares = np.random.default_rng(seed), counts / counts.sum()
    size = max(1, CHUNK // len(rows))
    drawn = [
        generator.multinomial(counts.sum(), shares, size=min(size, resamples - start)) @ rows
        for start in range(0, resamples, size)
    ]
    return np.concatenate(drawn) / counts.sum()


def intervals(values: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> list[tuple[float, float]]:
    """95% intervals of the means of the columns of `values` (n, c): Wilson's for zeros and ones, else by the bootstrap.

    The bootstrap is Efron's BCa, its bias and acceleration both a sixth of the mean's skewness, which is what they are for means.
    """
    values = np.asarray(values, dtype=float)
    if np.isin(values, (0, 1)).all():
        return [wilson_interval(int(column.sum()), len(values)) for column in values.T]
    return _by_bootstrap(values, resamples, seed)


def difference_intervals(
    scores: np.ndarray, reference: int = -1, resamples: int = RESAMPLES, seed: int = 0
) -> list[tuple[float, float]]:
    """95% intervals of how much the mean score of each scale exceeds that of a reference scale, by the paired bootstrap.

    Where no sample differs, n of them may still hide a share of others: the interval is then as far as those could move it.
    """
    scores = np.asarray(scores, dtype=float)
    differences = scores - scores[:, [reference]]
    found = _by_bootstrap(differences, resamples, seed)
    hidden = wilson_interval(0, len(scores))[1]
    for index, column in enumerate(differences.T):
        if (column == 0).all() and index != reference % scores.shape[1]:
            found[index] = -hidden, hidden
    return found


def agreement(answers: Sequence[Sequence[Any]]) -> np.ndarray:
    """The share of samples with equal answers at each pair of scales, (s, s), of answers (n, s)."""
    table = np.array(answers, dtype=object)
    return np.array([[float((left == right).mean()) for right in table.T] for left in table.T])


def coarse_right_fine_wrong(scores: np.ndarray, threshold: float = THRESHOLD) -> np.ndarray:
    """Whether each sample is right at some scale and wrong at the finest, (n,) bool."""
    right = sufficient(scores, threshold)
    return right.any(1) & ~right[:, -1]


def prefill_flops(config: Any, tokens: Mapping[int, int]) -> float:
    """Mean FLOPs of the language model's prefill of prompts: how many there are of each length, text and visual tokens.

    Args:
        config: an `M3LlavaConfig`. As `benchmarks.roofline` counts, the vision tower not included.
    """
    total = sum(tokens.values())
    by_length = {
        length: sum(step.times * step.flops for step in language_model(config, 1, length, length)) for length in tokens
    }
    return sum(by_length[length] * count for length, count in tokens.items()) / total


def _by_bootstrap(values: np.ndarray, resamples: int, seed: int) -> list[tuple[float, float]]:
    found = []
    for column, means in zip(values.T, resampled_means(values, resamples, seed).T):
        from_mean = column - column.mean()
        deviation = math.sqrt((from_mean**2).mean())
        skewness = (from_mean**3).mean() / deviation**3 if deviation else 0.0
        bias = acceleration = skewness / (6 * math.sqrt(len(column)))
        ends = []
        for end in (-NORMAL_95, NORMAL_95):
            corrected = bias + (bias + end) / (1 - acceleration * (bias + end))
            ends.append(float(np.quantile(means, 0.5 * (1 + math.erf(corrected / math.sqrt(2))))))
        found.append((ends[0], ends[1]))
    return found


def _rises(left: tuple[float, float], right: tuple[float, float]) -> float:
    return (right[1] - left[1]) / (right[0] - left[0]) if right[0] > left[0] else math.inf
