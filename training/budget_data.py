"""Labelled questions for `m3-budget`, from LLaVA's data files and from those of `m3-eval --data`."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m3_evaluation.own_data import is_missing, read_questions
from modeling_m3.questions import check_question

from .conversations import IMAGE_MARK
from .data import read_records


@dataclass
class AskedPictures:
    """Questions about the same pictures; each is asked alone.

    Attributes:
        pictures: as the image processor takes them.
        questions: texts, with a mark for each picture where the pictures do not simply come first.
        answers: what counts as right, for each question.
        kinds: of each question; "" where none is given.
        group: which pictures these are; questions about the same are not independent.
    """

    pictures: list[Any]
    questions: list[str]
    answers: list[list[str]]
    kinds: list[str]
    group: str


def read_labelled(file: str | Path, image_folder: str | Path | None) -> list[AskedPictures]:
    """The questions of a file, together by picture.

    Args:
        file: LLaVA's JSON or JSONL, in which every turn by human is a question that the next turn answers; or a JSONL of
            `m3-eval --data`. Records may have a "kind": kinds count the same, however many questions they have.
        image_folder: what paths are relative to; the file's own folder by default.

    Raises:
        ValueError: what is wrong, by file and record.
    """
    file = Path(file)
    records = read_records(file)
    folder = file.parent if image_folder is None else Path(image_folder)
    if all("question" in record for record in records):
        return _by_picture(
            [
                AskedPictures(question.pictures, [question.text], [question.answers], [question.kind or ""], "")
                for question in read_questions(file, folder)
            ]
        )
    return _by_picture([_of_record(record, index, file, folder) for index, record in enumerate(records)])


def _of_record(record: dict[str, Any], index: int, file: Path, folder: Path) -> AskedPictures:
    name = f"{file}, record {record.get('id', index)!r}"
    given = record.get("image", record.get("images"))
    given = None if is_missing(given) else given
    pictures = [folder / str(picture) for picture in (given if isinstance(given, list) else [given] if given else [])]
    for picture in pictures:
        if not picture.is_file():
            raise ValueError(f"{name}: there is no picture {picture}.")
    turns = record.get("conversations")
    if not pictures or not isinstance(turns, list) or len(turns) < 2:
        raise ValueError(f"{name} needs an image, and conversations with a question and its answer.")
    texts = [turn.get("value") if isinstance(turn, dict) else None for turn in turns]
    if [turn.get("from") for turn in turns] != ["human", "gpt"] * (len(turns) // 2) or not all(
        isinstance(text, str) for text in texts
    ):
        raise ValueError(f"{name}: turns must be by human and gpt in alternation, each with a value.")
    questions = [" ".join(text.replace(IMAGE_MARK, " ").split()) for text in texts[::2]]
    try:
        list(map(check_question, questions))
    except ValueError as error:
        raise ValueError(f"{name} has an empty question: there is nothing to answer.") from error
    kind = "" if is_missing(record.get("kind")) else str(record["kind"])
    return AskedPictures(pictures, questions, [[answer] for answer in texts[1::2]], [kind] * len(questions), "")


def _by_picture(parts: Sequence[AskedPictures]) -> list[AskedPictures]:
    together: dict[str, AskedPictures] = {}
    for part in parts:
        names = (hashlib.sha256(held).hexdigest() if isinstance(held, bytes) else str(held) for held in part.pictures)
        group = "\n".join(names).replace("\n", "|")
        held = together.setdefault(group, AskedPictures(part.pictures, [], [], [], group))
        held.questions += part.questions
        held.answers += part.answers
        held.kinds += part.kinds
    return list(together.values())
