"""The command `m3-analyze RUN... --output REPORT`: what runs of m3-eval say about a checkpoint and about the data."""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from m3_conversion.__main__ import VERSION
from m3_conversion.signals import stopping

from .statistics import RESAMPLES, THRESHOLD


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
@stopping("m3-analyze", "the same command begins anew")
def analyze(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders that m3-eval wrote.")],
    output: Annotated[Path | None, typer.Option(help="The folder of the report.")] = None,
    card: Annotated[Path | None, typer.Option(help="A checkpoint's folder: its README.md gets the results.")] = None,
    metric: Annotated[str | None, typer.Option(help="Whose scores are meant. Each task's own if left out.")] = None,
    threshold: Annotated[float, typer.Option(help="From which a score counts as right.")] = THRESHOLD,
    gallery: Annotated[int, typer.Option(help="Samples that are shown of each complexity.", min=0)] = 3,
    resamples: Annotated[int, typer.Option(help="Of the bootstrap.", min=100)] = RESAMPLES,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.", min=0)] = 0,
    show_version: Annotated[bool, VERSION] = False,
) -> None:
    """Accuracy at every scale, the oracle, and how many visual tokens the samples need."""
    if output is None and card is None:
        raise typer.BadParameter("give --output, --card, or both")
    try:
        if output is not None and output.exists() and not output.is_dir():
            raise ValueError(f"--output {output} is a file.")
        if output is not None and find_spec("matplotlib") is None:
            raise ValueError("the report needs matplotlib: pip install matplotlib.")
        from .analysis import analyze as of_runs
        from .measured_card import write_card
        from .report import judged_anew, write_report

        result = of_runs(runs, metric, threshold, resamples, seed, gallery)
        for task, entries in result["tasks"].items():
            for name, entry in entries.items():
                if entry["judged_anew"] is not None:
                    print(f"m3-analyze: {name}, {task}: {judged_anew(entry)}")
        if output is not None:
            write_report(result, output)
            print(f"m3-analyze: {output / 'report.md'}, and report.html beside it")
        if card is not None:
            print(f"m3-analyze: {write_card(result, card)} results in {card / 'README.md'}")
    except (ValueError, OSError) as error:
        print(f"m3-analyze: {' '.join(str(error).split())}", file=sys.stderr)
        raise typer.Exit(1) from error


def main() -> None:
    app(prog_name="m3-analyze")


if __name__ == "__main__":
    main()
