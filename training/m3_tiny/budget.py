"""The automatic budget of m3-tiny: `python -m m3_training.m3_tiny.budget FOLDER`.

Draws the questions that it is fitted on, fits it by `m3-budget`, and measures it on pictures of other kinds: the test pictures,
other fonts and sizes of text, easy-vqa alone, codes alone; and beside it, other ways to choose.
"""

import random
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer
from PIL import Image
from tqdm import tqdm

import modeling_m3
from m3_conversion.json_files import write_json
from m3_evaluation.own_data import exact_match
from modeling_m3.automatic_budget_m3 import AutomaticBudget

from ..budget import BudgetArguments, fit_budget
from ..budget_data import AskedPictures, read_labelled
from ..budget_fit import predict
from ..budget_report import curve
from ..budget_samples import Samples, ask
from .budget_ablations import (
    Points,
    both_decisions,
    confidence_cascade,
    least_tokens,
    one_decision,
    other_ways,
    without_a_pass,
)
from .data import EASY_VQA, easy_vqa_pictures, held_out_easy_vqa, held_out_scenes
from .scenes import TEST_FONTS, TRAIN_FONTS, Question, scene


SCENES, EASY_VQA_PICTURES = 5500, 250
START = 1  # of 1, 9 and 36, what keeps 99% with the fewest tokens
Pictures = Iterable[tuple[str, Image.Image, list[Question]]]


def fitted_on(scenes: int = SCENES, easy: int = EASY_VQA_PICTURES) -> Iterator[tuple[str, Image.Image, list[Question]]]:
    """Pictures that neither training nor any test has: seeds "budget 0" and on, in training's fonts; easy-vqa's train split."""
    for index in range(scenes):
        made = scene(f"budget {index}", TRAIN_FONTS)
        yield f"budget {index}", made.picture, made.questions
    pictures = easy_vqa_pictures("train")
    names = sorted(pictures)
    random.Random("budget").shuffle(names)
    for name in names[:easy]:
        path, questions = pictures[name]
        yield f"easy-vqa {name}", Image.open(path).convert("RGB"), questions


def write_questions(pictures: Pictures, folder: Path) -> Path:
    """As LLaVA's records, one for each kind of question about a picture; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for name, picture, questions in pictures:
        image = f"{name.replace(' ', '-')}.png"
        picture.save(folder / image)
        for kind in dict.fromkeys(question.kind for question in questions):
            turns = []
            for question in (question for question in questions if question.kind == kind):
                turns += [{"from": "human", "value": question.text}, {"from": "gpt", "value": question.answer}]
            turns[0]["value"] = f"<image>\n{turns[0]['value']}"
            records.append({"id": f"{name} {kind}", "image": image, "kind": kind, "conversations": turns})
    file = folder / "questions.json"
    write_json(file, records)
    return file


def tests(pictures: int) -> dict[str, Pictures]:
    """What the choice is measured on, by name: as many test pictures, and a third of it of each other kind."""

    def named(made: Iterable[tuple[Image.Image, list[Question]]], name: str) -> list[tuple[str, Any, list[Question]]]:
        return [(f"{name} {index}", picture, questions) for index, (picture, questions) in enumerate(made)]

    few = -(-pictures // 3)
    easy = list(islice(held_out_easy_vqa(), -(-pictures * 3 // 20)))
    smaller = ((made.picture, made.questions) for made in map(_in_a_larger_view, range(few)))
    return {
        "test pictures": named(held_out_scenes(pictures), "scene") + named(easy, "easy"),
        "fonts as fitted": named(held_out_scenes(few, TRAIN_FONTS), "scene") + named(easy[: -(-few * 3 // 20)], "easy"),
        "smaller text and things": named(smaller, "scene"),
    }


def _in_a_larger_view(index: int) -> Any:
    """A scene painted for 448 pixels, of which the model sees 336: what is drawn in it is three quarters as large."""
    return scene(f"test {index}", TEST_FONTS, view=448)


def asked_about(pictures: Pictures) -> list[AskedPictures]:
    """As `ask` takes them."""
    return [
        AskedPictures(
            [picture],
            [question.text for question in questions],
            [[question.answer] for question in questions],
            [question.kind for question in questions],
            name,
        )
        for name, picture, questions in pictures
    ]


def measured(model: Any, processor: Any, asked: list[AskedPictures]) -> Samples:
    """The outcomes of all questions."""
    return Samples.joined(
        [ask(model, processor, group, exact_match, 16) for group in tqdm(asked, desc="pictures", mininterval=5)]
    )


def _judged(samples: Samples, choice: AutomaticBudget, others: dict[str, Points]) -> dict[str, Any]:
    """The stored choice's curve, and the fewest tokens at which each way to choose keeps so much."""
    predicted = predict(choice, samples)
    result = curve(samples, predicted, choice)
    full = result["fixed"][-1]["accuracy"]
    ways = {
        "auto": both_decisions(samples, predicted, choice.start),
        "hidden states before the answer alone": one_decision(samples, predicted.before, choice.start),
        "log-probability of the answer alone, finer and finer": confidence_cascade(samples, choice.start),
        **others,
    }
    fewest = {
        way: {str(keep): least_tokens(points, keep * full) for keep in (0.97, 0.99, 1.0)}
        for way, points in ways.items()
    }
    return {**result, "ablations": fewest}


def main(
    folder: Annotated[
        Path, typer.Argument(help="Where pictures, answers and results go; it goes on where it was stopped.")
    ],
    checkpoint: Annotated[Path, typer.Option(help="The choice is stored in it.")] = Path("modeling_m3/m3_tiny"),
    scenes: Annotated[int, typer.Option(help="To fit it on.")] = SCENES,
    pictures: Annotated[int, typer.Option(help="Of each test.")] = 1000,
) -> None:
    """Fits the automatic budget of m3-tiny and measures it."""
    data = folder / "questions" / "questions.json"
    if not data.is_file():
        write_questions(fitted_on(scenes, max(1, EASY_VQA_PICTURES * scenes // SCENES)), data.parent)
    fit_budget(BudgetArguments(str(checkpoint), str(data), str(folder / "fit"), start=START, device_map="cpu"))
    measure(folder, checkpoint, pictures)


def measure(folder: Path, checkpoint: Path, pictures: int) -> dict[str, Any]:
    """Judges the stored choice on every test; writes `automatic_budget.json`, from which the results page is made."""
    model, processor = modeling_m3.load(checkpoint)
    model.eval()
    choice: AutomaticBudget = model.automatic_budget
    asked = {name: asked_about(made) for name, made in tests(pictures).items()}
    found = {}
    for name, groups in asked.items():
        file = folder / f"{name.replace(' ', '-')}.safetensors"
        if not file.is_file():
            measured(model, processor, groups).save(file)
        found[name] = Samples.load(file)
    test = found["test pictures"]
    fitted = Samples.joined([Samples.load(file) for file in sorted((folder / "fit" / "samples").glob("*.safetensors"))])
    data = read_labelled(folder / "questions" / "questions.json", None)
    known = [without_a_pass(model, processor, groups) for groups in (data, asked["test pictures"])]
    others = {"test pictures": other_ways(fitted, known[0], test, known[1])}
    found |= {f"{kind} alone": test.rows(test.kinds == kind) for kind in (EASY_VQA, "code")}
    result = {name: _judged(samples, choice, others.get(name, {})) for name, samples in found.items()}
    write_json(folder / "automatic_budget.json", result)
    return result


if __name__ == "__main__":
    typer.run(main)
