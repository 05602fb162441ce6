"""The results page `model_cards/m3-tiny.md` and its plots, made of the counts that the recipe measured.

    python -m m3_training.m3_tiny.report model_cards/m3-tiny/results.json --page model_cards/m3-tiny.md

The page's header also gives a checkpoint's card its metadata, as the pages of the other checkpoints do.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot
import typer
from huggingface_hub import EvalResult, ModelCardData

from m3_conversion.card import PAPER_URL
from m3_conversion.json_files import read_json

from ..budget_report import table
from .data import EASY_VQA
from .recipe import BASES, RUNS, SCALES
from .scenes import DETAIL_KINDS, EASY_KINDS, TEST_FONTS, TRAIN_FONTS


NO_DETAIL = (EASY_VQA, *EASY_KINDS)
KINDS = (*NO_DETAIL, *DETAIL_KINDS)
FINEST_FIRST = sorted(SCALES, reverse=True)


class Counts:
    """Right answers by model, sampling, kind of question and scale.

    Args:
        counts: `[model][sampling][kind]` holds `questions`, `correct` by scale and `oracle`, as `recipe.measure` returns.
    """

    def __init__(self, counts: dict[str, Any]):
        self.counts = counts

    def accuracy(self, model: str, scale: int, kinds: Iterable[str], sampling: str = "average") -> tuple[float, float]:
        """Percentage of right answers, averaged over kinds, and half of its 95% interval (normal approximation)."""
        entries = [self.counts[model][sampling][kind] for kind in kinds]
        shares = [entry["correct"][str(scale)] / entry["questions"] for entry in entries]
        variance = sum(share * (1 - share) / entry["questions"] for share, entry in zip(shares, entries))
        return 100 * sum(shares) / len(shares), 196 * variance**0.5 / len(shares)

    def oracle(self, model: str, kind: str) -> tuple[float, float]:
        """(percentage answered at some scale, mean of the fewest tokens that answer; 1 where no number does)."""
        entry = self.counts[model]["average"][kind]
        oracle, questions = entry["oracle"], entry["questions"]
        return 100 * oracle["correct"] / questions, oracle["tokens"] / questions

    def questions(self, model: str, kind: str) -> int:
        return self.counts[model]["average"][kind]["questions"]

    def cell(self, model: str, scale: int, kinds: Iterable[str], sampling: str = "average") -> str:
        return "{:.1f} ± {:.1f}".format(*self.accuracy(model, scale, kinds, sampling))


def write_page(
    results: Annotated[Path, typer.Argument(help="The recipe's results.json.")],
    page: Annotated[Path, typer.Option(help="Where the page goes.")] = Path("results.md"),
) -> None:
    """Writes the results page and, into a folder of its name beside it, the plots."""
    counts = Counts(read_json(results))
    plots = page.with_suffix("")
    plots.mkdir(exist_ok=True)
    plot_kinds(counts, plots / "by-kind.png")
    plot_models(counts, plots / "by-model.png")
    body, fitted = text(counts, plots.name), results.with_name("automatic_budget.json")
    if fitted.is_file():
        body += "\n" + automatic(read_json(fitted))
    page.write_text(f"---\n{header(counts)}---\n{body}", encoding="utf-8")


def header(counts: Counts) -> str:
    """The card's metadata, with the accuracy of m3-tiny as `model-index`."""
    results = [
        EvalResult(
            task_type="image-text-to-text",
            dataset_type=kind.replace(" ", "-"),
            dataset_name=kind,
            metric_type="exact_match",
            metric_name=f"exact match at {scale} visual tokens",
            metric_args={"num_visual_tokens": scale},
            metric_value=round(counts.accuracy("m3-tiny", scale, [kind])[0], 1),
            source_name="The recipe of m3-tiny, its test pictures",
            source_url=PAPER_URL,
        )
        for kind in KINDS
        for scale in FINEST_FIRST
    ]
    data = ModelCardData(license="apache-2.0", language=["en"], model_name="m3-tiny", eval_results=results)
    return data.to_yaml() + "\n"


def text(counts: Counts, plots: str) -> str:
    """The page below its header. What a run has not been measured for is left out."""
    parts = [
        "A small M3, trained from nothing, that answers questions about simple pictures: what is where, of which "
        "shape and colour, how many, what is written. It ships with the package, as the model of its first command, its tests and its demos; and it shows in "
        "small what the paper finds: some questions need a handful of visual tokens, others need them all.",
        "All numbers are percentages of questions answered to the letter by greedy decoding, with 95% intervals, on pictures "
        f"that training never saw: the whole test split of easy-vqa ({counts.questions('m3-tiny', EASY_VQA):,} questions), and "
        f"generated pictures of other seeds, whose codes are written in another font ({', '.join(TEST_FONTS)}; training has "
        f"{', '.join(TRAIN_FONTS)}), {counts.questions('m3-tiny', 'code'):,} questions of each kind. Made, with torch 2.9 or newer, by:",
        "```bash\nm3-train-tiny m3-tiny-run\n```",
        "The stored checkpoint took 11 minutes, in one process on an H100 with 16 CPU cores; what it is compared with was "
        "trained there too, and the questions asked on a CPU. Two CPU cores that compute in bfloat16 (AMX) take some two hours for as "
        "many steps; others take many times as long. It is one of two that differ in what the stage of details asks: 150 of the "
        "generated test pictures and 100 of easy-vqa's decided before the last stage. The other reads 90.3% of the codes at 576.",
        "## By kind of question",
        _table(
            ["Visual tokens", *KINDS],
            [[scale, *(counts.cell("m3-tiny", scale, [kind]) for kind in KINDS)] for scale in FINEST_FIRST],
        ),
        f"![Accuracy by number of visual tokens and kind of question]({plots}/by-kind.png)",
        "Codes in the fonts that training has, on new pictures: "
        + "; ".join(f"{counts.cell('m3-tiny', scale, ['code'], 'seen fonts')} at {scale}" for scale in FINEST_FIRST)
        + ".",
        "## Against models trained otherwise",
        f"All start from the same model and see the same {_pictures('full'):,} pictures. SS is trained at its one scale. "
        "*576 only* is trained at 576 tokens alone and pooled without training for it (paper, Table 4). The model that all start "
        "from was itself trained at 9 tokens, then 144, then 576: what it learned at 9, to name and to compare shapes and colours, "
        "helps *576 only* there."
        f" Means over the kinds of questions that need no detail ({', '.join(NO_DETAIL)}), then over those that do "
        f"({', '.join(DETAIL_KINDS)}).",
        *(_models(counts, kinds) for kinds in (NO_DETAIL, DETAIL_KINDS)),
        f"![M3 and training-free pooling by number of visual tokens]({plots}/by-model.png)",
        "## Oracle",
        "What a perfect choice of the number of tokens, question by question, would reach: the fewest that answer correctly, "
        "and 1 where no number does, as the paper's authors count (Table 2).",
        _table(["Question", "576 tokens", "oracle", "its mean tokens"], [_oracle(counts, kind) for kind in KINDS]),
    ]
    missing = [name for name in RUNS if name not in (*BASES, *counts.counts)]
    if missing:
        parts.insert(3, f"Runs of the recipe that were not made for this page yet: {', '.join(missing)}.")
    if any(name.startswith("ablation-") for name in counts.counts):
        parts += [
            "## Ablations, in small",
            f"{_pictures('ablation-average'):,} pictures each, fewer questions, generated pictures only. How coarser tokens are made "
            "(paper, Table 6), whether every step averages over all scales or draws one, and whether the language model comes "
            "from the stage before (Table 8). Means over the kinds without and with detail.",
            _ablations(counts),
        ]
    return "\n\n".join(parts) + "\n"


def automatic(measured: dict[str, Any]) -> str:
    """The section on the automatic budget, of what `m3_training.m3_tiny.budget` measured."""
    parts = [
        "## Automatic budget",
        '`num_visual_tokens="auto"`: what the choice that ships with m3-tiny keeps of the accuracy at 576, and the visual tokens '
        "of all passes; every kind of question counts the same, 95% intervals by picture. Made by "
        "`python -m m3_training.m3_tiny.budget FOLDER`.",
    ]
    for name, result in measured.items():
        questions = f"{result['questions']:,} questions about {result['pictures']:,} pictures"
        parts += [f"### {name.capitalize()}", f"{questions}.", table(result)]
        rows = [
            [way, *("never" if tokens is None else f"{tokens:.0f}" for tokens in reached.values())]
            for way, reached in result["ablations"].items()
        ]
        heads = [f"{float(keep):.0%}" for keep in next(iter(result["ablations"].values()))]
        parts += [
            "Fewest tokens that keep so much, with the best thresholds for these very questions:",
            _table(["way", *heads], rows),
        ]
    return "\n\n".join(parts) + "\n"


def _pictures(name: str) -> int:
    return RUNS[name].steps * RUNS[name].batch


def plot_kinds(counts: Counts, file: Path) -> None:
    """One line per kind of question."""
    lines = {kind: [counts.accuracy("m3-tiny", scale, [kind]) for scale in SCALES] for kind in KINDS}
    _plot(lines, file, "accuracy of m3-tiny, %", dashed=NO_DETAIL)


def plot_models(counts: Counts, file: Path) -> None:
    """M3 and the training-free ways, where no detail is needed."""
    lines = {"M3": [counts.accuracy("m3-tiny", scale, NO_DETAIL) for scale in SCALES]}
    for sampling in RUNS["full"].samplings:
        lines[f"576 only, {sampling}"] = [counts.accuracy("full", scale, NO_DETAIL, sampling) for scale in SCALES]
    _plot(lines, file, "accuracy without detail, %")


def _plot(lines: dict[str, list[tuple[float, float]]], file: Path, label: str, dashed: Sequence[str] = ()) -> None:
    figure, axes = matplotlib.pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for name, points in lines.items():
        values, halves = zip(*points)
        axes.errorbar(
            SCALES, values, yerr=halves, marker="o", capsize=3, label=name, linestyle="--" if name in dashed else "-"
        )
    axes.set_xscale("log")
    axes.set_xticks(SCALES, map(str, SCALES))
    axes.minorticks_off()
    axes.set_xlabel("visual tokens")
    axes.set_ylabel(label)
    axes.set_ylim(0, 103)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(file, dpi=110, metadata={"Software": None})
    matplotlib.pyplot.close(figure)


def _models(counts: Counts, kinds: Sequence[str]) -> str:
    ways = RUNS["full"].samplings
    rows = []
    for scale in FINEST_FIRST:
        alone = next((name for name, run in RUNS.items() if run.start == BASES[-1] and run.scales == (scale,)), None)
        trained_alone = counts.cell(alone, scale, kinds) if alone in counts.counts else ""
        pooled = [counts.cell("full", scale, kinds, sampling) for sampling in ways]
        rows.append([scale, counts.cell("m3-tiny", scale, kinds), trained_alone, *pooled])
    return _table(["Visual tokens", "M3", "SS", *(f"576 only, {way}" for way in ways)], rows)


def _oracle(counts: Counts, kind: str) -> list[str]:
    return [
        kind,
        *(f"{value:.1f}" for value in (counts.accuracy("m3-tiny", 576, [kind])[0], *counts.oracle("m3-tiny", kind))),
    ]


def _ablations(counts: Counts) -> str:
    names = [name for name in RUNS if name.startswith("ablation-") and name in counts.counts]
    rows = []
    for scale in FINEST_FIRST:
        row: list[Any] = [scale]
        for name in names:
            sampling = RUNS[name].samplings[0]
            means = [counts.accuracy(name, scale, kinds, sampling)[0] for kinds in (EASY_KINDS, DETAIL_KINDS)]
            row.append(" / ".join(f"{mean:.1f}" for mean in means))
        rows.append(row)
    return _table(["Visual tokens", *(name.removeprefix("ablation-") for name in names)], rows)


def _table(head: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


if __name__ == "__main__":
    typer.run(write_page)
