"""The commands that compare precisions and encodings, and the page of all results."""

import json
import re
from pathlib import Path

import pytest
from typer import Typer
from typer.testing import CliRunner

from benchmarks import evaluation, one_encoding, quantization, quantized_answers, report


def run(command, *arguments):
    app = Typer()
    app.command()(command)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """All three commands, on what is small."""
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:  # here instead of in processes of their own
        patch.setattr(quantization, "in_a_fresh_process", lambda function, *arguments: function(*arguments))
        small = [folder / "checkpoints", "--size", "tiny", "--repeats", 1]
        run(quantization.main, *small, "--output", folder / "quantization.json")
    small = ["--size", "tiny", "--repeats", 1, "--max-new-tokens", 1]
    run(one_encoding.main, *small, "--output", folder / "one_encoding.json")
    small = ["--pictures", 2, "--repeats", 1, "--max-new-tokens", 1]
    run(evaluation.main, *small, "--output", folder / "evaluation.json")
    run(quantized_answers.main, "--pictures", 2, "--output", folder / "quantized_answers.json")
    return folder


@pytest.mark.slow
def test_fewer_bits_are_fewer_bytes(results):
    disk = json.loads((results / "quantization.json").read_text())["disk"]
    assert disk["float32"] == pytest.approx(2 * disk["bfloat16"], rel=0.01)
    assert disk["nf4"] < disk["int8"] < disk["bfloat16"]


@pytest.mark.slow
def test_every_part_of_one_encoding_is_timed(results):
    seconds = json.loads((results / "one_encoding.json").read_text())["seconds"]
    assert [name for name in seconds if "before" in name] == [
        f"answer at {scale}, encoded before" for scale in (1, 9, 36, 144, 576)
    ]
    table = one_encoding.table(
        {
            "size": "tiny",
            "dtype": "float32",
            "new_tokens": 1,
            "seconds": {
                "encoding": [2.0, 1.0, 9.0],
                "answer at 1, encoded before": [1.0],
                "answer at 9, encoded before": [1.0],
                "all five from one encoding": [4.4],
                "all five from pixels": [6.6],
            },
        }
    )
    assert "take 1.10x the sum" in table and "take 1.50x that" in table


@pytest.mark.slow
def test_an_evaluation_at_every_scale_is_compared_with_its_parts(results):
    seconds = json.loads((results / "evaluation.json").read_text())["seconds"]
    assert len(seconds) == 1 + 5 + 2
    times = {"encoding": [2.0, 1.0, 9.0], "answers at 1": [1.0], "answers at 9": [1.0]}
    whole = {"m3-eval at all scales": [4.4], "m3-eval for each scale": [6.6]}
    told = {"pictures": 2, "batch_size": 2, "new_tokens": 1, "repeats": 1, "seconds": times | whole}
    assert "takes 1.10x the sum" in evaluation.table(told) and "takes 1.50x that" in evaluation.table(told)


@pytest.mark.slow
def test_every_precision_answers_the_same_questions(results):
    counts = json.loads((results / "quantized_answers.json").read_text())["counts"]
    assert list(counts) == ["float32", "bfloat16", "int8", "nf4"]
    questions = [{kind: counted["questions"] for kind, counted in kinds.items()} for kinds in counts.values()]
    assert all(asked == questions[0] for asked in questions)
    shape = counts["nf4"]["shape"]
    assert shape == {**shape, "questions": 2} and set(shape["correct"]) == {"1", "9", "36", "144", "576"}


@pytest.mark.slow
def test_one_page_holds_all_results(results):
    run(report.main, results)
    page = (results / "README.md").read_text()
    assert page.count("\n## ") == 4
    assert len(re.findall(r"^\| (float32|bfloat16|int8|nf4) \|", page, re.MULTILINE)) == 8
    (results / "colours.json").write_text("{}")
    with pytest.raises(ValueError, match="colours.json"):
        report.report(results)


def test_the_page_that_is_stored_is_made_of_what_is_stored():
    folder = Path(report.__file__).with_name("results")
    assert report.report(folder) == (folder / "README.md").read_text(encoding="utf-8")
