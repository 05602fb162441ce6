"""What m3-tiny is trained and tested on: generated scenes, and easy-vqa with its own split."""

import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import easy_vqa
from PIL import Image

from .scenes import TEST_FONTS, TRAIN_FONTS, Question, scene


EASY_VQA = "easy-vqa"
MOST_QUESTIONS = 8  # asked of a training picture in one conversation


class Records(Sequence):
    """Conversations about pictures, in LLaVA's format but with the picture itself: every fourth is of easy-vqa.

    Record `index` is always the same; the order of its questions too.

    Args:
        length: how many.
        name: another name is another series of scenes.
    """

    def __init__(self, length: int, name: str = "train"):
        self.length, self.name = length, name

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.length:
            raise IndexError(index)
        rng = random.Random(f"{self.name} {index}")
        if index % 4 == 0:
            pictures = easy_vqa_pictures("train")
            picture, questions = pictures[sorted(pictures)[rng.randrange(len(pictures))]]
            picture = Image.open(picture).convert("RGB")
        else:
            made = scene(f"{self.name} {index}", TRAIN_FONTS)
            picture, questions = made.picture, made.questions
        questions = rng.sample(questions, min(MOST_QUESTIONS, len(questions)))
        turns = [turn for question in questions for turn in _turns(question)]
        turns[0]["value"] = f"<image>\n{turns[0]['value']}"
        return {"id": f"{self.name}-{index}", "image": picture, "conversations": turns}


def held_out_scenes(length: int, fonts: Sequence[str] = TEST_FONTS) -> Iterator[tuple[Image.Image, list[Question]]]:
    """Pictures and questions of seeds and, unless said otherwise, a font that training never sees."""
    for index in range(length):
        made = scene(f"test {index}", fonts)
        yield made.picture, made.questions


def held_out_easy_vqa() -> Iterator[tuple[Image.Image, list[Question]]]:
    """The whole test split of easy-vqa: 1,000 pictures, 9,673 questions."""
    for path, questions in easy_vqa_pictures("test").values():
        yield Image.open(path).convert("RGB"), questions


@cache
def easy_vqa_pictures(split: str) -> dict[int, tuple[str, list[Question]]]:
    """(path of the picture, its questions) by number, of the split "train" or "test"."""
    get: dict[str, tuple[Callable, Callable]] = {
        "train": (easy_vqa.get_train_questions, easy_vqa.get_train_image_paths),
        "test": (easy_vqa.get_test_questions, easy_vqa.get_test_image_paths),
    }
    questions, paths = (function() for function in get[split])
    by_picture = defaultdict(list)
    for text, answer, number in zip(*questions):
        by_picture[number].append(Question(EASY_VQA, text, answer))
    return {number: (paths[number], asked) for number, asked in sorted(by_picture.items())}


def corpus() -> Iterator[str]:
    """Texts to train the tokenizer on."""
    for record in (Records(4000, "tokenizer")[index] for index in range(4000)):
        yield from (turn["value"] for turn in record["conversations"])


def _turns(question: Question) -> list[dict[str, str]]:
    return [{"from": "human", "value": question.text}, {"from": "gpt", "value": question.answer}]
