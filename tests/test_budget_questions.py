"""What `m3-budget` is fitted on: which questions those are, whether they are enough, and how they were asked."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import GOLDENS
from hypothesis import given
from hypothesis import strategies as st

import modeling_m3
from m3_conversion.json_files import write_json
from m3_evaluation.own_data import exact_match, fingerprint_of, read_questions
from m3_evaluation.runs import Run, task_file, write_run
from m3_training import budget
from m3_training.budget import BudgetArguments, _begin
from m3_training.budget import main as m3_budget
from m3_training.budget_data import digest_of_asked, read_labelled
from m3_training.budget_fit import LEAST, LEAST_PICTURES, WIDEST, check_labelled, check_numbers
from m3_training.budget_samples import Samples, ask, samples_of_run


TINY = modeling_m3.default_checkpoint()
PICTURES = sorted((GOLDENS / "images").glob("*.png"))[:3]


def answered(pictures, each=1, right=0.5, seed=0):
    """Questions of which the finest scale answers all right, and the coarsest a share; those about a picture alike."""
    first = (np.random.default_rng(seed).random(pictures) < right).astype(np.float32).repeat(each)
    count = len(first)
    return Samples(
        scales=np.array([9, 576]),
        scores=np.stack([first, np.ones(count, dtype=np.float32)], axis=1),
        tokens=np.tile([9, 576], (count, 1)),
        signals=np.zeros((count, 2, 4), dtype=np.float16),
        confidences=np.zeros((count, 2, 6), dtype=np.float32),
        kinds=np.array([""] * count),
        groups=np.arange(pictures).repeat(each).astype(str),
    )


def test_enough_is_judged_by_pictures():
    check_labelled(answered(600), start=9)
    with pytest.raises(
        ValueError, match=r"600 questions about 75 pictures tell .* to 11\.\d points: at least 3\d\d pictures"
    ):
        check_labelled(answered(75, each=8), start=9)
    check_labelled(answered(500, each=8), start=9)
    with pytest.raises(ValueError, match="none needs detail"):
        check_labelled(answered(600, right=1), start=9)


@given(each=st.integers(1, 6), pictures=st.integers(LEAST, 2 * LEAST), right=st.floats(0.05, 0.9))
def test_the_same_question_again_about_a_picture_tells_nothing_more(each, pictures, right):
    once, again = answered(pictures, right=right), answered(pictures, each, right)
    difference = once.scores[:, 1] - once.scores[:, 0]
    width = (
        1.96 * difference.std() / np.sqrt(pictures)
    )  # all is right at the finest, and each picture is asked about once
    for samples in (once, again):
        if width > WIDEST:
            with pytest.raises(ValueError, match=rf"tell .* to {100 * width:.1f} points"):
                check_labelled(samples, start=9)
        else:
            check_labelled(samples, start=9)


@given(questions=st.integers(0, 2 * LEAST), pictures=st.integers(0, 2 * LEAST_PICTURES))
def test_too_few_is_said_with_both_numbers(questions, pictures):
    if questions >= LEAST and pictures >= LEAST_PICTURES:
        check_numbers(questions, pictures)
        return
    with pytest.raises(
        ValueError, match=f"^{questions} question.s. about {pictures} picture.s. are too few .* 500 .* 50 "
    ):
        check_numbers(questions, pictures)


def written(folder, pictures=PICTURES, kind="a", **changed):
    """A file of two questions about each picture, beside copies of them."""
    folder.mkdir(parents=True)
    records = []
    for index, picture in enumerate(pictures):
        shutil.copyfile(picture, folder / f"{index}.png")
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Red"}] * 2
        records.append({"id": index, "image": f"{index}.png", "kind": kind, "conversations": turns, **changed})
    (folder / "data.json").write_text(json.dumps(records))
    return folder / "data.json"


@pytest.mark.parametrize("pictures", [1, 30])
def test_too_few_is_said_before_anything_is_loaded_or_asked(pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(modeling_m3, "load", None)
    data = written(tmp_path / "data", PICTURES[:1] * pictures)
    options = ["--model_name_or_path", TINY, "--data_path", data, "--output_dir", tmp_path / "out"]
    assert m3_budget([*map(str, options)]) == 1
    error = capsys.readouterr().err  # copies of a picture are one
    assert (
        error.startswith(f"m3-budget: {2 * pictures} question(s) about 1 picture(s) are too few")
        and error.count("\n") == 1
    )
    assert not (tmp_path / "out").exists()


def begin(data, output, image_folder=None, **facts):
    asked = read_labelled(data, image_folder)
    _begin(output, BudgetArguments("m", str(data), str(output)), {"data": digest_of_asked(asked), **facts})


def test_pictures_are_known_by_what_they_hold(tmp_path):
    data, out = written(tmp_path / "data"), tmp_path / "out"
    begin(data, out)
    shutil.move(tmp_path / "data", tmp_path / "moved")
    moved = tmp_path / "moved" / "data.json"
    begin(moved, out)
    begin(moved, out, tmp_path / "moved")
    other = written(tmp_path / "other", PICTURES[::-1])
    for changed in (other, written(tmp_path / "kind", kind="b"), written(tmp_path / "fewer", PICTURES[:2])):
        with pytest.raises(ValueError, match=f"--output_dir {out} holds answers of another data: give another folder"):
            begin(changed, out)
    with pytest.raises(ValueError, match="holds answers of another data"):
        begin(moved, out, other.parent)
    shutil.copyfile(PICTURES[1], tmp_path / "moved" / "0.png")  # in place
    with pytest.raises(ValueError, match="holds answers of another data"):
        begin(moved, out)


@pytest.mark.parametrize(("content", "message"), [
    ("[]", "holds answers of another format"), ('{"format": 2}', "holds answers of another format"), ("{", r"asked\.json is not valid JSON"),
])  # fmt: skip
def test_what_was_asked_before_may_be_anything(content, message, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "asked.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        begin(written(tmp_path / "data"), tmp_path / "out")
    assert (tmp_path / "out" / "asked.json").read_text() == content


def test_another_precision_is_another_set_of_answers(tmp_path):
    data = written(tmp_path / "data")
    begin(data, tmp_path / "out", dtype="float32", quantize=None)
    for name, facts in (
        ("dtype", {"dtype": "bfloat16", "quantize": None}),
        ("quantize", {"dtype": "float32", "quantize": "nf4"}),
    ):
        with pytest.raises(ValueError, match=f"holds answers of another {name}"):
            begin(data, tmp_path / "out", **facts)


def test_fingerprints_of_runs_on_disk_are_what_they_were(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"question": "Wo?", "answer": ["\\u2028", "b"], "image": "x", "id": "1"}\n')
    (tmp_path / "x").write_bytes(b"picture")
    found = fingerprint_of(read_questions(tmp_path / "a.jsonl"))
    assert found == "bca0fd466ee910a7bc5757e6e3fbfef39fe2aef0f648f21720e915e3aa764874"


def test_a_question_without_a_picture_is_refused_by_its_name(tmp_path):
    for name in ("x", "y"):
        (tmp_path / name).write_bytes(b"")
    for record in ({}, {"video": "x"}, {"video": "x", "image": "y"}):
        (tmp_path / "a.jsonl").write_text(json.dumps({"question": "Q", "answer": "A", "id": "first", **record}))
        with pytest.raises(ValueError, match=r"a\.jsonl, record 'first' needs an image, and no video"):
            read_labelled(tmp_path / "a.jsonl", None)


@pytest.mark.parametrize(("given", "has_gpu", "expected"), [
    ([], True, {"device_map": "cuda", "dtype": None, "quantize": None}),
    ([], False, {"device_map": "cpu", "dtype": None, "quantize": None}),
    (["--device_map", "auto", "--dtype", "bfloat16"], True, {"device_map": "auto", "dtype": "bfloat16", "quantize": None}),
    (["--quantize", "nf4", "--attn_implementation", "eager"], False,
     {"device_map": "cpu", "dtype": None, "quantize": "nf4", "attn_implementation": "eager"}),
])  # fmt: skip
def test_it_asks_where_and_how_it_is_told(given, has_gpu, expected, tmp_path, monkeypatch, capsys):
    def load(folder, **kwargs):
        raise ValueError(f"loaded with {kwargs}")

    monkeypatch.setattr(modeling_m3, "load", load)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(budget, "check_numbers", lambda *_: None)
    options = [
        "--model_name_or_path",
        TINY,
        "--data_path",
        written(tmp_path / "data"),
        "--output_dir",
        tmp_path / "out",
    ]
    assert m3_budget([*map(str, options), *given]) == 1
    said = eval(capsys.readouterr().err.split("loaded with ")[1])
    assert said == expected


SETTINGS = {
    "dtype": "float32",
    "quantize": None,
    "image_grid_pinpoints": None,
    "image_backend": "pil",
    "visual_token_sampling": "average",
}


@pytest.mark.parametrize(("name", "other"), [
    ("dtype", "bfloat16"), ("quantize", "nf4"), ("image_grid_pinpoints", [[336, 672]]), ("image_backend", "torchvision"),
    ("visual_token_sampling", "spatial"),
])  # fmt: skip
def test_a_run_that_was_asked_otherwise_is_refused(name, other, tmp_path):
    config = {"image_grid_pinpoints": [[672, 672]]}
    write_json(task_file(tmp_path, "t"), {})
    write_run(tmp_path, Run("m", "f", config, [1, 9], ["t"], {**SETTINGS, name: other}, {}))
    with pytest.raises(ValueError) as refused:
        samples_of_run(tmp_path, [1, 9], "f", settings=SETTINGS)
    assert f"is a run with {name} {other}, but this checkpoint is asked with {name} {SETTINGS[name]}" in str(
        refused.value
    )
    assert (f"--{name} {other}" in str(refused.value)) == (name in ("dtype", "quantize"))
    for taken in ({}, {"image_grid_pinpoints": [[672, 672]]}):  # the checkpoint's own
        write_run(tmp_path, Run("m", "f", config, [1, 9], ["t"], {**SETTINGS, **taken}, {}))
        with pytest.raises(ValueError, match="keeps no signals of t"):  # which are looked for next
            samples_of_run(tmp_path, [1, 9], "f", settings=SETTINGS)


def test_answers_are_the_same_whatever_order_scales_are_stored_in(tmp_path):
    [group, *_] = read_labelled(written(tmp_path / "data"), None)
    found = []
    for index, scales in enumerate([[1, 9, 36], [36, 1, 9]]):
        folder = shutil.copytree(TINY, tmp_path / str(index))
        for name in ("config.json", "processor_config.json"):
            stored = json.loads((folder / name).read_text())
            (folder / name).write_text(json.dumps({**stored, "visual_token_scales": scales}))
        model, processor = modeling_m3.load(folder, dtype="float32")
        found.append(ask(model.eval(), processor, group, exact_match, 2))
    for one, other in zip(*(vars(samples).values() for samples in found)):
        assert np.array_equal(one, other)
    assert found[0].tokens.tolist() == [[1, 9, 36]] * 2
    model.generation_config.eos_token_id = None
    assert (
        ask(model, processor, group, exact_match, 2).confidences[:, :, 5] == 2
    ).all()  # tokens, all that there may be
