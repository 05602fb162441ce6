"""What m3-tiny is trained and tested on: generated scenes, and easy-vqa with its own split."""

import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import easy_vqa
from PIL import Image

from .scenes import COLORS, SHAPES, TEST_FONTS, TRAIN_FONTS, Question, repeated_code_scene, scene


EASY_VQA = "easy-vqa"
MOST_QUESTIONS = 8  # asked of a training picture in one conversation
# How easy-vqa asks whether something is there, and whether it is not.
IS_THERE = ("is there a {}?", "is there a {} in the image?", "is a {} present?", "does the image contain a {}?")
IS_THERE_NOT = (
    "is there not a {}?",
    "is there not a {} in the image?",
    "is no {} present?",
    "does the image not contain a {}?",
)


class Records(Sequence):
    """Conversations about pictures, in LLaVA's format but with the picture itself, of scenes and of easy-vqa.

    Record `index` is always the same; the order of its questions too.

    Args:
        length: how many.
        name: another name is another series of scenes.
        yes_or_no_first: in which share of the conversations questions to answer by yes or no come first: after the others
            they can be answered by what was said before, without the picture. Either answer is as likely as the other.
        only: where given, the kinds of questions about a scene.
        repeated_codes: the share of scenes that are one code all over, to be read.
        easy_vqa_every: every how many records one is of easy-vqa.
    """

    def __init__(
        self,
        length: int,
        name: str = "train",
        yes_or_no_first: float = 0.0,
        only: Sequence[str] = (),
        repeated_codes: float = 0.0,
        easy_vqa_every: int = 3,
    ):
        self.length, self.name, self.easy_vqa_every = length, name, easy_vqa_every
        self.yes_or_no_first, self.only, self.repeated_codes = yes_or_no_first, only, repeated_codes

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.length:
            raise IndexError(index)
        rng = random.Random(f"{self.name} {index}")
        if index % self.easy_vqa_every == 0:
            pictures = easy_vqa_pictures("train")
            picture, questions = pictures[sorted(pictures)[rng.randrange(len(pictures))]]
            picture = Image.open(picture).convert("RGB")
        elif rng.random() < self.repeated_codes:
            made = repeated_code_scene(f"{self.name} {index}")
            picture, questions = made.picture, made.questions
        else:
            made = scene(f"{self.name} {index}", TRAIN_FONTS)
            picture, questions = made.picture, made.questions + _yes_or_no_questions(made.questions, rng)
        if self.only:
            questions = [question for question in questions if question.kind in (EASY_VQA, *self.only)]
        questions = _as_often_yes_as_no(questions, rng)
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


def _yes_or_no_questions(questions: list[Question], rng: random.Random) -> list[Question]:
    """Whether a large shape, and a large shape of some colour, is there or is not, as easy-vqa asks it."""
    answers = {question.kind: question.answer for question in questions}
    result = []
    for there, names, what in ((answers["shape"], SHAPES, "large {}"), (answers["color"], COLORS, "large {} shape")):
        asked = rng.choice((there, rng.choice([name for name in names if name != there])))
        negated = rng.random() < 0.5
        text = rng.choice(IS_THERE_NOT if negated else IS_THERE).format(what.format(asked))
        result.append(Question("presence", text, "yes" if (asked == there) != negated else "no"))
    return result


def _as_often_yes_as_no(questions: list[Question], rng: random.Random) -> list[Question]:
    """Leaves out some that are answered by yes or no: those asked would mostly be "no", which is then learned first."""
    left: dict[str, list[Question]] = {"yes": [], "no": []}
    result = []
    for question in rng.sample(questions, len(questions)):
        left.get(question.answer, result).append(question)
    while some := left[rng.choice(("yes", "no"))]:
        result.append(some.pop())
    return result or questions


def _is_yes_or_no(question: Question) -> bool:
    return question.answer in ("yes", "no")


def _turns(question: Question) -> list[dict[str, str]]:
    return [{"from": "human", "value": question.text}, {"from": "gpt", "value": question.answer}]
