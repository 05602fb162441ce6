"""A task for lmms-eval from questions about one's own video files: `python -m m3_evaluation.video_tasks FOLDER --data FILE --videos DIR`.

FILE is a CSV with the columns that the authors' video sets have (`video_name`, `question`, `answer`, and `a0` to `a4` where there
are options), or a JSONL with `video`, `question`, `answer` and, where there are any, `options`. lmms-eval's own video tasks look
for their files in the Hub's cache; these name the files where they are.
"""

import csv
import re
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from m3_conversion.json_files import read_json_lines
from m3_conversion.whole_files import replacing, write_text


TEMPLATES = Path(__file__).parent / "tasks"
SUFFIXES = ("", ".mp4", ".webm", ".mkv", ".mov", ".avi", ".gif")
LETTERS = "ABCDEFGHIJ"


def make(folder: Path, data: Path, videos: Path, name: str) -> int:
    """Writes the task into a folder; returns how many questions it has.

    Raises:
        ValueError: for a row without what it needs, or whose video is not there; rows are named by their number.
    """
    if not re.fullmatch(r"\w+", name):
        raise ValueError(f"--name {name!r}: give letters, digits and underscores.")
    records = [_record(row, f"{data}, row {number}", videos) for number, row in enumerate(_rows(data), start=1)]
    if not records:
        raise ValueError(f"{data} has no questions.")
    import datasets

    file = folder / f"{name}.parquet"
    with replacing(file) as part:
        datasets.Dataset.from_list(records).to_parquet(str(part))
    shutil.copy(TEMPLATES / "m3_video_functions.py", folder)
    template = (TEMPLATES / "m3_video.yaml").read_text(encoding="utf-8")
    write_text(folder / f"{name}.yaml", template.replace("NAME", name).replace("DATA_FILE", str(file.resolve())))
    return len(records)


def _rows(data: Path) -> list[Any]:
    if data.suffix.lower() != ".csv":
        return [row for _, row in read_json_lines(data)]
    if not data.is_file():
        raise ValueError(f"There is no file {data}.")
    with data.open(encoding="utf-8-sig", newline="") as lines:
        rows = csv.DictReader(lines)
        try:
            return list(rows)
        except UnicodeDecodeError as error:
            raise ValueError(f"{data} is not in UTF-8: {error}. Store it so.") from error
        except csv.Error as error:
            raise ValueError(f"{data}, line {rows.reader.line_num} is not CSV: {error}.") from error


def _record(row: Any, place: str, videos: Path) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f'{place} must be an object with a "video", a "question" and an "answer".')
    found = {
        "video": row.get("video") or row.get("video_name"),
        **{key: row.get(key) for key in ("question", "answer")},
    }
    missing = [key for key, value in found.items() if value in (None, "")]
    if missing:
        raise ValueError(f"{place} has no {' and no '.join(missing)}.")
    options = row.get("options") or [row[key] for key in (f"a{n}" for n in range(10)) if row.get(key) not in (None, "")]
    paths = [videos / f"{found['video']}{suffix}" for suffix in SUFFIXES]
    file = next((path for path in paths if path.is_file()), None)
    if file is None:
        raise ValueError(f"{place}: there is no video {paths[0]}, nor with {', '.join(SUFFIXES[1:])}.")
    answer = _letter(str(found["answer"]), options, place) if options else str(found["answer"])
    return {"video": str(file.resolve()), "question": str(found["question"]), "answer": answer, "options": options}


def _letter(answer: str, options: list[str], place: str) -> str:
    """The letter of the right option, which sets give as that, as its number from 0 or as the option itself."""
    if answer in options:
        return LETTERS[options.index(answer)]
    if answer.isdecimal() and int(answer) < len(options):
        return LETTERS[int(answer)]
    if answer.upper() in LETTERS[: len(options)]:
        return answer.upper()
    raise ValueError(f"{place}: the answer {answer!r} is none of {options}, nor their number or letter.")


def main(
    folder: Annotated[Path, typer.Argument(help="Where the task file goes.")],
    data: Annotated[Path, typer.Option(help="The questions, a CSV or a JSONL.")],
    videos: Annotated[Path, typer.Option(help="Where the videos are.")],
    name: Annotated[str | None, typer.Option(help="Of the task. The file's if left out.")] = None,
) -> None:
    """Makes a task about videos."""
    name = name or data.stem.lower()
    try:
        count = make(folder, data, videos, name)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    print(f"{count} questions: m3-eval DIR --tasks {name} --include_path {folder} --num_frames 6 --output RUN")


if __name__ == "__main__":
    typer.run(main)
