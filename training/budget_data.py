"""Labelled questions for `m3-budget`, from LLaVA's data files and from those of `m3-eval --data`."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m3_evaluation.own_data import digest_of, is_missing, read_questions
from modeling_m3.questions import check_question, is_blank

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
        group: the pictures' name; questions about the same are not independent.
        contents: a digest of what the pictures hold.
    """

    pictures: list[Any]
    questions: list[str]
    answers: list[list[str]]
    kinds: list[str]
    group: str
    contents: str = ""


def read_labelled(file: str | Path, image_folder: str | Path | None) -> list[AskedPictures]:
    """The questions of a file, together by what their pictures hold: copies of a picture are one.

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
        questions = read_questions(file, folder)
        without = next((question.id for question in questions if question.videos or not question.pictures), None)
        if without is not None:
            raise ValueError(
                f"{file}, record {without!r} needs an image, and no video: of videos, give a run of m3-eval --signals."
            )
        parts = [AskedPictures(q.pictures, [q.text], [q.answers], [q.kind or ""], "") for q in questions]
    else:
        parts = [_of_record(record, index, file, folder) for index, record in enumerate(records)]
    return _by_picture(parts, folder)


def digest_of_asked(asked: Sequence[AskedPictures]) -> str:
    """Which questions these are, whatever their pictures are called and wherever they lie."""
    return digest_of(((group.contents, group.questions, group.answers, group.kinds), ()) for group in asked)


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
    if any(map(is_blank, questions)):
        raise ValueError(f"{name} has an empty question: there is nothing to answer.")
    for question in questions:
        check_question(question, f"{name}: a question")
    kind = "" if is_missing(record.get("kind")) else str(record["kind"])
    return AskedPictures(pictures, questions, [[answer] for answer in texts[1::2]], [kind] * len(questions), "")


def _by_picture(parts: Sequence[AskedPictures], folder: Path) -> list[AskedPictures]:
    together: dict[str, AskedPictures] = {}
    contents: dict[tuple[Path | bytes, ...], str] = {}
    for part in parts:
        key = tuple(part.pictures)
        if key not in contents:
            contents[key] = digest_of(((), [picture]) for picture in key)
        names = ("" if isinstance(held, bytes) else str(held).removeprefix(f"{folder}{os.sep}") for held in key)
        group = "|".join(name or contents[key] for name in names).replace("\n", "|")
        held = together.setdefault(contents[key], AskedPictures(part.pictures, [], [], [], group, contents[key]))
        held.questions += part.questions
        held.answers += part.answers
        held.kinds += [" ".join(kind.split()) for kind in part.kinds]
    return list(together.values())
