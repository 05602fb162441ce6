"""From run folders to figures: one plain dictionary, which the report shows and `results.json` holds."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from . import statistics
from .paper_tables import printed
from .runs import AUTO_NUMBER, Run, Sample, read_run, read_samples, read_task
from .scores import judge_anew


def analyze(
    folders: Sequence[Path],
    metric: str | None = None,
    threshold: float = statistics.THRESHOLD,
    resamples: int = statistics.RESAMPLES,
    seed: int = 0,
    gallery: int = 3,
) -> dict[str, Any]:
    """Everything about some runs, task by task, and run by run in them.

    Args:
        folders: of complete runs.
        metric: whose scores are meant; each task's own by default.
        threshold: from which a score counts as right.
        resamples, seed: of the bootstrap.
        gallery: how many samples of each complexity are shown.

    Raises:
        ValueError: for a folder that is no complete run, a metric that a task has not, runs over different samples.
    """
    runs = [(folder, read_run(folder)) for folder in folders]
    names = [str(folder) for folder, _ in runs]
    tasks = list(dict.fromkeys(name for _, run in runs for name in run.tasks))
    result: dict[str, Any] = {"runs": {}, "threshold": threshold, "tasks": {}}
    for name, (_, run) in zip(names, runs):
        result["runs"][name] = {key: value for key, value in asdict(run).items() if key != "config"}
    for task in tasks:
        entries, first = {}, None
        for name, (folder, run) in zip(names, runs):
            if task not in run.tasks:
                continue
            samples = list(read_samples(folder, task))
            ids = [sample.id for sample in samples]
            if first is not None and ids != first[1]:
                other = (
                    next((a for a, b in zip(ids, first[1]) if a != b), None) or f"number {min(len(ids), len(first[1]))}"
                )
                raise ValueError(f"{folder} and {first[0]} are over different samples of {task}: see sample {other}.")
            first = first or (folder, ids)
            entries[name] = _one(folder, run, task, samples, metric, threshold, resamples, seed, gallery)
        result["tasks"][task] = entries
    return result


def _one(
    folder: Path,
    run: Run,
    name: str,
    samples: list[Sample],
    metric: str | None,
    threshold: float,
    resamples: int,
    seed: int,
    gallery: int,
) -> dict[str, Any]:
    task = read_task(folder, name)
    metric = metric or task.metric
    if metric not in task.overall:
        raise ValueError(f"--metric {metric!r}: {name} has {', '.join(task.overall)}.")
    if not task.higher_is_better.get(metric, True):
        raise ValueError(f"--metric {metric!r}: of {name}, less is better, so no score is sufficient. Choose another.")
    samples, changed = judge_anew(task, samples)
    scores = np.array([sample.scores[metric] for sample in samples], dtype=float)
    means = scores.mean(0)
    visual = np.array([sample.visual_tokens for sample in samples], dtype=int)
    chosen = run.scales == [AUTO_NUMBER]  # by the model, at whatever that cost
    scales = [float(visual.mean())] if chosen else run.scales
    texts = np.array([sample.text_tokens for sample in samples], dtype=int)
    flops = _flops(run, visual, texts)
    own, differences = (
        statistics.intervals(scores, resamples, seed),
        statistics.difference_intervals(scores, -1, resamples, seed),
    )
    choices = {
        way: statistics.oracle_choice(scores, threshold, never) for way, never in (("fewest", 0), ("finest", -1))
    }
    reached = {way: statistics.chosen(scores, scales, choice) for way, choice in choices.items()}
    rows = np.arange(len(scores))
    ranges = {
        way: {
            "performance_interval": statistics.intervals(scores[rows, choice][:, None], resamples, seed)[0],
            "tokens_interval": statistics.intervals(np.array(scales)[choice][:, None], resamples, seed)[0],
        }
        for way, choice in choices.items()
    }
    first = statistics.first_sufficient(statistics.sufficient(scores, threshold))
    return {
        "metric": metric,
        "samples": len(samples),
        "judged_anew": changed,
        "checkpoint": run.checkpoint,
        "scales": [
            {
                "num_visual_tokens": "auto" if chosen else scale,
                "visual_tokens": float(visual[:, index].mean()),
                "score": float(means[index]),
                "interval": own[index],
                "difference_to_finest": float(means[index] - means[-1]),
                "difference_interval": differences[index],
                "overall": None if task.overall[metric] is None else task.overall[metric][index],
                "prefill_tflops": flops[index],
                "answer_tokens": float(np.mean([sample.answer_tokens[index] for sample in samples])),
            }
            for index, scale in enumerate(scales)
        ],
        "oracle": {
            way: {
                **asdict(reached[way]),
                **ranges[way],
                "gap": {str(scale): reached[way].performance - float(mean) for scale, mean in zip(scales, means)},
            }
            for way in choices
        },
        "mix": {
            "corners": statistics.mix_hull(scales, means),
            "at_oracle": asdict(statistics.best_mix(scales, means, max(reached["fewest"].tokens, min(scales)))),
        },
        "complexity": _complexity(samples, scores, scales, threshold),
        "coarse_right_fine_wrong": int(statistics.coarse_right_fine_wrong(scores, threshold).sum()),
        "agreement": statistics.agreement([sample.answers for sample in samples]).tolist(),
        "paper": printed(run.config, name),
        "gallery": _gallery(folder, samples, first, scales, gallery),
    }


def _flops(run: Run, visual: np.ndarray, texts: np.ndarray) -> list[float | None]:
    """TFLOPs of the prefill at each scale, on average."""
    from modeling_m3 import M3LlavaConfig

    config = M3LlavaConfig(
        **{key: value for key, value in run.config.items() if key not in ("architectures", "auto_map")}
    )
    return [statistics.prefill_flops(config, Counter((column + texts).tolist())) / 1e12 for column in visual.T]


def _complexity(samples: list[Sample], scores: np.ndarray, scales: Sequence[int], threshold: float) -> dict[str, Any]:
    result: dict[str, Any] = {
        "all": statistics.shares_of_complexity(scores, scales, threshold),
        "subset": {},
        "kind": {},
    }
    for by in ("subset", "kind"):
        labels = [getattr(sample, by) for sample in samples]
        rows: dict[str, list[int]] = {}
        for index, label in enumerate(labels):
            if label is not None:
                rows.setdefault(label, []).append(index)
        for label, indices in sorted(rows.items()):
            part = scores[indices]
            result[by][label] = {
                "samples": len(indices),
                "scores": part.mean(0).tolist(),
                "shares": statistics.shares_of_complexity(part, scales, threshold),
            }
    return result


def _gallery(
    folder: Path, samples: list[Sample], first: np.ndarray, scales: Sequence[int], count: int
) -> dict[str, list[dict[str, Any]]]:
    """By complexity, the first samples whose pictures were kept."""
    result: dict[str, list[dict[str, Any]]] = {}
    for index, label in [*enumerate(map(str, scales)), (-1, "never")]:
        found = (sample for sample, of in zip(samples, first) if of == index and sample.pictures)
        result[label] = [
            {
                "id": sample.id,
                "question": sample.question,
                "target": sample.target,
                "answers": sample.answers,
                "pictures": [str(folder / picture) for picture in sample.pictures],
                "first": index,
            }
            for sample, _ in zip(found, range(count))
        ]
    return result
