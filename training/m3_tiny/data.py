"""What m3-tiny is trained and tested on: generated scenes, and easy-vqa with its own split."""

import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import easy_vqa
from PIL import Image

from .scenes import SHAPES, TEST_FONTS, TRAIN_FONTS, Question, scene


EASY_VQA = "easy-vqa"
MOST_QUESTIONS = 8  # asked of a training picture in one conversation


class Records(Sequence):
    """Conversations about pictures, in LLaVA's format but with the picture itself: every fourth is of easy-vqa.

    Record `index` is always the same; the order of its questions too.

    Args:
        length: how many.
        name: another name is another series of scenes.
        yes_or_no_first: in which share of the conversations questions to answer by yes or no come first: after the others
            they can be answered by what was said before, without the picture. If any, a scene has three of them.
        only: where given, a conversation is one question and answer, of one of these kinds for a scene, and by yes or no
            for a picture of easy-vqa. To compare a word with what is seen is hardly ever learned where such answers are a
            small part of long conversations.
    """

    def __init__(self, length: int, name: str = "train", yes_or_no_first: float = 0.0, only: Sequence[str] = ()):
        self.length, self.name = length, name
        self.yes_or_no_first, self.only = yes_or_no_first, only

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
            if self.yes_or_no_first:
                questions += _more_of_presence(questions, rng)
        if self.only:
            questions = [
                rng.choice([asked for asked in questions if asked.kind in self.only or _is_of_easy_vqa(asked)])
            ]
        questions = rng.sample(questions, min(MOST_QUESTIONS, len(questions)))
        if rng.random() < self.yes_or_no_first:
            questions.sort(key=lambda question: not _is_yes_or_no(question))
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


def _more_of_presence(questions: list[Question], rng: random.Random) -> list[Question]:
    """Two more questions whether a shape is there."""
    shape = next(question.answer for question in questions if question.kind == "shape")
    asked = [rng.choice((shape, rng.choice([other for other in SHAPES if other != shape]))) for _ in range(2)]
    return [Question("presence", f"Is there a large {name}?", "yes" if name == shape else "no") for name in asked]


def _is_of_easy_vqa(question: Question) -> bool:
    return question.kind == EASY_VQA and _is_yes_or_no(question)


def _is_yes_or_no(question: Question) -> bool:
    return question.answer in ("yes", "no")


def _turns(question: Question) -> list[dict[str, str]]:
    return [{"from": "human", "value": question.text}, {"from": "gpt", "value": question.answer}]
