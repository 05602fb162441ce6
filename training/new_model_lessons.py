"""What `python -m m3_training.new_model` trains on: generated scenes in whole sentences, and a few chats without a picture."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.data import Dataset

from m3_conversion.whole_files import replacing
from modeling_m3 import M3LlavaForConditionalGeneration, M3LlavaProcessor
from modeling_m3.visual_tokens import expand_placeholders

from .conversations import encode
from .data import Collator, Sample
from .m3_tiny.scenes import TEST_FONTS, TRAIN_FONTS, Scene, scene


SCENES = 1500  # of training: the tower sees each once, and captions and questions are about them again and again
_AT_ONCE = 20
CAPTIONS = ("The large {shape} is {color}.", "The large {shape} is {color}.", "A large {color} {shape}.")
# What the language model says of the world is to stay. Nothing that it is asked in the measurement is among these.
CHATS = (
    ("What is the capital of Italy?", "The capital of Italy is Rome."),
    ("What is the capital of Japan?", "The capital of Japan is Tokyo."),
    ("Who wrote Hamlet?", "William Shakespeare wrote Hamlet."),
    ("What is the largest planet?", "The largest planet in our solar system is Jupiter."),
    ("Hello!", "Hello! How can I help you today?"),
    ("How many days are in a week?", "There are seven days in a week."),
)
CHAT_SHARE = 1 / 16  # of the rows


def captions(count: int) -> list[dict[str, Any]]:
    """Records of stage one: the number of a scene, and what to say of it."""
    return [_caption(*_draw(index, "caption")) for index in range(count)]


def questions(count: int) -> list[dict[str, Any]]:
    """Records of stage two: the number of a scene with a question and its answer, and among them chats without a scene."""
    return [_question(*_draw(index, "question")) for index in range(count)]


def scene_of(seed: int) -> Scene:
    """A scene that training sees."""
    return scene(f"smol {seed}", TRAIN_FONTS)


def held_out(index: int) -> Scene:
    """A scene that training never sees, with a font that it never sees."""
    return scene(f"smol test {index}", TEST_FONTS)


def facts(made: Scene) -> tuple[str, str]:
    """(shape, color) of the scene's large shape."""
    answers = {question.kind: question.answer for question in made.questions}
    return answers["shape"], answers["color"]


def questions_about(shape: str, color: str) -> dict[str, tuple[str, str]]:
    """A question and its one right answer, by what it asks for."""
    return {
        "shape": ("What is the large shape?", f"The large shape is a {shape}."),
        "color": ("What color is the large shape?", f"The large {shape} is {color}."),
        "named": (f"What color is the large {shape}?", f"The large {shape} is {color}."),
    }


def _draw(index: int, name: str) -> tuple[int, random.Random]:
    """The scene of a record, and what draws all else."""
    rng = random.Random(f"new model {name} {index}")
    return rng.randrange(SCENES), rng


def _caption(number: int, rng: random.Random) -> dict[str, Any]:
    return {"scene": number, "caption": rng.choice(CAPTIONS)}


def _question(number: int, rng: random.Random) -> dict[str, Any]:
    if rng.random() < CHAT_SHARE:
        return {"scene": None, "chat": rng.choice(CHATS)}
    return {"scene": number, "kind": rng.choice(("shape", "color", "named"))}


@dataclass
class SeenScenes:
    """What the frozen vision tower makes of the scenes, each seen once, and what they show.

    Attributes:
        features: (scenes, patches, hidden size of the tower), in float16.
        facts: (shape, color) of each.
    """

    features: torch.Tensor
    facts: list[tuple[str, str]]


def see_scenes(
    model: M3LlavaForConditionalGeneration, processor: M3LlavaProcessor, file: Path, count: int = SCENES
) -> SeenScenes:
    """Shows the scenes of training to a model's tower, and keeps what it makes of them in a file; or reads that file."""
    if not file.exists():
        features, shown = [], []
        for first in range(0, count, _AT_ONCE):
            made = [scene_of(seed) for seed in range(first, min(first + _AT_ONCE, count))]
            pixels = processor.image_processor([each.picture for each in made], return_tensors="pt")["pixel_values"]
            with torch.no_grad():
                hidden = model.model.vision_tower(pixels.to(model.dtype)).last_hidden_state
            features.append(hidden[:, model.config.num_leading_tokens :].half())
            shown += [facts(each) for each in made]
        with replacing(file) as partial:
            save_file({"features": torch.cat(features)}, partial, metadata={"facts": json.dumps(shown)})
    with safe_open(file, "pt") as stored:
        return SeenScenes(stored.get_tensor("features"), list(map(tuple, json.loads(stored.metadata()["facts"]))))


class Lessons(Dataset):
    """Samples of records, each with what the vision tower sees of its scene.

    Args:
        records: of `captions` or `questions`.
        scenes: that they are about.
        processor: of the checkpoint that is trained.
        template: of `conversations.TEMPLATES`.
    """

    def __init__(
        self, records: Sequence[dict[str, Any]], scenes: SeenScenes, processor: M3LlavaProcessor, template: str
    ):
        self.records, self.scenes, self.processor, self.template = records, scenes, processor, template

    @property
    def notes(self) -> dict[str, list[int]]:
        """As of `LlavaDataset`: no record is bad."""
        return {}

    def remember(self, notes: dict[str, list[int]]) -> None:
        """As of `LlavaDataset`."""

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        """`input_ids` and `labels` of shape (s,), with the finest scale's placeholders, and `seen`, what the tower makes of the
        scene: (patches, hidden size of the tower)."""
        record = self.records[index]
        if record["scene"] is None:
            return self._sample(*record["chat"])
        number = record["scene"] % len(self.scenes.facts)
        shape, color = self.scenes.facts[number]
        if "caption" in record:
            question, answer = "<image>", record["caption"].format(shape=shape, color=color)
        else:
            question, answer = questions_about(shape, color)[record["kind"]]
            question = f"<image>\n{question}"
        return {**self._sample(question, answer), "seen": self.scenes.features[number]}

    def _sample(self, question: str, answer: str) -> Sample:
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        encoded = encode(turns, self.template, self.processor)
        counts = [max(self.processor.visual_token_scales)] * question.count("<image>")
        sources = expand_placeholders(encoded.input_ids, self.processor.image_token_id, counts)
        return {
            "input_ids": torch.tensor([encoded.input_ids[i] for i in sources]),
            "labels": torch.tensor([encoded.labels[i] for i in sources]),
        }


class LessonCollator(Collator):
    """As `Collator`, with `seen` of the rows that have a scene: (rows with a scene, patches, hidden size of the tower)."""

    def __call__(self, samples: Sequence[Sample]) -> Sample:
        batch = super().__call__(samples)
        seen = [sample["seen"] for sample in samples if "seen" in sample]
        return {**batch, "seen": torch.stack(seen)} if seen else batch
