"""The command `m3-eval DIR`: a checkpoint on benchmarks or on one's own questions, at every scale in one go."""

import errno
import math
import os
import sys
from contextlib import nullcontext
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from accelerate import Accelerator
from safetensors import SafetensorError
from transformers.utils import logging

from m3_conversion.__main__ import VERSION
from m3_conversion.signals import interrupting, stopping
from m3_conversion.whole_files import part_of, used_alone
from m3_conversion.written_numbers import parse_numbers
from modeling_m3.any_checkpoint import find
from modeling_m3.checkpoint import read_config
from modeling_m3.visual_tokens import AUTO, AUTO_NUMBER, SAMPLINGS

from .answering import KEPT_BYTES, Answer, Answerer, settings_of
from .asking import ask_all
from .checkpoints import fingerprint
from .own_data import METRICS, Question, fingerprint_of, read_questions
from .pinpoints import parse_pinpoints
from .record import Record, remove_unfinished_thumbnails
from .runs import Run, Sample, Task, read_written_run, run_file, task_file, write_run, write_task
from .scores import RULE
from .signals import gather, write_signals


OWN_TASKS = ("m3_easy_vqa", "m3_scenes")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
@stopping("m3-eval", "the same command goes on")
def evaluate(
    checkpoint: Annotated[
        str, typer.Argument(metavar="DIR", help="An M3 or any LLaVA: a folder, or an id on the Hub.")
    ],
    output: Annotated[Path, typer.Option(help="The run folder. The same command goes on with a run that was stopped.")],
    tasks: Annotated[
        str | None, typer.Option(help=f"lmms-eval's, or ours ({', '.join(OWN_TASKS)}), joined by commas.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help='Instead of tasks: a JSONL with "question", "answer" and "image" or "video" in every line.'),
    ] = None,
    image_folder: Annotated[
        Path | None,
        typer.Option(
            "--image_folder", "--image-folder", help="Where the pictures of --data are; beside it if left out."
        ),
    ] = None,
    metric: Annotated[
        Literal["exact_match", "contains", "anls"],
        typer.Option(help="By which answers to --data are meant to be judged."),
    ] = "exact_match",
    scales: Annotated[
        str | None, typer.Option(help="Numbers of visual tokens, as 9,36; or auto. All of the checkpoint's by default.")
    ] = None,
    limit: Annotated[float | None, typer.Option(help="Questions of every task, or their share below 1.")] = None,
    include_path: Annotated[
        Path | None,
        typer.Option("--include_path", "--include-path", help="A folder of further task files, as lmms-eval has it."),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch_size", "--batch-size", help="Questions at once.", min=1)] = 8,
    max_new_tokens: Annotated[
        int,
        typer.Option(
            "--max_new_tokens", "--max-new-tokens", help="Length of answers to --data, in tokens, at most.", min=1
        ),
    ] = 32,
    quantize: Annotated[Literal["nf4", "int8"] | None, typer.Option(help="As m3-ask.")] = None,
    dtype: Annotated[Literal["float32", "float16", "bfloat16"] | None, typer.Option(help="As m3-ask.")] = None,
    revision: Annotated[str | None, typer.Option(help="As m3-ask.")] = None,
    device_map: Annotated[
        str | None, typer.Option("--device_map", "--device-map", help="cpu, cuda, auto, ... The GPU if there is one.")
    ] = None,
    attn_implementation: Annotated[
        str | None, typer.Option("--attn_implementation", "--attn-implementation", help="As transformers names it.")
    ] = None,
    image_grid_pinpoints: Annotated[
        str | None,
        typer.Option(
            "--image_grid_pinpoints",
            "--image-grid-pinpoints",
            help="HEIGHTxWIDTH in pixels, several joined by +. The checkpoint's if left out.",
        ),
    ] = None,
    sampling: Annotated[str | None, typer.Option(help=f"{', '.join(SAMPLINGS)}. The checkpoint's if left out.")] = None,
    kept_bytes: Annotated[
        int,
        typer.Option(
            "--kept_bytes", "--kept-bytes", help="Of encoded pictures, kept for more questions about them.", min=0
        ),
    ] = KEPT_BYTES,
    num_frames: Annotated[
        int | None,
        typer.Option("--num_frames", "--num-frames", help="Of every video, evenly spaced. 6 by default.", min=1),
    ] = None,
    fps: Annotated[
        float | None, typer.Option(help="Frames of a video for every second of it, in place of --num_frames.")
    ] = None,
    video_layout: Annotated[
        Literal["frames", "collage"] | None,
        typer.Option("--video_layout", "--video-layout", help="Frames, each at its own tokens, by default."),
    ] = None,
    signals: Annotated[
        bool,
        typer.Option("--signals", help="Keeps what m3-budget fits num_visual_tokens='auto' on. For short answers."),
    ] = False,
    show_version: Annotated[bool, VERSION] = False,
) -> None:
    """Measures how right a checkpoint is at every number of visual tokens; m3-analyze reads what this writes."""
    if (tasks is None) == (data is None):
        raise typer.BadParameter("give either --tasks or --data")
    try:
        _check_limit(limit)
        pinpoints = parse_pinpoints(image_grid_pinpoints)
        found_tasks: dict[str, Any] = {}
        questions: list[Question] = []
        if data is not None:
            is_share = limit is not None and limit < 1
            questions = read_questions(data, image_folder, None if limit is None or is_share else int(limit))
            if is_share:  # rounded as lmms-eval does
                questions = questions[: math.ceil(limit * len(questions))]
            names = [data.stem]
        else:
            found_tasks = _benchmarks([name.strip() for name in tasks.split(",") if name.strip()], include_path)
            names = list(found_tasks)
        found = find(checkpoint, quantize=quantize, dtype=dtype, revision=revision)
        attention = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
        accelerator = Accelerator()
        if not sys.stderr.isatty():
            logging.disable_progress_bar()
        model, processor = found.load(device_map=device_map or accelerator.device, **attention)
        video = {"num_frames": num_frames, "fps": fps, "video_layout": video_layout}
        answerer = Answerer(model, processor, pinpoints, sampling, kept_bytes, signals, video)
        asked_at = answerer.scales(None if scales is None else parse_numbers(scales, "--scales", may_be_auto=True))
        if signals and asked_at != processor.visual_token_scales:
            raise ValueError(f"--signals tell something where all scales are asked: leave out --scales {scales}.")
        run = Run(
            checkpoint=checkpoint,
            fingerprint=fingerprint(found.folder, with_choice=asked_at == [AUTO_NUMBER]),
            config=read_config(found.folder),
            scales=asked_at,
            tasks=names,
            settings={
                **settings_of(model, processor, quantize, pinpoints, sampling),
                "limit": limit,
                "batch_size": batch_size,
                "data": fingerprint_of(questions) if questions else None,
                "video": answerer.video or None,
                "signals": signals or None,  # as in runs of before there were any
                **({"max_new_tokens": max_new_tokens, "metric": metric} if questions else {}),
            },
            versions=_versions(),
        )
        if accelerator.is_main_process:
            _begin(output, run)
        accelerator.wait_for_everyone()
        with used_alone(output, "m3-eval") if accelerator.is_main_process else nullcontext():
            for name in names:
                file = task_file(output, name)
                if not file.is_file():
                    with interrupting():
                        if questions:
                            done = _ask(answerer, run, name, questions, output, batch_size, max_new_tokens, metric)
                        else:
                            from .benchmark_tasks import AllScales, run_task

                            asked = AllScales(answerer, run.scales, batch_size, output, accelerator)
                            done = run_task(name, found_tasks[name], asked, limit)
                    if done is not None and accelerator.is_main_process:
                        task, samples, gathered = done
                        if gathered is not None:
                            write_signals(file.parent, gathered)
                        write_task(output, task, samples)
                        print(_line(task, samples, run.scales))
                if file.is_file() and accelerator.is_main_process:
                    for record in file.parent.glob("answers.*.jsonl"):
                        record.unlink()
        if accelerator.is_main_process:
            print(f"m3-eval: all is in {output}; m3-analyze {output} --output REPORT says what it means")
    except (ValueError, OSError, SafetensorError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            error = ValueError(f"the disk of {output} is full: make room, the same command goes on")
        print(f"m3-eval: {' '.join(str(error).split())}", file=sys.stderr)
        raise typer.Exit(1) from error


def main() -> None:
    app(prog_name="m3-eval")


def _benchmarks(names: list[str], include_path: Path | None) -> dict[str, Any]:
    if find_spec("lmms_eval") is None:
        raise ValueError("--tasks needs lmms-eval: pip install '.[eval]' in the clone. --data works without it.")
    if include_path is not None and not include_path.is_dir():
        raise ValueError(f"--include_path {include_path} is no folder.")
    from .benchmark_tasks import find_tasks

    paths = [] if include_path is None else [str(include_path)]
    if any(name in OWN_TASKS for name in names):
        from .own_tasks import make_once

        paths.append(str(make_once()))
    return find_tasks(names, paths)


def _check_limit(limit: float | None) -> None:
    if limit is not None and not (0 < limit < 1 or (limit >= 1 and limit.is_integer())):
        raise ValueError(f"--limit {limit}: give a number of questions from 1, or a share of them below 1, as 0.5.")


def _begin(folder: Path, run: Run) -> None:
    """Writes what is asked; a run that was begun must have asked the same."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output {folder} is a file.")
    before = read_written_run(folder)
    if before is None:
        if folder.is_dir() and {*folder.iterdir()} - {part_of(run_file(folder))}:
            raise ValueError(f"--output {folder} has other files: give a new folder, or one of a run that was stopped.")
        write_run(folder, run)
        return
    if before.fingerprint != run.fingerprint:
        raise ValueError(f"{folder} holds a run of another checkpoint, {before.checkpoint}. Give another --output.")
    for what, old, new in (
        ("scales", before.scales, run.scales),
        *((name, before.settings.get(name), run.settings[name]) for name in run.settings),
    ):
        if old != new:
            raise ValueError(f"{folder} holds a run with {what} {old}, not {new}. Give another --output.")
    remove_unfinished_thumbnails(folder)
    tasks = list(dict.fromkeys([*before.tasks, *run.tasks]))
    write_run(folder, Run(**{**vars(run), "tasks": tasks}))


def _ask(
    answerer: Answerer,
    run: Run,
    name: str,
    questions: list[Question],
    output: Path,
    batch_size: int,
    max_new_tokens: int,
    metric: str,
) -> tuple[Task, list[Sample], dict[str, Any] | None]:
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("--data is asked in one process: start m3-eval without a launcher.")
    record = Record(output / "tasks" / name / "answers.0.jsonl")
    settings = {"max_new_tokens": max_new_tokens, "do_sample": False}
    asked = [(question.id, settings) for question in questions]
    ask_all(answerer, run.scales, asked, lambda index: questions[index].chat(), record, output, batch_size, name)
    samples = []
    for question in questions:
        entry = record.results[question.id]
        answers = [Answer(**result) for result in entry["results"]]
        samples.append(
            Sample(
                id=question.id,
                question=question.text,
                target=question.answers,
                answers=[answer.text for answer in answers],
                scores={
                    label: [score(answer.text, question.answers) for answer in answers]
                    for label, score in METRICS.items()
                },
                visual_tokens=[answer.visual_tokens for answer in answers],
                text_tokens=answers[0].text_tokens,
                answer_tokens=[answer.answer_tokens for answer in answers],
                pictures=entry["pictures"],
                subset=question.subset,
                kind=question.kind,
            )
        )
    nothing = dict.fromkeys(METRICS)
    gathered = gather([record.results[question.id] for question in questions])
    return Task(name, len(samples), metric, nothing, dict.fromkeys(METRICS, True), RULE), samples, gathered


def _line(task: Task, samples: list[Sample], scales: list[int]) -> str:
    means = [sum(sample.scores[task.metric][i] for sample in samples) / len(samples) for i in range(len(scales))]
    shown = ", ".join(f"{100 * mean:.1f} at {scale or AUTO}" for scale, mean in zip(scales, means))
    return f"{task.name}: {task.metric} of {task.samples} questions, %: {shown}"


def _versions() -> dict[str, str]:
    found = {"torch": torch.__version__}
    for package in ("m3-hf", "transformers", "lmms-eval"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue  # it takes no part
    return found


if __name__ == "__main__":
    main()
