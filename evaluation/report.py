"""The report of `m3-analyze`: Markdown, a page of HTML that needs no other file, and plots."""

import base64
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2

from m3_conversion.json_files import write_json
from m3_conversion.whole_files import replacing, write_text

from .scores import RULE_IN_WORDS


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title><style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } th, td { border: 1px solid #ccc; padding: .25rem .6rem; text-align: right }
th:first-child, td:first-child { text-align: left } img { max-width: 100% }
.gallery { display: flex; flex-wrap: wrap; gap: 1rem } .sample { width: 15rem; border: 1px solid #ccc; padding: .5rem }
.sample img { display: block; max-height: 12rem; margin: auto } .right { color: #06702b } .wrong { color: #a11 }
</style></head><body><h1>{{ title }}</h1><p>{{ about }}</p>
{% for task in tasks %}<h2>{{ task.name }}</h2>
{% for part in task.parts %}<h3>{{ part.title }}</h3>
{% if part.text %}<p>{{ part.text }}</p>{% endif %}
{% if part.rows %}<table><tr>{% for cell in part.head %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in part.rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>{% endif %}{% endfor %}
{% for plot in task.plots %}<p><img alt="{{ plot.alt }}" src="data:image/png;base64,{{ plot.data }}"></p>{% endfor %}
{% for run in task.galleries %}<h3>Samples by their fewest sufficient tokens: {{ run.name }}</h3>
{% for group in run.groups %}<h4>{{ group.label }}</h4><div class="gallery">{% for sample in group.samples %}
<div class="sample">{% for picture in sample.pictures %}<img alt="" src="data:image/jpeg;base64,{{ picture }}">{% endfor %}
<p><b>{{ sample.question }}</b><br>{{ sample.target }}</p><ul>{% for answer in sample.answers %}
<li class="{{ 'right' if answer.first else 'wrong' if answer.before else '' }}">{{ answer.scale }}: {{ answer.text }}</li>
{% endfor %}</ul></div>{% endfor %}</div>{% endfor %}{% endfor %}{% endfor %}</body></html>
"""


def write_report(result: dict[str, Any], folder: Path) -> None:
    """Writes `report.md`, `report.html`, `results.json` and the plots of an analysis into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = {name: _parts(runs, result["threshold"]) for name, runs in result["tasks"].items()}
    plots = {name: _plots(name, runs, folder) for name, runs in result["tasks"].items()}
    about = (
        f"{len(result['runs'])} run(s). Scores in percent with 95% intervals; a score counts as right from "
        f"{result['threshold']:g}. Visual tokens are per tile where pictures are cut into tiles."
    )
    write_json(folder / "results.json", result)
    write_text(folder / "report.md", _markdown(about, parts, plots))
    environment = jinja2.Environment(autoescape=True)
    tasks = [
        {
            "name": name,
            "parts": parts[name],
            "plots": [{"alt": file.stem, "data": _base64(file)} for file in plots[name]],
            "galleries": [_gallery(run, entry) for run, entry in runs.items()],
        }
        for name, runs in result["tasks"].items()
    ]
    page = environment.from_string(PAGE).render(title=TITLE, about=about, tasks=tasks)
    write_text(folder / "report.html", page)


def judged_anew(entry: dict[str, Any]) -> str:
    """What changed in a run that was judged by an older rule, in a sentence; "" for another run."""
    if entry["judged_anew"] is None:
        return ""
    changed = ", ".join(f"{count:,} by {metric}" for metric, count in entry["judged_anew"].items())
    return (
        f"The run was judged by another rule, and is judged anew by {RULE_IN_WORDS}. Of its "
        f"{entry['samples'] * len(entry['scales']):,} answers, so many are scored otherwise: {changed}."
    )


TITLE = "How many visual tokens does the data need?"


def _parts(runs: dict[str, Any], threshold: float) -> list[dict[str, Any]]:
    """The tables of one task: a title, a sentence, a head and rows each."""
    parts: list[dict[str, Any]] = []
    for name, entry in runs.items():
        of = f" ({name})" if len(runs) > 1 else ""
        paper = entry["paper"] or {}
        head = ["Visual tokens", entry["metric"], "against the finest", "prefill, TFLOPs", "answer, tokens"]
        with_overall = any(
            scale["overall"] is not None and not _same(scale["overall"], scale["score"]) for scale in entry["scales"]
        )
        head += ["the task's own value"] * with_overall + [f"paper, Table {paper.get('table')}"] * bool(paper)
        rows = []
        for scale in reversed(entry["scales"]):
            row = [
                str(scale["num_visual_tokens"]),
                f"{_percent(scale['score'])} ({_between(scale['interval'])})",
                f"{_signed(scale['difference_to_finest'])} ({_between(scale['difference_interval'], _signed)})",
                f"{scale['prefill_tflops']:.3g}",
                f"{scale['answer_tokens']:.1f}",
            ]
            row += [f"{scale['overall']:.4g}"] if with_overall else []
            row += [str(paper["scores"].get(str(scale["num_visual_tokens"]), ""))] if paper else []
            rows.append(row)
        parts.append(
            {
                "title": f"Scores{of}",
                "text": f"{entry['samples']:,} samples of {entry['checkpoint']}. {judged_anew(entry)}".strip(),
                "head": head,
                "rows": rows,
            }
        )
        parts += _oracle_parts(entry, of, paper) + _complexity_parts(entry, of)
        scales = [str(scale["num_visual_tokens"]) for scale in entry["scales"]]
        table = [[a, *map(_percent, row)] for a, row in zip(scales, entry["agreement"])]
        parts.append(
            {
                "title": f"Equal answers at two scales, %{of}",
                "text": f"{entry['coarse_right_fine_wrong']:,} samples are right at a coarser scale and wrong at the finest.",
                "head": ["", *scales],
                "rows": table,
            }
        )
    return parts


def _oracle_parts(entry: dict[str, Any], of: str, paper: dict[str, Any]) -> list[dict[str, Any]]:
    names = {"fewest": "as the fewest (the authors' way)", "finest": "as the finest"}
    rows = [
        [
            names[way],
            f"{_percent(found['performance'])} ({_between(found['performance_interval'])})",
            f"{found['tokens']:.2f} ({_between(found['tokens_interval'], '{:.2f}'.format)})",
            *(_signed(gap) for gap in found["gap"].values()),
        ]
        for way, found in entry["oracle"].items()
    ]
    if "oracle" in paper:
        gaps = [f"{paper['oracle']['performance'] - score:+.1f}" for score in paper["scores"].values()]
        rows.append(
            [
                f"paper, Table {paper['table']}",
                str(paper["oracle"]["performance"]),
                str(paper["oracle"]["tokens"]),
                *gaps,
            ]
        )
    mix = entry["mix"]["at_oracle"]
    sentence = (
        f"At the oracle's mean cost the best random mix of two fixed scales, {mix['first']:g} and {mix['second']:g} "
        f"({_percent(mix['share'])}% of the samples), reaches {_percent(mix['performance'])}."
    )
    head = [
        "A sample that no scale answers counts",
        "score",
        "mean tokens",
        *(f"over {s}" for s in entry["oracle"]["fewest"]["gap"]),
    ]
    return [{"title": f"Oracle: the fewest tokens that answer{of}", "text": sentence, "head": head, "rows": rows}]


def _complexity_parts(entry: dict[str, Any], of: str) -> list[dict[str, Any]]:
    shares = entry["complexity"]["all"]
    rows = [["all", f"{entry['samples']:,}", *map(_percent, shares.values())]]
    for by in ("subset", "kind"):
        for label, found in entry["complexity"][by].items():
            rows.append([label, f"{found['samples']:,}", *map(_percent, found["shares"].values())])
    return [
        {
            "title": f"Complexity: share of samples by their fewest sufficient tokens, %{of}",
            "text": "",
            "head": ["", "samples", *shares],
            "rows": rows,
        }
    ]


def _markdown(about: str, parts: dict[str, list[dict[str, Any]]], plots: dict[str, list[Path]]) -> str:
    lines = [f"# {TITLE}", "", about]
    for name, of_task in parts.items():
        lines += ["", f"## {_cell(name)}"]
        for part in of_task:
            lines += ["", f"### {_cell(part['title'])}", ""] + ([part["text"], ""] if part["text"] else [])
            lines += [_row(part["head"]), _row(["---", *["--:"] * (len(part["head"]) - 1)]), *map(_row, part["rows"])]
        lines += [""] + [f"![{file.stem}]({file.name})" for file in plots[name]]
    return "\n".join(lines) + "\n"


def _row(cells: Iterable[Any]) -> str:
    return f"| {' | '.join(map(_cell, cells))} |"


def _cell(text: Any) -> str:
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")


def _plots(name: str, runs: dict[str, Any], folder: Path) -> list[Path]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    safe = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in name)
    files = []
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for run, entry in runs.items():
        scales = [
            scale["visual_tokens" if scale["num_visual_tokens"] == "auto" else "num_visual_tokens"]
            for scale in entry["scales"]
        ]
        scores = [100 * scale["score"] for scale in entry["scales"]]
        low, high = zip(*([100 * edge for edge in scale["interval"]] for scale in entry["scales"]))
        errors = [[max(0, a - b) for a, b in zip(scores, low)], [max(0, b - a) for a, b in zip(scores, high)]]
        line = axes.errorbar(scales, scores, yerr=errors, marker="o", capsize=3, label=run)
        color = line.lines[0].get_color()
        corners = entry["mix"]["corners"]
        axes.plot([x for x, _ in corners], [100 * y for _, y in corners], ":", color=color, label="best random mix")
        oracle = entry["oracle"]["fewest"]
        axes.plot(oracle["tokens"], 100 * oracle["performance"], "*", markersize=12, color=color, label="oracle")
    axes.set_xscale("log")
    axes.set_xticks(scales, map(str, scales))
    axes.minorticks_off()
    axes.set(xlabel="visual tokens", ylabel=f"{entry['metric']}, %", title=name)
    axes.legend(fontsize="small")
    files.append(_save(figure, folder / f"{safe}-scores.png"))
    figure, axes = pyplot.subplots(figsize=(7, 1.2 + 0.5 * len(runs)), layout="constrained")
    colors = pyplot.get_cmap("viridis")
    for run, entry in runs.items():
        left = 0.0
        shares = entry["complexity"]["all"]
        for index, (label, share) in enumerate(shares.items()):
            color = "lightgray" if label == "never" else colors(index / max(1, len(shares) - 2))
            bar = axes.barh(run, 100 * share, left=left, color=color, label=label if run == next(iter(runs)) else None)
            axes.bar_label(bar, [f"{100 * share:.0f}" if share > 0.03 else ""], label_type="center")
            left += 100 * share
    axes.set(xlabel="share of samples by their fewest sufficient tokens, %", xlim=(0, 100))
    axes.legend(ncols=6, fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1))
    files.append(_save(figure, folder / f"{safe}-complexity.png"))
    for index, (_, entry) in enumerate(runs.items()):
        if any(entry["gallery"].values()):
            number = "" if len(runs) == 1 else f"-{index + 1}"
            files.append(_gallery_plot(entry, folder / f"{safe}-gallery{number}.png"))
    return files


def _gallery_plot(entry: dict[str, Any], file: Path) -> Path:
    """Figure 4's layout: a column for each complexity, pictures with their questions below each other."""
    from matplotlib import pyplot
    from PIL import Image

    groups = {label: samples for label, samples in entry["gallery"].items() if samples}
    rows = max(map(len, groups.values()))
    figure, table = pyplot.subplots(
        rows, len(groups), figsize=(2.4 * len(groups), 2.7 * rows), layout="constrained", squeeze=False
    )
    for axes in table.flat:
        axes.axis("off")
    for column, (label, samples) in zip(table.T, groups.items()):
        for row, (axes, sample) in enumerate(zip(column, samples)):
            with Image.open(sample["pictures"][0]) as picture:
                axes.imshow(picture.convert("RGB"))
            answer = sample["answers"][sample["first"]]
            title = (
                f"{label} tokens\n" if row == 0 and label != "never" else f"{label}\n" if row == 0 else ""
            ) + "\n".join(_short(text) for text in (sample["question"], answer))
            axes.set_title(title.replace("$", r"\$"), fontsize=8)
    return _save(figure, file)


def _save(figure: Any, file: Path) -> Path:
    from matplotlib import pyplot

    with replacing(file) as part:
        figure.savefig(part, format="png", dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return file


def _gallery(name: str, entry: dict[str, Any]) -> dict[str, Any]:
    scales = [scale["num_visual_tokens"] for scale in entry["scales"]]
    groups = []
    for label, samples in entry["gallery"].items():
        shown = []
        for sample in samples:
            first = sample["first"] if sample["first"] >= 0 else len(scales)
            answers = [
                {"scale": scale, "text": text, "first": index == first, "before": index < first}
                for index, (scale, text) in enumerate(zip(scales, sample["answers"]))
            ]
            target = sample["target"] if isinstance(sample["target"], str) else ", ".join(sample["target"])
            pictures = [_base64(Path(picture)) for picture in sample["pictures"]]
            shown.append({"question": sample["question"], "target": target, "answers": answers, "pictures": pictures})
        if shown:
            groups.append({"label": label if label == "never" else f"{label} tokens", "samples": shown})
    return {"name": name, "groups": groups}


def _base64(file: Path) -> str:
    return base64.b64encode(file.read_bytes()).decode()


def _same(a: float, b: float) -> bool:
    return abs(a - b) < 1e-9 or abs(a - 100 * b) < 1e-7


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _signed(share: float) -> str:
    return f"{100 * share:+.1f}"


def _between(edges: Sequence[float], write: Any = _percent) -> str:
    return " to ".join(map(write, edges))


def _short(text: str, length: int = 32) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[: length - 1]}…"
