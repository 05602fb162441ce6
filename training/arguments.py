"""What a run can be told, as three dataclasses, from a YAML file and the command line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments

from modeling_m3.visual_tokens import check_num_visual_tokens

from .conversations import TEMPLATES, check_template


SCALE_CHOICES = ("all", "random", "fixed")
TRAINED = ("all", "clip", "projector")
CONFIGS = Path(__file__).with_name("configs")


@dataclass
class ModelArguments:
    """Which checkpoint is trained, and what of it."""

    model_name_or_path: str = field(
        metadata={"help": "The M3 checkpoint to start from: a converted folder or a Hub id."}
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "As in from_pretrained: sdpa, eager, ..."})
    train: str = field(
        default="all",
        metadata={
            "help": "Paper, Table 7: all, or clip, only the vision tower. Or projector, LLaVA's first stage (the original's "
            "tune_mm_mlp_adapter), which also writes mm_projector.bin.",
            "choices": TRAINED,
        },
    )
    projector_weights: str | None = field(
        default=None,
        metadata={
            "help": "An mm_projector.bin, of m3-train or the original, to start with in place of the checkpoint's projector (the "
            "original's pretrain_mm_mlp_adapter)."
        },
    )
    freeze_language_model: bool = field(default=False, metadata={"help": "Train no weight of the language model."})
    freeze_projector: bool = field(default=False, metadata={"help": "Train no weight of the projector."})
    freeze_vision_tower: bool = field(default=False, metadata={"help": "Train no weight of the vision tower."})
    lora: bool = field(
        default=False, metadata={"help": "Train the language model by LoRA; merged in the final folder."}
    )
    lora_r: int = field(default=128, metadata={"help": "Rank of the update of each matrix."})
    lora_alpha: int = field(default=256, metadata={"help": "The update is scaled by alpha / r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout before the update."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "As q_proj v_proj; by default every linear layer of the language model."}
    )

    def __post_init__(self):
        _check_choice(self, "train")
        if self.trains_nothing_of("language_model") and self.lora:
            raise ValueError("lora trains the language model, which is frozen: leave out lora, or what freezes it.")
        if all(map(self.trains_nothing_of, ("language_model", "projector", "vision_tower"))):
            raise ValueError("language model, projector and vision tower are all frozen: there is nothing to train.")

    def trains_nothing_of(self, part: str) -> bool:
        """Whether `part`, "language_model", "projector" or "vision_tower", is frozen."""
        only = {"clip": "vision_tower", "projector": "projector"}.get(self.train, part)
        return getattr(self, f"freeze_{part}") or part != only


@dataclass
class DataArguments:
    """What it is trained on."""

    data_path: str | None = field(
        default=None,
        metadata={"help": "Records in LLaVA's format: a JSON file, or one with a record per line (.jsonl)."},
    )
    eval_data_path: str | None = field(
        default=None,
        metadata={
            "help": "Records like data_path's, to measure the loss on at every scale: at the end, and as eval_strategy says."
        },
    )
    image_folder: str = field(default=".", metadata={"help": "What paths of images in the records are relative to."})
    template: str = field(
        default="chat_template",
        metadata={"help": f"How conversations are written: {', '.join(TEMPLATES)}. The checkpoint's own by default."},
    )
    model_max_length: int = field(
        default=2048, metadata={"help": "Tokens, those of images included, that a sample is cut to; never in an image."}
    )
    strict: bool = field(default=False, metadata={"help": "Stop at the first bad sample, in place of skipping it."})
    show: int = field(
        default=0,
        metadata={"help": "Show so many records as the model sees them, with what is supervised marked, and end."},
    )

    def __post_init__(self):
        check_template(self.template)
        if self.show < 0:
            raise ValueError(f"show={self.show}: give a number of records.")


@dataclass
class M3TrainingArguments(TrainingArguments):
    """transformers' `TrainingArguments`, and how M3 is trained."""

    matryoshka_scales: list[int] | None = field(
        default=None, metadata={"help": "Numbers of visual tokens to train at; the checkpoint's by default."}
    )
    scale_choice: str = field(
        default="all",
        metadata={
            "help": "all: the loss is averaged over the scales (paper, equation 3.2). random: one is drawn for each step "
            "(Table 8). fixed: the one scale given (the baseline SS).",
            "choices": SCALE_CHOICES,
        },
    )
    projector_learning_rate: float | None = field(default=None, metadata={"help": "learning_rate by default."})
    vision_tower_learning_rate: float | None = field(default=None, metadata={"help": "learning_rate by default."})
    group_by_modality_length: bool = field(
        default=True, metadata={"help": "Make batches of one kind, with or without images, and of similar lengths."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay false: samples have no columns."})
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Not needed: every batch has a gradient for all that is trained."}
    )

    def __post_init__(self):
        if self.greater_is_better is None and "loss_at_" in (self.metric_for_best_model or ""):
            self.greater_is_better = False  # transformers knows that of `loss` alone
        super().__post_init__()
        _check_choice(self, "scale_choice")
        if self.scale_choice == "fixed" and len(self.matryoshka_scales or ()) != 1:
            raise ValueError(
                f"scale_choice='fixed' needs one scale: matryoshka_scales is {self.matryoshka_scales}, give it one number."
            )

    @property
    def device(self) -> torch.device:
        # Before 5.24, several processes without GPUs load their checkpoint to "cpu:0", which torch does not know.
        return torch.device("cpu") if super().device.type == "cpu" else super().device

    def learning_rate_of(self, part: str) -> float:
        """The peak learning rate of "language_model", "projector" or "vision_tower"."""
        own = None if part == "language_model" else getattr(self, f"{part}_learning_rate")
        return self.learning_rate if own is None else own

    def scales(self, offered: Sequence[int]) -> list[int]:
        """The scales to train at, of those a checkpoint offers.

        Raises:
            ValueError: for one that it does not offer, or one given twice.
        """
        scales = list(self.matryoshka_scales or offered)
        if len(set(scales)) != len(scales):
            raise ValueError(f"matryoshka_scales={scales}: give none twice.")
        return sorted(check_num_visual_tokens(scales, offered, len(scales), name="matryoshka_scales"))


def _check_choice(arguments: Any, name: str) -> None:
    """As the parser does on a command line, for those who build the arguments themselves."""
    value, choices = getattr(arguments, name), arguments.__dataclass_fields__[name].metadata["choices"]
    if value not in choices:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, choices))}.")


def parse(arguments: Sequence[str]) -> tuple[ModelArguments, DataArguments, M3TrainingArguments]:
    """Arguments from a command line whose first word may be a YAML file, of one's own or the name of one in `CONFIGS`.

    What follows it overrides the file.

    Raises:
        ValueError: a file that cannot be read, an unknown name, or values that contradict each other.
        SystemExit: a value of the wrong type, by argparse.
    """
    arguments = list(arguments)
    if arguments and arguments[0].endswith((".yaml", ".yml")):
        file = next((f for f in (Path(arguments[0]), CONFIGS / arguments[0]) if f.is_file()), Path(arguments[0]))
        arguments = [*_as_command_line(file), *arguments[1:]]
    parser = HfArgumentParser((ModelArguments, DataArguments, M3TrainingArguments), prog="m3-train", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"m3-hf {version('m3-hf')}")
    parser.add_argument(
        "--configs", action="version", version=str(CONFIGS), help="show the folder of files that ship and exit"
    )
    return parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)


def _as_command_line(file: Path) -> list[str]:
    """So the parser gives values from a file the types they have on the command line: YAML reads 2e-5 as a text."""
    if not file.is_file():
        raise ValueError(f"There is no configuration file {file}.")
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not valid YAML: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{file} must hold one setting per line, as `learning_rate: 2.0e-5`.")
    return [word for name, value in settings.items() if value is not None for word in (f"--{name}", *_words(value))]


def _words(value: Any) -> list[str]:
    if isinstance(value, list):
        return [str(item) for item in value]
    return [json.dumps(value) if isinstance(value, dict) else str(value)]
