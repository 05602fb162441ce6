"""One's own questions, for who has no task file: a JSONL of records with `question`, `answer` and `image` or `video`.

`answer` may be a list of all that are right, `image` and `video` lists too, or missing; `id`, `subset` and `kind` are kept
where given. NaN, which tables write for what is missing, is missing here.
"""

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from m3_conversion.json_files import read_json_lines
from m3_conversion.written_numbers import is_missing
from modeling_m3.pictures import open_pictures
from modeling_m3.questions import check_question, is_blank

from .answering import Chat
from .scores import METRICS, anls, contains, exact_match


__all__ = [
    "METRICS",
    "Question",
    "anls",
    "contains",
    "digest_of",
    "exact_match",
    "fingerprint_of",
    "is_missing",
    "read_questions",
]


@dataclass(frozen=True)
class Question:
    """A question and what is right.

    Attributes:
        id: unique in its file; the number of its line where none is given.
        text: what is asked.
        answers: all that are right, one at least.
        pictures: files, or what they hold.
        subset, kind: as the file names them.
        videos: files.
        written: the answers where numbers are as in the file, 36.0: prints of runs on disk are of these.
    """

    id: str
    text: str
    answers: list[str]
    pictures: list[Path | bytes]
    subset: str | None
    kind: str | None
    videos: list[Path] = field(default_factory=list)
    written: list[str] | None = None

    def chat(self) -> Chat:
        content: list[dict[str, Any]] = [{"type": "image", "image": picture} for picture in self.pictures]
        content += [{"type": "video", "video": video} for video in self.videos]
        return [{"role": "user", "content": [*content, {"type": "text", "text": self.text}]}]


def read_questions(
    file: str | Path, image_folder: str | Path | None = None, limit: int | None = None
) -> list[Question]:
    """The records of a file, all of them checked, pictures too, before anything is asked.

    Args:
        file: a JSONL.
        image_folder: what paths of pictures and videos are relative to; the file's own folder by default.
        limit: how many are read, at most.

    Raises:
        ValueError: for a line that is no such record, a picture that is missing, and a file without records; lines are named by
            their number.
    """
    file = Path(file)
    folder = file.parent if image_folder is None else Path(image_folder)
    questions: list[Question] = []
    lines: dict[str, int] = {}
    for number, record in islice(read_json_lines(file), limit):
        question = _question(record, number, folder, f"{file}, line {number}")
        if (first := lines.setdefault(question.id, number)) != number:
            raise ValueError(f"{file} has the id {question.id!r} twice, on lines {first} and {number}.")
        questions.append(question)
    if not questions:
        raise ValueError(f"{file} has no records.")
    return questions


def fingerprint_of(questions: list[Question]) -> str:
    """The print of what is asked and what is right, by which a run that goes on knows its questions."""
    return digest_of(((q.id, q.text, q.written or q.answers), [*q.pictures, *q.videos]) for q in questions)


def digest_of(parts: Iterable[tuple[Any, Iterable[Path | bytes]]]) -> str:
    """64 hexadecimal digits of values, as `repr` writes them, and of the contents that belong to each, or their files."""
    digest = hashlib.sha256()
    for value, contents in parts:
        digest.update(repr(value).encode())
        for content in contents:
            digest.update(content if isinstance(content, bytes) else content.read_bytes())
    return digest.hexdigest()


def _question(record: Any, number: int, folder: Path, where: str) -> Question:
    if not isinstance(record, dict) or not isinstance(record.get("question"), str):
        raise ValueError(f'{where} must be an object with a "question", an "answer" and an "image" or a "video".')
    if is_blank(record["question"]):
        raise ValueError(f'{where} has an empty "question": there is nothing to answer.')
    check_question(record["question"], f'{where}: the "question"')
    given = record.get("answer")
    given = given if isinstance(given, list) else [given]
    if all(map(is_missing, given)):
        raise ValueError(f'{where} has no "answer": give a text, or a list of all that are right.')
    identity, subset, kind = (
        None if is_missing(record.get(name)) else str(record[name]) for name in ("id", "subset", "kind")
    )
    return Question(
        id=str(number) if identity is None else identity,
        text=record["question"],
        answers=[_answer(answer, where) for answer in given],
        pictures=[_picture(name, folder, where) for name in _listed(record.get("image"))],
        subset=subset,
        kind=kind,
        videos=[_file(name, folder, where, "video") for name in _listed(record.get("video"))],
        written=list(map(str, given)),
    )


def _answer(value: Any, where: str) -> str:
    """A right answer as text. A table that lacks some of its whole numbers writes them as 36.0."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool):
        raise ValueError(f'{where} has the answer {str(value).lower()}: give the text that is right, as "yes" or "no".')
    if isinstance(value, (str, int)) or isinstance(value, float) and abs(value) < float("inf"):
        return str(value)
    raise ValueError(f"{where} has the answer {value!r}: give a text, a number, or a list of them.")


def _listed(given: Any) -> list[Any]:
    return given if isinstance(given, list) else [] if is_missing(given) or given == "" else [given]


def _picture(name: Any, folder: Path, where: str) -> Path | bytes:
    if not isinstance(name, str) or not name.startswith("data:"):
        return _file(name, folder, where, "picture")
    try:
        with urlopen(name) as opened:
            content = opened.read()
        open_pictures(content)
    except (ValueError, OSError) as error:
        raise ValueError(f"{where}: {name[:40]!r}... holds no picture: {error}") from error
    return content


def _file(name: Any, folder: Path, where: str, what: str) -> Path:
    if not isinstance(name, str):
        raise ValueError(f"{where}: {name!r} is no {what}: give a path.")
    path = folder / name
    if not os.path.isfile(path):  # unlike the path's own is_file, False for names that no file can have
        raise ValueError(f"{where}: there is no {what} {str(path)[:300]}.")
    return path
