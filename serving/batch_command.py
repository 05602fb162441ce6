"""The command `m3-batch`: many pictures answered, to be gone on with after any stop; on Ray where one machine is not enough."""

import errno
import json
import signal
import sys
from dataclasses import asdict, replace
from typing import Annotated, Any, Literal

import torch
import typer
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from tqdm import tqdm
from transformers.utils import logging

from m3_conversion.__main__ import VERSION
from m3_conversion.signals import handling_signals, interrupt
from m3_conversion.written_numbers import parse_number
from m3_evaluation.checkpoints import fingerprint
from modeling_m3 import M3LlavaConfig, M3LlavaProcessor
from modeling_m3.any_checkpoint import M3Checkpoint
from modeling_m3.checkpoint import read_config
from modeling_m3.visual_tokens import AUTO, check_num_visual_tokens

from .batch_engines import VLLM, EngineSettings, answer_rows, choose_engine, make_engine
from .batch_input import Source, read_source
from .batch_output import Output


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def batch(
    model: Annotated[str, typer.Option(help="An M3 or any LLaVA: a folder, or an id on the Hub.")],
    inputs: Annotated[
        list[str],
        typer.Option(
            "--input",
            help='A folder of pictures; or JSONL or parquet files, or a pattern of them, whose rows have "image", "question", and '
            'may have "id" and "num_visual_tokens". Any URL of fsspec. Repeat the option for several.',
        ),
    ],
    output: Annotated[
        str,
        typer.Option(
            help="A folder for the answers, or a file that ends in .jsonl, .csv or .parquet. The same command goes on with it."
        ),
    ],
    question: Annotated[str | None, typer.Option(help="Of rows that have none.")] = None,
    image_folder: Annotated[
        str | None,
        typer.Option(
            "--image-folder", "--image_folder", help="Where pictures of rows are; beside the file if left out."
        ),
    ] = None,
    num_visual_tokens: Annotated[
        str | None,
        typer.Option(
            "--num-visual-tokens",
            "--num_visual_tokens",
            help="Per tile, or auto, of rows that name none; the checkpoint's default if left out.",
        ),
    ] = None,
    max_new_tokens: Annotated[
        int,
        typer.Option("--max-new-tokens", "--max_new_tokens", help="Length of an answer, in tokens, at most.", min=1),
    ] = 128,
    engine: Annotated[
        Literal["auto", "vllm", "generate"], typer.Option(help="auto is vLLM where it is installed.")
    ] = "auto",
    engine_options: Annotated[str, typer.Option("--engine-options", help="Arguments of vLLM's LLM, as JSON.")] = "{}",
    batch_size: Annotated[
        int, typer.Option("--batch-size", "--batch_size", help="Prompts at once, by generate.", min=1)
    ] = 8,
    shard_size: Annotated[
        int, typer.Option("--shard-size", help="Rows that are written together, and lost at most by a kill.", min=1)
    ] = 256,
    dtype: Annotated[Literal["float32", "float16", "bfloat16"] | None, typer.Option(help="As m3-ask.")] = None,
    quantize: Annotated[Literal["nf4", "int8"] | None, typer.Option(help="As m3-ask; by generate.")] = None,
    revision: Annotated[str | None, typer.Option(help="As m3-ask.")] = None,
    device_map: Annotated[
        str | None, typer.Option("--device-map", "--device_map", help="By generate. The GPU if there is one.")
    ] = None,
    ray: Annotated[
        str | None, typer.Option(help="Of a Ray cluster, or local, which starts one on this machine.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="On Ray; one for every GPU, or CPU, by default.", min=1)] = None,
    show_version: Annotated[bool, VERSION] = False,
) -> None:
    """Answers a question about each of many pictures, into parquet files, or into one file of JSON Lines, CSV or parquet.

    Rows that cannot be answered say why. Ends with 0 where one was answered, with 1 where none was.
    """
    try:
        with handling_signals(interrupt):
            chosen = choose_engine(engine)
            loading = _loading(chosen, dtype, quantize, revision, device_map)
            settings = EngineSettings(
                model, chosen, None, max_new_tokens, batch_size, loading, _options(engine_options)
            )
            number = parse_number(num_visual_tokens, "--num-visual-tokens")
            if chosen == VLLM and (number == AUTO or quantize or device_map):
                what = "--num-visual-tokens auto" if number == AUTO else "--quantize" if quantize else "--device-map"
                raise ValueError(f"{what} is of --engine generate; vLLM is installed, and taken where none is named.")
            source, target = read_source(inputs, question, image_folder, shard_size), Output(output)
            found = settings.find()
            settings = replace(settings, num_visual_tokens=_offered(number, settings, found))
            about = {
                "checkpoint": fingerprint(found.folder, with_choice=True),
                "input": source.fingerprint,
                "question": question,
                "image_folder": image_folder,
                "shard_size": shard_size,
                **{name: value for name, value in asdict(settings).items() if name != "model"},
            }
            with target.used_alone():
                failed = _answer(settings, found, source, target, about, ray, workers)
    except KeyboardInterrupt as stop:
        print("m3-batch: stopped; the same command goes on", file=sys.stderr)
        raise typer.Exit(128 + (stop.args[0] if stop.args else signal.SIGINT)) from stop
    except (ValueError, OSError, SafetensorError, HfHubHTTPError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            error = ValueError(f"the disk of {output} is full: make room, the same command goes on")
        print(f"m3-batch: {' '.join(str(error).split())}", file=sys.stderr)
        raise typer.Exit(1) from error
    rows = sum(map(len, source.shards))
    print(f"m3-batch: {_outcome(rows, failed, source.left_out, output)}", file=sys.stderr if failed == rows else None)
    if failed == rows:
        raise typer.Exit(1)


def main() -> None:
    app(prog_name="m3-batch")


def _answer(
    settings: EngineSettings,
    found: M3Checkpoint,
    source: Source,
    target: Output,
    about: dict[str, Any],
    ray: str | None,
    workers: int | None,
) -> int:
    """Answers what is missing. Returns how many rows failed, those of before included."""
    if finished := target.begin(about):
        return finished["failed"]
    lengths = [len(shard) for shard in source.shards]
    done = target.done(lengths)
    missing = [index for index in range(len(lengths)) if index not in done]
    failed, before = sum(done.values()), sum(lengths[index] for index in done)
    with tqdm(total=sum(lengths), initial=before, unit=" rows", desc="answered") as progress:
        if missing and ray is None:
            failed += _here(settings, found, source, target, missing, progress)
        elif missing:
            from .batch_ray import run

            failed += run(ray, workers, settings, source, target.place, missing, progress)
    target.finish(about, len(lengths), failed)
    return failed


def _here(
    settings: EngineSettings, found: M3Checkpoint, source: Source, target: Output, missing: list[int], progress: tqdm
) -> int:
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    engine, failed = make_engine(settings, found), 0
    for index in missing:
        rows = source.rows(source.shards[index])
        failed += target.write(index, rows, answer_rows(engine, settings, rows, progress.update))
    return failed


def _outcome(rows: int, failed: int, left_out: int, output: str) -> str:
    if failed == rows:
        said = f"all {rows:,} rows failed: error says why in {output}"
    elif failed:
        said = f"{rows - failed:,} of {rows:,} rows are answered in {output}, {failed:,} failed: their error says why"
    else:
        said = f"{rows:,} rows are answered in {output}"
    return said + (f"; {left_out:,} files of folders are no pictures and were left out" if left_out else "")


def _offered(number: int | str | None, settings: EngineSettings, found: M3Checkpoint) -> int | str | None:
    """The number that rows without one are asked at; says so where it is not what the checkpoint would have."""
    config = M3LlavaConfig(**read_config(found.folder))
    if number not in (None, AUTO):
        return check_num_visual_tokens(number, config.visual_token_scales, 1)[0]
    if number is None and settings.engine == VLLM:
        processor = M3LlavaProcessor.from_pretrained(found.folder)
        if processor.num_visual_tokens == AUTO:
            number = max(processor.visual_token_scales)
            said = f"the checkpoint's default is auto, which is of --engine generate: vLLM answers at {number}"
            print(f"m3-batch: {said}", file=sys.stderr)
    return number


def _loading(
    engine: str, dtype: str | None, quantize: str | None, revision: str | None, device_map: str | None
) -> dict:
    given: dict[str, Any] = {"dtype": dtype, "revision": revision}
    if engine != VLLM:
        given |= {"quantize": quantize, "device_map": device_map or ("cuda" if torch.cuda.is_available() else None)}
    return {name: value for name, value in given.items() if value is not None}


def _options(text: str) -> dict[str, Any]:
    try:
        options = json.loads(text)
    except ValueError as error:
        raise ValueError(f"--engine-options {text!r} is not JSON: {error}.") from None
    if not isinstance(options, dict):
        raise ValueError(f'--engine-options {text!r}: give an object, as {{"tensor_parallel_size": 2}}.')
    return options


if __name__ == "__main__":
    main()
