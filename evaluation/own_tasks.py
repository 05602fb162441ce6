"""Two tasks that need no network: `python -m m3_evaluation.own_tasks FOLDER`, then lmms-eval's `--include_path FOLDER`.

`m3_easy_vqa` is the test split that the package easy-vqa brings; `m3_scenes` are generated pictures of the kinds that m3-tiny is
made for. Both are ordinary task files on a parquet of pictures, and want the extra `train`, which draws them.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from filelock import FileLock

from m3_conversion.whole_files import replacing, write_text
from modeling_m3.cache import cache_folder


TEMPLATES = Path(__file__).parent / "tasks"
PICTURES = 1000  # generated; easy-vqa has as many


def make(folder: Path, pictures: int = PICTURES) -> None:
    """Writes both tasks into a folder, with all pictures of easy-vqa's test split, or the first ones, and as many scenes."""
    import datasets

    folder.mkdir(parents=True, exist_ok=True)
    features = datasets.Features(
        {name: datasets.Value("string") for name in ("question", "answer", "kind")} | {"image": datasets.Image()}
    )
    for name in ("m3_easy_vqa", "m3_scenes"):
        with _scratch(folder / ".scratch") as scratch:
            records = datasets.Dataset.from_generator(
                _records,
                features=features,
                cache_dir=str(scratch),
                gen_kwargs={"name": name, "pictures": pictures},
                split=datasets.Split.TEST,
            )
            file = folder / f"{name}.parquet"
            with replacing(file) as part:
                records.to_parquet(str(part))
        template = (TEMPLATES / f"{name}.yaml").read_text(encoding="utf-8")
        write_text(folder / f"{name}.yaml", template.replace("DATA_FILE", str(file.resolve())))
    shutil.copy(TEMPLATES / "m3_task_functions.py", folder)


def make_once() -> Path:
    """The folder of both tasks, made where it is not there yet."""
    from modeling_m3 import __version__

    folder = cache_folder() / f"tasks-{__version__}"
    if not folder.is_dir() or any(folder.parent.glob(".tasks-*")):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(".lock")):
            for leftover in folder.parent.glob(".tasks-*"):  # of a process that was killed: we hold the lock
                shutil.rmtree(leftover)
            if not folder.is_dir():
                with _scratch(folder.with_name(f".{folder.name}")) as part:
                    make(part)
                    for file in part.glob("*.yaml"):
                        write_text(file, file.read_text(encoding="utf-8").replace(str(part), str(folder)))
                    os.replace(part, folder)
    return folder


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """An empty folder for a block; what a process that was killed left there goes first."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _records(name: str, pictures: int) -> Iterator[dict[str, Any]]:
    from m3_training.m3_tiny.data import held_out_easy_vqa, held_out_scenes

    made = held_out_easy_vqa() if name == "m3_easy_vqa" else held_out_scenes(pictures)
    for number, (picture, questions) in enumerate(made):
        if number == pictures:
            return
        for question in questions:
            yield {"question": question.text, "answer": question.answer, "kind": question.kind, "image": picture}


def main(
    folder: Annotated[Path, typer.Argument(help="Where the task files and their pictures go.")],
    pictures: Annotated[int, typer.Option(help="Of each task, at most.", min=1)] = PICTURES,
) -> None:
    """Makes the tasks m3_easy_vqa and m3_scenes."""
    make(folder, pictures)
    print(f"made: python -m lmms_eval ... --include_path {folder} --tasks m3_easy_vqa,m3_scenes")


if __name__ == "__main__":
    typer.run(main)
