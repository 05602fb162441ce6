"""One's own questions, for who has no task file: a JSONL of records with `question`, `answer` and `image` or `video`.

`answer` may be a list of all that are right, `image` and `video` lists too, or missing; `id`, `subset` and `kind` are kept
where given.
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .answering import Chat
from .scores import METRICS, anls, contains, exact_match


__all__ = ["METRICS", "Question", "anls", "contains", "exact_match", "fingerprint_of", "read_questions"]


@dataclass(frozen=True)
class Question:
    id: str
    text: str
    answers: list[str]
    pictures: list[Path]
    subset: str | None
    kind: str | None
    videos: list[Path] = field(default_factory=list)

    def chat(self) -> Chat:
        content: list[dict[str, Any]] = [{"type": "image", "image": picture} for picture in self.pictures]
        content += [{"type": "video", "video": video} for video in self.videos]
        return [{"role": "user", "content": [*content, {"type": "text", "text": self.text}]}]


def read_questions(file: Path, image_folder: Path | None = None, limit: int | None = None) -> list[Question]:
    """The records of a file, all of them checked, pictures too, before anything is asked.

    Raises:
        ValueError: for a line that is no such record, a picture that is missing, and a file without records; lines are named by
            their number.
    """
    if not file.is_file():
        raise ValueError(f"There is no file {file}.")
    folder, questions = image_folder or file.parent, []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if limit is not None and len(questions) == limit:
            break
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}, line {number} is not JSON: {error}.") from error
        if not isinstance(record, dict) or not isinstance(record.get("question"), str):
            raise ValueError(
                f'{file}, line {number} must be an object with a "question", an "answer" and an "image" or a "video".'
            )
        answers = record.get("answer")
        answers = answers if isinstance(answers, list) else [answers]
        if not answers or not all(isinstance(answer, (str, int, float)) for answer in answers):
            raise ValueError(f'{file}, line {number} has no "answer": give a text, or a list of all that are right.')
        images, videos = (_files(record.get(kind), folder) for kind in ("image", "video"))
        for path in [*images, *videos]:
            if not path.is_file():
                what = "video" if path in videos else "picture"
                raise ValueError(f"{file}, line {number}: there is no {what} {path}.")
        labels = [None if record.get(name) is None else str(record[name]) for name in ("subset", "kind")]
        name = str(record.get("id", number))
        questions.append(
            Question(name, record["question"], [str(answer) for answer in answers], images, *labels, videos)
        )
    if not questions:
        raise ValueError(f"{file} has no records.")
    names = [question.id for question in questions]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{file} has the id {twice!r} twice.")
    return questions


def _files(names: Any, folder: Path) -> list[Path]:
    return [folder / name for name in (names if isinstance(names, list) else [names] if names else [])]


def fingerprint_of(questions: list[Question]) -> str:
    digest = hashlib.sha256()
    for question in questions:
        digest.update(repr((question.id, question.text, question.answers)).encode())
        for picture in [*question.pictures, *question.videos]:
            digest.update(picture.read_bytes())
    return digest.hexdigest()
