"""Other ways to choose m3-tiny's visual tokens than the one that ships, each with the best thresholds for the questions at hand.

What could be known without a pass over the prompt: the question alone, the picture alone, how much its tokens vary; and the way
that ships, begun at other scales.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from modeling_m3 import M3LlavaForConditionalGeneration, M3LlavaProcessor
from modeling_m3.automatic_budget_m3 import probability, read_signals

from ..budget_data import AskedPictures
from ..budget_fit import PRICES, Predicted, equal_weights, fit, fit_network, outcome, predict
from ..budget_samples import Samples, prompt_ids


Points = list[tuple[float, float]]  # (mean tokens, accuracy)
QUESTION, PICTURE = "question alone", "picture alone"
STATISTICS = "question and how much the picture's tokens vary"


def other_ways(
    fitted: Samples, known: dict[str, np.ndarray], samples: Samples, known_of_them: dict[str, np.ndarray], seed: int = 0
) -> dict[str, Points]:
    """What each way reaches on samples, fitted on others.

    Args:
        fitted, known: what is fitted on, with `without_a_pass` of its questions.
        samples, known_of_them: what is judged on.
    """
    weights, ways = equal_weights(fitted.kinds), {}
    for name, features in known.items():
        network = fit_network(features, fitted.scores, weights, 48, 30, seed)
        ways[name] = one_decision(samples, network(known_of_them[name]), None)
    for start in fitted.scales[:3].tolist():
        choice, _ = fit(fitted, start, seed=seed)
        ways[f"auto, first pass at {start}"] = both_decisions(samples, predict(choice, samples), start)
    return ways


@torch.no_grad()
def without_a_pass(
    model: M3LlavaForConditionalGeneration, processor: M3LlavaProcessor, asked: Iterable[AskedPictures]
) -> dict[str, np.ndarray]:
    """What is known of every question, in order, before the language model sees the picture, (n, features) each."""
    known: dict[str, list[np.ndarray]] = {QUESTION: [], PICTURE: [], STATISTICS: []}
    for group in tqdm(asked, desc="pictures, without a pass", mininterval=5):
        rows = [torch.tensor(prompt_ids(processor, text, 1)) for text in group.questions]
        rows = [row[row != processor.image_token_id] for row in rows]
        ids = pad_sequence(rows, batch_first=True, padding_side="left")
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
        output = model.model.language_model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            output_hidden_states=True,
        )
        questions = read_signals(output.hidden_states).numpy()
        encoded = model.encode_images(**processor.image_processor(group.pictures, return_tensors="pt"))
        scales = processor.visual_token_scales
        tokens = {scale: model.get_visual_tokens(encoded, scale)[0] for scale in scales}
        # By how much tokens of every scale differ from one another: what a coarser scale averages away.
        varies = torch.stack([tokens[scale].var(0).mean().log() for scale in scales[1:]]).numpy()
        picture = torch.cat([tokens[scales[1]].flatten(), tokens[scales[-1]].std(0)]).numpy()
        known[QUESTION].append(questions)
        known[PICTURE].append(np.tile(picture, (len(rows), 1)))
        known[STATISTICS].append(np.concatenate([questions, np.tile(varies, (len(rows), 1))], axis=1))
    return {name: np.concatenate(parts) for name, parts in known.items()}


def confidence_cascade(samples: Samples, start: int) -> Points:
    """Finer and finer until the answer's log-probability is above a threshold."""
    weights, first = equal_weights(samples.kinds), list(samples.scales).index(start)
    points = []
    for threshold in -np.geomspace(1e-4, 5, 40):
        tokens, scale = samples.tokens[:, first].astype(float), np.full(len(samples), first)
        for index in range(first, len(samples.scales) - 1):
            goes_on = (scale == index) & (samples.confidences[:, index, 0] < threshold)
            scale = scale + goes_on
            tokens = tokens + goes_on * samples.tokens[:, index + 1]
        points.append(_mean(tokens, samples.scores[np.arange(len(scale)), scale], weights))
    return points


def one_decision(samples: Samples, logits: np.ndarray, start: int | None) -> Points:
    """One decision, and no answer is looked at; after a pass at `start`, or after none."""
    weights, rows, costs = equal_weights(samples.kinds), np.arange(len(samples)), samples.tokens.astype(float)
    first = 0 if start is None else list(samples.scales).index(start)
    passed = 0 if start is None else samples.tokens[:, first]
    costs[:, first] -= passed
    points = []
    for price in np.geomspace(0.003, 8, 60):
        worth = probability(logits) - price * costs / 1000
        worth[:, :first] = -np.inf
        scale = worth.argmax(1)
        points.append(_mean(passed + costs[rows, scale], samples.scores[rows, scale], weights))
    return points


def both_decisions(samples: Samples, predicted: Predicted, start: int) -> Points:
    """The whole choice at many prices."""
    weights, first = equal_weights(samples.kinds), list(samples.scales).index(start)
    points = []
    for price in PRICES:
        for ratio in np.geomspace(0.1, 4, 9):
            found = outcome(samples, predicted, first, (price, price * ratio))
            points.append(_mean(found.tokens, found.score, weights))
    return points


def least_tokens(points: Sequence[tuple[float, float]], accuracy: float) -> float | None:
    """The fewest tokens of the points that reach an accuracy."""
    return min((tokens for tokens, reached in points if reached >= accuracy), default=None)


def _mean(tokens: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    return float((tokens * weights).sum()), float((scores * weights).sum())
