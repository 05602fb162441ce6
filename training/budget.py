"""`m3-budget --model_name_or_path DIR --data_path DATA`: fits the choice behind `num_visual_tokens="auto"` and stores it.

Every question is answered at every scale, once; the output folder keeps what came of it, so that the same command goes on where
it was stopped, and another `--keep`, seed or network is fitted in moments. Nothing of the model changes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import HfArgumentParser

import modeling_m3
from m3_conversion.json_files import read_json, write_json
from m3_conversion.signals import interrupting
from m3_conversion.whole_files import part_of, replacing, used_alone
from m3_evaluation.answering import settings_of
from m3_evaluation.checkpoints import fingerprint
from m3_evaluation.own_data import METRICS, digest_of
from m3_evaluation.scores import RULE
from modeling_m3.automatic_budget_m3 import AUTOMATIC_BUDGET_FILE
from modeling_m3.checkpoint import check_checkpoint
from modeling_m3.weights_print_m3 import print_of_folder

from .budget_data import AskedPictures, digest_of_asked, read_labelled
from .budget_fit import KEEPS, check_labelled, check_numbers, fit, number_of_networks
from .budget_report import curve, write_report
from .budget_samples import Samples, ask, samples_of_run


PART = 50  # pictures whose outcomes are written together


@dataclass
class BudgetArguments:
    """Fits the choice behind num_visual_tokens="auto" for a checkpoint and stores it beside its weights."""

    model_name_or_path: str = field(metadata={"help": "The folder of an M3 checkpoint. The choice is stored in it."})
    data_path: str = field(
        metadata={
            "help": "Labelled questions: LLaVA's JSON or JSONL, a JSONL as m3-eval --data takes it, or a run folder of "
            "m3-eval --signals, whose answers are taken."
        }
    )
    output_dir: str = field(metadata={"help": "Where answers are kept, and the curve is written."})
    image_folder: str | None = field(
        default=None, metadata={"help": "What paths of images are relative to; the data file's folder by default."}
    )
    keep: list[float] = field(
        default_factory=lambda: [0.99],
        metadata={"help": "Shares of the finest scale's accuracy to keep. The first is what auto_keep is by default."},
    )
    start: int | None = field(
        default=None, metadata={"help": "Visual tokens of the first pass; the second coarsest scale by default."}
    )
    metric: str | None = field(
        default=None,
        metadata={
            "help": f"By which answers count: {', '.join(METRICS)}, the first by default; of a run, one of its tasks' "
            "own, what each is meant by as default."
        },
    )
    max_new_tokens: int = field(default=16, metadata={"help": "Length of an answer, in tokens, at most; not of a run."})
    limit: int | None = field(
        default=None, metadata={"help": "Of the questions, the first so many pictures' alone; not of a run."}
    )
    seed: int = field(default=0, metadata={"help": "Of the networks, and of the folds they are judged on."})
    device_map: str | None = field(
        default=None, metadata={"help": "Where to ask: cpu, cuda, auto, ... The GPU if there is one."}
    )
    dtype: str | None = field(
        default=None, metadata={"help": "To ask in: float32, float16, bfloat16; as the weights are stored by default."}
    )
    quantize: str | None = field(
        default=None, metadata={"help": "To ask the language model in 4 bits (nf4) or 8 (int8)."}
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "As transformers names it."})

    def __post_init__(self) -> None:
        of_a_run = Path(self.data_path).is_dir()
        if of_a_run and self.limit is not None:
            raise ValueError(f"--limit {self.limit}: --data_path {self.data_path} is a run, which is taken whole.")
        if self.metric is None and not of_a_run:
            self.metric = next(iter(METRICS))
        if not of_a_run and self.metric not in METRICS:
            raise ValueError(f"--metric {self.metric!r}: choose from {', '.join(METRICS)}.")
        if not self.keep or not all(0 < keep <= 1 for keep in self.keep):
            raise ValueError(f"--keep {self.keep}: give shares above 0 and up to 1, as 0.99.")
        for name in ("max_new_tokens", "limit"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: give a number from 1.")


def fit_budget(arguments: BudgetArguments) -> Path:
    """Asks, fits, stores and reports. Returns the file that was stored.

    Raises:
        ValueError: the folder is no M3 checkpoint, what is wrong with the data, or too few questions to tell.
    """
    folder, output = Path(arguments.model_name_or_path), Path(arguments.output_dir)
    check_checkpoint(folder)
    of_a_run = Path(arguments.data_path).is_dir()
    asked = [] if of_a_run else read_labelled(arguments.data_path, arguments.image_folder)[: arguments.limit]
    if not of_a_run:
        check_numbers(sum(len(group.questions) for group in asked), len(asked))
    attention = {"attn_implementation": arguments.attn_implementation} if arguments.attn_implementation else {}
    model, processor = modeling_m3.load(
        folder,
        dtype=arguments.dtype,
        quantize=arguments.quantize,
        device_map=arguments.device_map or ("cuda" if torch.cuda.is_available() else "cpu"),
        **attention,
    )
    scales = processor.visual_token_scales
    if len(scales) < 2:
        raise ValueError(f"{folder} offers {scales[0]} visual tokens alone, so there is nothing to choose.")
    start = scales[min(1, len(scales) - 2)] if arguments.start is None else arguments.start
    if start not in scales[:-1]:
        raise ValueError(f"--start {start}: choose from {scales[:-1]}.")
    checkpoint, weights = fingerprint(folder), print_of_folder(folder)
    settings = settings_of(model, processor, arguments.quantize)
    if of_a_run:
        samples = samples_of_run(Path(arguments.data_path), scales, checkpoint, arguments.metric, settings)
        check_labelled(samples, start)
        facts = {"data": digest_of([((), [Path(arguments.data_path, "run.json")])])}
    else:
        facts = {"data": digest_of_asked(asked), "rule of scores": RULE}
    _begin(output, arguments, {"checkpoint": checkpoint, **facts, **settings})
    if not of_a_run:
        with used_alone(output, "m3-budget"):
            samples = _ask_all(model.eval(), processor, asked, arguments, output)
        check_labelled(samples, start)
    keeps = sorted({*KEEPS, *arguments.keep})
    with tqdm(total=number_of_networks(scales, start), desc="networks", disable=not sys.stderr.isatty()) as progress:
        choice, predicted = fit(samples, start, arguments.keep[0], keeps, arguments.seed, progress.update)
    choice.print = weights
    model.automatic_budget = choice
    model._save_automatic_budget(folder)
    given = asdict(arguments).items()
    result = {
        "command": " ".join(
            ["m3-budget", *(f"--{name} {_shown(value)}" for name, value in given if value is not None)]
        ),
        **curve(samples, predicted, choice),
    }
    write_report(result, output)
    return folder / AUTOMATIC_BUDGET_FILE


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command. Returns its exit status: 0, 1 where one line on stderr says what is wrong, or 128 and a signal's number."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if "--version" in arguments:
        print(f"m3-hf {modeling_m3.__version__}")
        return 0
    try:
        [parsed] = HfArgumentParser(BudgetArguments, prog="m3-budget").parse_args_into_dataclasses(arguments)
        with interrupting():
            file = fit_budget(parsed)
    except KeyboardInterrupt as stop:
        print("m3-budget: stopped; the same command goes on", file=sys.stderr)
        return 128 + stop.args[0]
    except (ValueError, OSError, SafetensorError, HfHubHTTPError) as error:
        print(f"m3-budget: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    print(Path(parsed.output_dir, "README.md").read_text(encoding="utf-8"))
    print(f"m3-budget: wrote {file}; the curve is in {parsed.output_dir}")
    return 0


def _begin(output: Path, arguments: BudgetArguments, facts: dict[str, Any]) -> None:
    """Writes what is asked; where something was before, it must have been the same."""
    file = output / "asked.json"
    chosen = {name: getattr(arguments, name) for name in ("metric", "max_new_tokens", "limit")}
    about = {"format": 3, **facts, **chosen}
    if file.is_file():
        before = read_json(file)
        differs = [name for name in about if not isinstance(before, dict) or before.get(name) != about[name]]
        if differs:
            raise ValueError(f"--output_dir {output} holds answers of another {differs[0]}: give another folder.")
    if not file.is_file() and output.is_dir() and {*output.iterdir()} - {part_of(file)}:
        raise ValueError(f"--output_dir {output} has other files: give a new folder, or one of a run that was stopped.")
    write_json(file, about)


def _ask_all(
    model: modeling_m3.M3LlavaForConditionalGeneration,
    processor: modeling_m3.M3LlavaProcessor,
    asked: list[AskedPictures],
    arguments: BudgetArguments,
    output: Path,
) -> Samples:
    """The outcomes of all questions, those of before from the output folder."""
    score, folder, parts = METRICS[arguments.metric], output / "samples", []
    with tqdm(total=sum(len(group.questions) for group in asked), desc="questions", unit="") as progress:
        for begin in range(0, len(asked), PART):
            part = folder / f"{begin:07}.safetensors"
            if not part.is_file():
                found = []
                for group in asked[begin : begin + PART]:
                    found.append(ask(model, processor, group, score, arguments.max_new_tokens))
                    progress.update(len(group.questions))
                with replacing(part) as unfinished:
                    Samples.joined(found).save(unfinished)
            else:
                progress.update(sum(len(group.questions) for group in asked[begin : begin + PART]))
            parts.append(Samples.load(part))
    return Samples.joined(parts)


def _shown(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


if __name__ == "__main__":
    with torch.no_grad():
        raise SystemExit(main())
