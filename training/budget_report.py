"""What a fitted choice is worth: the curve of accuracy against visual tokens, as JSON, Markdown and a plot."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from m3_conversion.json_files import write_json
from m3_conversion.whole_files import replacing, write_text
from m3_evaluation import statistics
from modeling_m3.automatic_budget_m3 import AutomaticBudget

from .budget_fit import Predicted, equal_weights, outcome
from .budget_samples import Samples


RESAMPLES = 1000


def curve(
    samples: Samples, predicted: Predicted, choice: AutomaticBudget, keeps: Sequence[float] | None = None
) -> dict[str, Any]:
    """What is reached on questions that the networks did not see, every kind of question counted the same.

    Args:
        samples, predicted: of the questions.
        choice: whose prices are judged.
        keeps: shares to keep; those that prices were fitted for by default.
    """
    weights, scales = equal_weights(samples.kinds), [int(scale) for scale in samples.scales]
    fixed = (samples.scores * weights[:, None]).sum(0)
    costs = (samples.tokens * weights[:, None]).sum(0)
    best = statistics.oracle_choice(samples.scores)
    rows, resampled = np.arange(len(samples)), _resampled_weights(samples)
    points = []
    for keep in [entry[0] for entry in choice.prices] if keeps is None else keeps:
        found = outcome(samples, predicted, scales.index(choice.start), choice.price(keep))
        tokens, accuracy = float((found.tokens * weights).sum()), float((found.score * weights).sum())
        shares = (resampled @ found.score) / (resampled @ samples.scores[:, -1])
        mix = statistics.best_mix(costs, fixed, max(tokens, costs.min()))
        points.append(
            {
                "keep": keep,
                "kept": accuracy / float(fixed[-1]),
                "kept_interval": [float(edge) for edge in np.quantile(shares, (0.025, 0.975))],
                "accuracy": accuracy,
                "tokens": tokens,
                "tokens_interval": [float(edge) for edge in np.quantile(resampled @ found.tokens, (0.025, 0.975))],
                "above_best_mix": accuracy - mix.performance,
                "paths": {path: float(weights[found.path == path].sum()) for path in np.unique(found.path).tolist()},
                "chosen": {str(scale): float(((found.scale == i) * weights).sum()) for i, scale in enumerate(scales)},
            }
        )
    return {
        "questions": len(samples),
        "pictures": len(set(samples.groups)),
        "kinds": sorted(set(samples.kinds.tolist())),
        "start": choice.start,
        "fixed": [
            {"num_visual_tokens": scale, "tokens": float(cost), "accuracy": float(accuracy)}
            for scale, cost, accuracy in zip(scales, costs, fixed)
        ],
        "oracle": {
            "accuracy": float((samples.scores[rows, best] * weights).sum()),
            "tokens": float((samples.tokens[rows, best] * weights).sum()),
        },
        "automatic": points,
    }


def table(result: dict[str, Any]) -> str:
    """The curve in Markdown."""
    full = result["fixed"][-1]["accuracy"]
    lines = ["| way | accuracy | of the finest's | visual tokens | above the best mix |", "|---|--:|--:|--:|--:|"]
    for row in result["fixed"]:
        share = row["accuracy"] / full
        lines.append(
            f"| always {row['num_visual_tokens']} | {row['accuracy']:.1%} | {share:.1%} | {row['tokens']:.1f} | |"
        )
    for row in result["automatic"]:
        low, high = row["kept_interval"]
        lines.append(
            f"| auto, keep {row['keep']:g} | {row['accuracy']:.1%} | {row['kept']:.1%} ({low:.1%} to {high:.1%}) | "
            f"{row['tokens']:.1f} | {100 * row['above_best_mix']:+.1f} points |"
        )
    oracle = result["oracle"]
    share = oracle["accuracy"] / full
    lines.append(f"| oracle | {oracle['accuracy']:.1%} | {share:.1%} | {oracle['tokens']:.1f} | |")
    return "\n".join(lines)


def write_report(result: dict[str, Any], folder: Path) -> None:
    """`results.json`, `README.md` and `curve.png`."""
    _plot(result, folder / "curve.png")
    write_json(folder / "results.json", result)
    write_text(
        folder / "README.md",
        f"# The automatic budget's curve\n\n`{result['command']}`\n\n{result['questions']} questions about "
        f"{result['pictures']} pictures, every kind of question counted the same; each was judged by networks that saw no "
        f"question about its picture. Visual tokens are those of all passes, the first at {result['start']}. 95% intervals, "
        f"resampled by picture.\n\n{table(result)}\n\n![curve](curve.png)\n",
    )


def _resampled_weights(samples: Samples, seed: int = 0) -> np.ndarray:
    """Weights (resamples, n) of questions, where pictures are drawn anew, every kind counted the same in each."""
    _, group = np.unique(samples.groups, return_inverse=True)
    _, kind = np.unique(samples.kinds, return_inverse=True)
    generator, pictures = np.random.default_rng(seed), group.max() + 1
    result = np.empty((RESAMPLES, len(group)), dtype=np.float32)
    for row in result:
        drawn = np.bincount(generator.integers(0, pictures, pictures), minlength=pictures)[group]
        row[:] = drawn / np.maximum(np.bincount(kind, weights=drawn), 1)[kind] / (kind.max() + 1)
    return result


def _plot(result: dict[str, Any], file: Path) -> None:
    from matplotlib.figure import Figure

    axes = (figure := Figure(figsize=(7, 4.5), layout="constrained")).subplots()
    fixed = [(row["tokens"], 100 * row["accuracy"]) for row in result["fixed"]]
    hull = statistics.mix_hull(*zip(*fixed))
    axes.plot(*zip(*hull), ":", color="gray", label="best random mix")
    axes.plot(*zip(*fixed), "o", color="gray", label="one number for all")
    axes.plot(*zip(*((row["tokens"], 100 * row["accuracy"]) for row in result["automatic"])), "o-", label="auto")
    axes.plot(result["oracle"]["tokens"], 100 * result["oracle"]["accuracy"], "*", markersize=12, label="oracle")
    axes.set(xscale="log", xlabel="visual tokens, all passes", ylabel="accuracy, %")
    axes.legend()
    with replacing(file) as part:
        figure.savefig(part, format="png", dpi=150, metadata={"Software": None})
