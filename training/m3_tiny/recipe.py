"""The recipe of m3-tiny: which runs there are, in which order, from where and with what.

Every run is a folder; one that is finished is not run again, and one that was interrupted goes on from its last checkpoint.
"""

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPVisionModel, set_seed

from m3_conversion.card import model_card
from m3_conversion.json_files import read_json, write_json
from m3_conversion.writer import new_folder, write_other_files
from m3_training.arguments import DataArguments, M3TrainingArguments, ModelArguments
from m3_training.finetune import finetune
from modeling_m3 import M3LlavaProcessor
from modeling_m3.visual_tokens import SAMPLINGS

from .data import Records, corpus, held_out_easy_vqa, held_out_scenes
from .evaluate import evaluate
from .model import new_model, new_processor, train_tokenizer
from .muon import MuonWithAdamW
from .scenes import DETAIL_KINDS, EASY_KINDS, TRAIN_FONTS, Question
from .vision_training import Round, number_of_processes, number_of_workers, train_vision_tower


SCALES = (1, 9, 36, 144, 576)
# Quarter views are learned from four times as fast as whole ones, whose number of tokens the tower must get used to.
VISION_ROUNDS = (
    Round(view=168, batch=32, steps=6000, learning_rate=3e-3),
    Round(view=336, batch=16, steps=2000, learning_rate=1.2e-3),
)
TEST_PICTURES = 1000  # generated ones, with one question of each kind, and those of easy-vqa with several
ABLATION_TEST_PICTURES = 200


@dataclass(frozen=True)
class Run:
    """One run of `m3-train` on generated records.

    Attributes:
        start: the run whose result it starts from.
        steps: of `batch` pictures.
        scales: visual tokens to train at.
        scale_choice: as in `m3-train`.
        learning_rate: of language model and projector. The vision tower stays as the first stage left it: at rates that
            are right for the others, it forgets how to read.
        sampling: how the visual tokens of coarser scales are made.
        samplings: how they are made in its test.
        test_scales: visual tokens it is tested at; all by default.
        batch: pictures per step.
        yes_or_no_first, only, repeated_codes, easy_vqa_every: as in `Records`.
    """

    start: str
    steps: int
    scales: tuple[int, ...]
    scale_choice: str = "all"
    learning_rate: float = 1e-3
    sampling: str = "average"
    samplings: tuple[str, ...] = ("average",)
    test_scales: tuple[int, ...] = SCALES
    batch: int = 16
    yes_or_no_first: float = 0.5
    only: tuple[str, ...] = ()
    repeated_codes: float = 0.0
    easy_vqa_every: int = 4

    @property
    def is_ablation(self) -> bool:
        return self.steps == ABLATION_STEPS


FINAL_STEPS = 540
ABLATION_STEPS = 60
RUNS = {
    # To compare a word with what is seen is learned best where there is little else to learn, and little to look at.
    "words": Run(
        "untrained", 400, (9,), "fixed", 2e-3, batch=32, yes_or_no_first=1.0, only=EASY_KINDS, easy_vqa_every=3
    ),
    # Reading is not learned for long beside all else, or where the code is hard to find.
    "letters": Run("words", 240, (144,), "fixed", 2e-3, only=("code",), repeated_codes=0.6, easy_vqa_every=3),
    # Finding things takes the longest, and needs tokens, but not all of them: a step is cheap here. Without questions of
    # "presence", to compare a word with what is seen is forgotten.
    "details": Run("letters", 1200, (144,), "fixed", 2e-3, only=(*DETAIL_KINDS, "presence"), repeated_codes=0.15),
    # Paper section 4.1: M3 starts from a LLaVA. This is one, at 576 tokens.
    "language": Run("details", 600, (576,), "fixed", batch=8),
    # Paper, equation 3.2.
    "m3-tiny": Run("language", FINAL_STEPS, SCALES),
    # The same at one scale: 576 alone, to be pooled without training (Table 4), and two "SS" models (Table 2).
    "full": Run("language", FINAL_STEPS, (576,), "fixed", samplings=SAMPLINGS),
    "ss-36": Run("language", FINAL_STEPS, (36,), "fixed", test_scales=(36,)),
    "ss-9": Run("language", FINAL_STEPS, (9,), "fixed", test_scales=(9,)),
    # In small: how tokens are sampled (Table 6), all scales or a random one, and what to start from (Table 8).
    "ablation-average": Run("language", ABLATION_STEPS, SCALES),
    "ablation-spatial": Run("language", ABLATION_STEPS, SCALES, sampling="spatial", samplings=("spatial",)),
    "ablation-sequential": Run("language", ABLATION_STEPS, SCALES, sampling="sequential", samplings=("sequential",)),
    "ablation-random": Run("language", ABLATION_STEPS, SCALES, "random"),
    "ablation-scratch": Run("untrained", ABLATION_STEPS, SCALES),
}
# What the others start from, one after the other. They are not measured.
BASES = ("words", "letters", "details", "language")


def prepare(folder: Path, seed: int = 0) -> Path:
    """The first stage: `folder/untrained/final`, a checkpoint whose vision tower alone is trained."""
    final = folder / "untrained" / "final"
    if final.exists():
        return final
    processor, tower = train_tower(folder, seed)
    set_seed(seed)
    model = new_model(processor.tokenizer)
    model.model.vision_tower.load_state_dict(CLIPVisionModel.from_pretrained(tower).state_dict())
    card = model_card(
        "untrained", "untrained", model.config, trained_for_scales=False, source=folder, license="apache-2.0"
    )
    final.parent.mkdir(exist_ok=True)
    with new_folder(final, overwrite=False) as partial:
        model.save_pretrained(partial)
        write_other_files(partial, model.config, processor, model.generation_config, card)
    return final


def train_tower(folder: Path, seed: int = 0) -> tuple[M3LlavaProcessor, Path]:
    """The processor, and the folder of the trained vision tower. Several processes can do this together."""
    processor = new_processor(train_tokenizer(corpus()))

    def untrained() -> CLIPVisionModel:
        return new_model(processor.tokenizer).model.vision_tower

    return processor, train_vision_tower(folder / "vision", untrained, VISION_ROUNDS, seed)


def train(folder: Path, name: str, seed: int = 0) -> Path:
    """Trains one of `RUNS`; returns the folder of its result."""
    run = RUNS[name]
    output = folder / name
    if (output / "final").exists():
        return output / "final"
    start = _start(folder, run)
    return finetune(
        ModelArguments(model_name_or_path=str(start), freeze_vision_tower=True),
        DataArguments(model_max_length=1024, strict=True),
        M3TrainingArguments(
            output_dir=str(output),
            matryoshka_scales=list(run.scales),
            scale_choice=run.scale_choice,
            max_steps=run.steps,
            per_device_train_batch_size=run.batch // number_of_processes(),
            learning_rate=run.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=run.steps // 15,
            weight_decay=0.05,
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            dataloader_num_workers=number_of_workers(),
            group_by_modality_length=False,
            logging_steps=10,
            disable_tqdm=True,
            save_steps=50,
            save_total_limit=1,
            seed=seed,
            report_to=[],
        ),
        optimizer_class=MuonWithAdamW,
        records=Records(
            run.steps * run.batch,
            name if name in BASES else "final",
            run.yes_or_no_first,
            run.only,
            run.repeated_codes,
            run.easy_vqa_every,
        ),
    )


def measure(folder: Path, name: str) -> dict:
    """Asks the result of a run all test questions; keeps and returns the counts, by sampling and kind of question."""
    file = folder / name / "answers.json"
    if file.exists():
        return read_json(file)
    run, final = RUNS[name], folder / name / "final"
    processor = AutoProcessor.from_pretrained(final, backend="pil")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForImageTextToText.from_pretrained(final, dtype=torch.float32).eval().to(device)
    pictures = ABLATION_TEST_PICTURES if run.is_ablation else TEST_PICTURES

    def ask(tests: Iterable[tuple[Image.Image, list[Question]]]) -> dict[str, dict]:
        answers = evaluate(model, processor, tests, run.test_scales, run.samplings)
        return {sampling: answered.summary() for sampling, answered in answers.items()}

    counts = ask(held_out_scenes(pictures))
    if not run.is_ablation:
        for sampling, by_kind in ask(held_out_easy_vqa()).items():
            counts[sampling] |= by_kind
    if name == "m3-tiny":  # what the font that training has not costs
        counts["seen fonts"] = ask(held_out_scenes(ABLATION_TEST_PICTURES, TRAIN_FONTS))["average"]
    write_json(file, counts)
    return counts


def _start(folder: Path, run: Run) -> Path:
    """The checkpoint that a run starts from: another run's, where needed with another way to sample."""
    start = folder / run.start / "final"
    if run.sampling != "average":
        start = _with_sampling(start, folder / f"{run.start}-{run.sampling}", run.sampling)
    return start


def _with_sampling(source: Path, copy: Path, sampling: str) -> Path:
    """The same checkpoint, told to sample its visual tokens otherwise."""
    if not copy.exists():
        with new_folder(copy, overwrite=False) as partial:
            shutil.copytree(source, partial, dirs_exist_ok=True)
            config = read_json(partial / "config.json")
            write_json(partial / "config.json", {**config, "visual_token_sampling": sampling})
    return copy
