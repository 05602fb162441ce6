"""A run folder: what `m3-eval` writes and `m3-analyze` reads.

    RUN/run.json                   what was asked of which checkpoint: `Run`
    RUN/tasks/NAME/samples.jsonl   one `Sample` per line
    RUN/tasks/NAME/task.json       the task's metrics: `Task`. Written last, so a task without it is not complete
    RUN/tasks/NAME/signals.safetensors   what the model knew of each sample, where that was asked for: `signals`
    RUN/pictures/*.jpg             small copies of the samples' pictures

Imports nothing heavy: reading a run needs no torch.
"""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from m3_conversion.json_files import iterate_lines, parse_line, read_json, write_json, write_json_lines


FORMAT = 1


AUTO_NUMBER = 0  # as the processor writes it for "auto"


@dataclass(frozen=True)
class Sample:
    """One question, and what came of it at every scale; lists are in the order of `Run.scales`.

    Attributes:
        id: unique in its task, and the same in every run of it.
        question: its text, without placeholders.
        target: the right answer, or all that are accepted.
        answers: at each scale.
        scores: by metric, of each answer, as the task gives them.
        visual_tokens: of all pictures in the prompt, at each scale.
        text_tokens: of the rest of the prompt.
        answer_tokens: the length of each answer.
        pictures: small copies, relative to the run folder.
        subset, kind: what the task says of the sample: which part of it it is in, and which kind of question it is.
    """

    id: str
    question: str
    target: str | list[str]
    answers: list[str]
    scores: dict[str, list[float]]
    visual_tokens: list[int]
    text_tokens: int
    answer_tokens: list[int]
    pictures: list[str] = field(default_factory=list)
    subset: str | None = None
    kind: str | None = None


@dataclass(frozen=True)
class Task:
    """What a finished task measured.

    Attributes:
        name: as `m3-eval` was asked for it.
        samples: how many.
        metric: the one that is meant where none is named.
        overall: by metric, the value that the task itself gives at each scale, in the order of `Run.scales`; for some (F1) it is no
            mean of scores. None where the task gives none.
        higher_is_better: by metric.
        rule: of `scores`, by which m3-eval judged answers itself; None before there were several, and of a benchmark.
    """

    name: str
    samples: int
    metric: str
    overall: dict[str, list[float] | None]
    higher_is_better: dict[str, bool]
    rule: int | None = None


@dataclass(frozen=True)
class Run:
    """What was asked of which checkpoint.

    Attributes:
        checkpoint: its name, as it was given.
        fingerprint: of its files; runs of the same checkpoint have the same.
        config: its config.json.
        scales: visual tokens per tile, ascending; `AUTO_NUMBER` alone where the model chose.
        tasks: names, in the order they were asked for.
        settings: what else answers depend on: precision, sampling, pinpoints, limits, the data's fingerprint.
        versions: of the packages that took part. Nothing is decided by them.
    """

    checkpoint: str
    fingerprint: str
    config: dict[str, Any]
    scales: list[int]
    tasks: list[str]
    settings: dict[str, Any]
    versions: dict[str, str]
    format: int = FORMAT


def read_run(folder: str | Path) -> Run:
    """The run of a folder.

    Raises:
        ValueError: the folder is no run, one of another format, or one that is not complete.
    """
    folder, run = Path(folder), read_written_run(folder)
    if run is None:
        raise ValueError(f"{folder} is no run of m3-eval: there is no run.json.")
    missing = [name for name in run.tasks if not task_file(folder, name).is_file()]
    if missing:
        raise ValueError(
            f"{folder} is not complete: {', '.join(missing)} not done. Run the same m3-eval command again, it goes on."
        )
    return run


def read_written_run(folder: str | Path) -> Run | None:
    """As `read_run`, complete or not; None where none was begun."""
    file = run_file(folder)
    if not file.is_file():
        return None
    stored = _read_object(file)
    names = {entry.name for entry in fields(Run)}
    if stored.get("format") != FORMAT or stored.keys() != names:
        raise ValueError(f"{file} is of a run in format {stored.get('format')!r}; this release reads format {FORMAT}.")
    return Run(**stored)


def read_task(folder: str | Path, name: str) -> Task:
    """What a finished task measured. Raises `ValueError` for one that is not finished."""
    file = task_file(folder, name)
    if not file.is_file():
        raise ValueError(f"{folder} has no finished task {name!r}: there is no {file.name}.")
    return Task(**_read_object(file))


def read_samples(folder: str | Path, name: str) -> Iterator[Sample]:
    """The samples of a finished task, in order.

    Raises:
        ValueError: for a line that is none; its number is given.
    """
    file = task_file(folder, name).with_name("samples.jsonl")
    with file.open("rb") as lines:
        for number, _, line in iterate_lines(lines):
            try:
                yield Sample(**parse_line(line))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{file}, line {number} is no sample: {error}. Run m3-eval anew.") from error


def write_run(folder: Path, run: Run) -> None:
    write_json(run_file(folder), asdict(run))


def write_task(folder: Path, task: Task, samples: Iterable[Sample]) -> None:
    """Writes a finished task: all of it, or nothing that `read_run` takes for one."""
    file = task_file(folder, task.name)
    write_json_lines(file.with_name("samples.jsonl"), map(asdict, samples))
    write_json(file, asdict(task))


def run_file(folder: str | Path) -> Path:
    return Path(folder) / "run.json"


def task_file(folder: str | Path, name: str) -> Path:
    return Path(folder) / "tasks" / name / "task.json"


def _read_object(file: Path) -> dict[str, Any]:
    content = read_json(file)
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no object.")
    return content
