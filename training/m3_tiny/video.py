"""m3-tiny for video: `python -m m3_training.m3_tiny.video FOLDER`.

Fine-tunes m3-tiny on generated clips, each seen as a random number of frames with a random number of visual tokens for every
frame. `m3_evaluation.video_budgets` counts what it then answers where as many tokens are spent on many frames or on few.
"""

import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

import modeling_m3
from m3_conversion.card import model_card
from m3_conversion.writer import new_folder, write_other_files
from modeling_m3 import M3LlavaForConditionalGeneration, M3LlavaProcessor
from modeling_m3.videos import frame_indices

from .clips import FRAMES, IN_TIME, KINDS, clip, see, training_pairs, visual_tokens, write_clips
from .data import Records
from .evaluate import layout_of
from .muon import FloatMuonWithAdamW
from .scenes import Question


STEPS = 1500
ROWS = 16  # of a step
PICTURE_ROWS = 3  # of them, those of m3-tiny's own task, which would be forgotten otherwise
# A step's clips are drawn from so many, of which so many are new: the tower takes more time than all else, and the same
# pictures in another take are as good to learn from, but codes that are seen often are remembered instead of read.
WINDOW, NEW = 150, 2
QUESTIONS = 2  # at most, of a row; among them the one that needs many frames, where there are so many:
MANY = 16
# To find out when something changes is learned best where there is nothing else to learn.
FIRST_PART, FIRST_PAIRS = 0.4, ((36, 1), (36, 1), (144, 1))
LEARNING_RATE = 1e-3


class Lessons(Dataset):
    """Steps of training, each a batch that follows from its number. Vision tower and projector are frozen: they see a picture once.

    Args:
        model, processor: of the checkpoint that is trained.
        steps: how many.
    """

    def __init__(self, model: M3LlavaForConditionalGeneration, processor: M3LlavaProcessor, steps: int):
        self.model, self.processor, self.steps = model, processor, steps
        self.records = Records(steps + WINDOW, "video")
        self._seen: dict[str, torch.Tensor] = {}

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> dict[str, Any]:
        """What is seen of the rows' pictures, which of them each row shows with how many tokens, and the rows' texts."""
        rng = random.Random(f"m3-tiny video {step}")
        first_part = step < FIRST_PART * self.steps
        pairs = (rng.choice(FIRST_PAIRS),) if first_part else training_pairs(rng)
        most = max(frames * number for frames, number in pairs)
        seen, shown, tokens, layouts, kinds, before = [], [], [], [], [], 0
        for row in range(ROWS):
            if row < PICTURE_ROWS:
                features, order, questions = self._picture(step, rng)
                number = rng.choice([scale for scale in self.processor.visual_token_scales if scale <= most])
            else:
                frames, number = rng.choice(pairs)
                features, order, questions = self._clip(step, rng, frames, IN_TIME if first_part else KINDS)
                order = [order[index] for index in frame_indices(FRAMES, frames)]
            distinct = sorted(set(order))
            seen.append(features[distinct])
            shown.append(torch.tensor([before + distinct.index(picture) for picture in order]))
            before += len(distinct)
            tokens.append(number)
            layouts.append(layout_of(self.processor, questions, len(order) * number))
            kinds.append([question.kind for question in questions])
        texts = _padded(layouts, self.processor.tokenizer.pad_token_id)
        return {"seen": torch.cat(seen), "shown": shown, "tokens": tokens, "kinds": kinds, **texts}

    def _clip(
        self, step: int, rng: random.Random, frames: int, kinds: Sequence[str]
    ) -> tuple[torch.Tensor, list[int], list[Question]]:
        seed = NEW * step + rng.randrange(WINDOW)
        made = clip(f"train {seed}", take=rng.randrange(1 << 30))
        asked = [question for question in made.questions if question.kind in kinds]
        features = self._features(f"clip {seed}", made.pictures)
        rng.shuffle(asked)
        if frames >= MANY:
            asked.sort(key=lambda question: question.kind not in IN_TIME)
        return features, made.order, asked[:QUESTIONS]

    def _picture(self, step: int, rng: random.Random) -> tuple[torch.Tensor, list[int], list[Question]]:
        index = step + rng.randrange(WINDOW)
        record = self.records[index]
        texts = [turn["value"].removeprefix("<image>\n") for turn in record["conversations"]]
        questions = [Question("picture", *pair) for pair in zip(texts[::2], texts[1::2])]
        features = self._features(f"picture {index}", [record["image"]])
        return features, [0], rng.sample(questions, min(QUESTIONS, len(questions)))

    def _features(self, name: str, pictures: list[Image.Image]) -> torch.Tensor:
        if name not in self._seen:
            if len(self._seen) > 3 * WINDOW:
                del self._seen[next(iter(self._seen))]  # the oldest
            self._seen[name] = see(self.model, self.processor, pictures).half()
        return self._seen[name]


class ClipTrainer(Trainer):
    """Trains on `Lessons` in their order; logs how many questions of each kind were answered right."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.hits: dict[str, list[bool]] = defaultdict(list)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        ids, groups = inputs["ids"], inputs["groups"]
        # Questions about a clip see its frames and not each other: one answer could give away another.
        same = groups[:, :, None] == groups[:, None, :]
        allowed = (same | (groups[:, None, :] == 0)) & torch.ones_like(same[0]).tril()
        mask = torch.zeros_like(allowed, dtype=model.dtype).masked_fill(~allowed, torch.finfo(model.dtype).min)
        embeds = model.get_input_embeddings()(ids)
        visual = torch.cat(visual_tokens(model, inputs["seen"], inputs["shown"], inputs["tokens"]))
        embeds = embeds.masked_scatter((ids == model.config.image_token_id)[..., None], visual)
        hidden = model.model.language_model(
            inputs_embeds=embeds, attention_mask=mask[:, None], position_ids=inputs["positions"], use_cache=False
        ).last_hidden_state
        row, column = torch.where(inputs["labels"][:, 1:] != -100)
        target = inputs["labels"][row, column + 1]
        logits = model.lm_head(hidden[row, column])
        self._count(inputs["kinds"], row, groups[row, column + 1], logits.argmax(-1) == target)
        return cross_entropy(logits, target)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        logs |= {kind: round(sum(hits) / len(hits), 3) for kind, hits in sorted(self.hits.items())}
        self.hits.clear()
        super().log(logs, start_time)

    def _count(self, kinds: list[list[str]], row: torch.Tensor, group: torch.Tensor, right: torch.Tensor) -> None:
        answers: dict[tuple[int, int], bool] = defaultdict(lambda: True)
        for r, number, ok in zip(row.tolist(), group.tolist(), right.tolist()):
            answers[r, number] &= ok
        for (r, number), ok in answers.items():
            self.hits[kinds[r][number - 1]].append(ok)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        return SequentialSampler(self.train_dataset)


def train(folder: Path, steps: int = STEPS, seed: int = 0) -> Path:
    """Trains, going on from the last checkpoint in the folder if there is one. Returns the folder of the result."""
    final = folder / "final"
    if final.exists():
        return final
    set_seed(seed)
    start = modeling_m3.default_checkpoint()
    model, processor = modeling_m3.load(start)
    model.automatic_budget = None  # it was fitted to other weights
    model.model.vision_tower.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(False)
    arguments = TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        seed=seed,
        use_cpu=not torch.cuda.is_available(),
        max_steps=steps,
        per_device_train_batch_size=1,  # a batch of `ROWS`
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 20,
        disable_tqdm=True,
        logging_steps=20,
        save_steps=100,
        save_total_limit=1,
        remove_unused_columns=False,
        report_to=[],
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = FloatMuonWithAdamW(model, [{"params": trained, "lr": LEARNING_RATE, "weight_decay": 0.05}])
    trainer = ClipTrainer(
        model=model,
        args=arguments,
        train_dataset=Lessons(model, processor, steps),
        data_collator=lambda batches: batches[0],
        optimizers=(optimizer, None),
    )
    checkpoint = get_last_checkpoint(arguments.output_dir) if Path(arguments.output_dir).exists() else None
    trainer.train(resume_from_checkpoint=checkpoint)
    about = {"trained_for_scales": True, "license": "apache-2.0", "training": f"{steps} steps on generated clips."}
    card = model_card("m3-tiny-video", "m3-tiny", model.config, source=start, **about)
    with new_folder(final, overwrite=False) as partial:
        model.save_pretrained(partial)
        write_other_files(partial, model.config, processor, model.generation_config, card)
    return final


def _padded(layouts: list[dict[str, list[int]]], pad: int) -> dict[str, torch.Tensor]:
    """The rows' texts as tensors of one length."""
    length = max(len(layout["ids"]) for layout in layouts)
    fill = {"ids": pad, "positions": 0, "labels": -100, "groups": -1}
    return {
        name: torch.tensor([layout[name] + [value] * (length - len(layout[name])) for layout in layouts])
        for name, value in fill.items()
    }


def main(
    folder: Annotated[Path, typer.Argument(help="Where checkpoints and results go; it goes on where it was stopped.")],
    steps: Annotated[int, typer.Option(help="Of training.")] = STEPS,
    clips: Annotated[int, typer.Option(help="Held-out ones, which are written as files.")] = 200,
) -> None:
    """Trains m3-tiny on clips, and writes others to measure it on."""
    final, data = train(folder, steps), write_clips(folder / "clips", clips)
    print(f"python -m m3_evaluation.video_budgets {final} --data {data} --output {folder / 'budgets'}")


if __name__ == "__main__":
    typer.run(main)
