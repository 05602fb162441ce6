"""Many frames or much detail? Accuracy at equal numbers of visual tokens: `python -m m3_evaluation.video_budgets DIR ...`.

A total T buys T / s frames of s tokens each, for every scale s of a checkpoint (paper, section 1). Questions are asked at each
such pair, and counted by kind.
"""

from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

import typer

from m3_conversion.json_files import read_json, write_json
from m3_conversion.signals import stopping
from m3_conversion.written_numbers import parse_numbers
from modeling_m3.any_checkpoint import find

from .answering import Answerer
from .asking import ask_all
from .checkpoints import fingerprint
from .own_data import METRICS, Question, fingerprint_of, read_questions
from .record import Record, remove_unfinished_thumbnails


def pairs_of(total: int, scales: list[int], most_frames: int) -> list[tuple[int, int]]:
    """(frames, visual tokens of each) that cost `total` together, with at most so many frames."""
    return [(total // s, s) for s in sorted(scales, reverse=True) if total % s == 0 and total // s <= most_frames]


def measure(
    model: Any,
    processor: Any,
    questions: list[Question],
    pairs: list[tuple[int, int]],
    folder: Path,
    batch_size: int,
    metric: str,
) -> dict[str, dict[str, float]]:
    """The share of right answers at each pair, by kind of question; what was asked before is not asked again."""
    settings = {"max_new_tokens": 32, "do_sample": False}
    asked = [(question.id, settings) for question in questions]
    answerer, result = Answerer(model, processor), {}  # which keeps frames that several pairs have
    for frames, scale in pairs:
        answerer.video = {"num_frames": frames, "when_short": "error"}
        record = Record(folder / f"{frames}x{scale}.0.jsonl")
        desc = f"{frames} frames of {scale}"
        ask_all(answerer, [scale], asked, lambda i: questions[i].chat(), record, folder, batch_size, desc)
        scores = defaultdict(list)
        for question in questions:
            [answer] = record.results[question.id]["results"]
            right = METRICS[metric](answer["text"], question.answers)
            for kind in ("all", question.kind or "all"):
                scores[kind].append(right)
        result[f"{frames}x{scale}"] = {kind: sum(values) / len(values) for kind, values in scores.items()}
    return result


def table(result: dict[str, Any]) -> str:
    """What was measured, in Markdown: a row for each pair, a column for each kind of question, in percent."""
    pairs = result["accuracy"]
    kinds = sorted({kind for scores in pairs.values() for kind in scores} - {"all"})
    lines = [
        f"| visual tokens | frames x tokens of each | {' | '.join(kinds)} | all |",
        "| --: | --: |" + " --: |" * (len(kinds) + 1),
    ]
    for pair, scores in sorted(pairs.items(), key=lambda entry: (_total(entry[0]), int(entry[0].split("x")[0]))):
        values = " | ".join(f"{100 * scores[kind]:.1f}" if kind in scores else "" for kind in [*kinds, "all"])
        lines.append(f"| {_total(pair)} | {pair.replace('x', ' x ')} | {values} |")
    return "\n".join(lines)


def _total(pair: str) -> int:
    frames, scale = map(int, pair.split("x"))
    return frames * scale


def _begin(file: Path, asked: dict[str, str]) -> None:
    """Notes what is asked of whom. Raises `ValueError` for a folder with answers to something else."""
    if file.is_file() and read_json(file) != asked:
        raise ValueError(
            f"{file.parent} holds answers of another checkpoint, or to other questions. Give another --output."
        )
    write_json(file, asked)
    remove_unfinished_thumbnails(file.parent)


@stopping("m3_evaluation.video_budgets", "the same command goes on")
def main(
    checkpoint: Annotated[str, typer.Argument(metavar="DIR", help="A folder, or an id on the Hub.")],
    data: Annotated[Path, typer.Option(help='A JSONL with "question", "answer", "video" and, if wanted, "kind".')],
    output: Annotated[Path, typer.Option(help="A folder for what was answered; the same command goes on.")],
    totals: Annotated[str, typer.Option(help="Numbers of visual tokens of a whole video.")] = "36,144,576",
    most_frames: Annotated[int, typer.Option(help="As many as every video has.", min=1)] = 144,
    metric: Annotated[str, typer.Option(help=f"One of {', '.join(METRICS)}.")] = "exact_match",
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    limit: Annotated[int | None, typer.Option(help="Questions, at most.", min=1)] = None,
) -> None:
    """Measures what frames and tokens are worth at equal cost."""
    try:
        questions = read_questions(data, limit=limit)
        found = find(checkpoint)
        model, processor = found.load()
        scales = processor.visual_token_scales
        pairs = [pair for total in parse_numbers(totals, "--totals") for pair in pairs_of(total, scales, most_frames)]
        _begin(
            output / "asked.json",
            {"checkpoint": fingerprint(found.folder), "data": fingerprint_of(questions)},
        )
        accuracy = measure(model, processor, questions, pairs, output, batch_size, metric)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    result = {"questions": len(questions), "metric": metric, "accuracy": accuracy}
    write_json(output / "accuracy.json", result)
    print(table(result))


if __name__ == "__main__":
    typer.run(main)
