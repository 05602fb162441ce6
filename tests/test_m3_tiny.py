"""The trained checkpoint that ships with the package, and the recipe that made it."""

import copy
import filecmp
import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import modeling_m3
from m3_training.m3_tiny import recipe, report
from m3_training.m3_tiny.data import Records, held_out_easy_vqa, held_out_scenes
from m3_training.m3_tiny.evaluate import evaluate
from m3_training.m3_tiny.model import new_model
from m3_training.m3_tiny.muon import MuonWithAdamW
from m3_training.m3_tiny.scenes import CHARACTERS, LABELS, TEST_FONTS, TRAIN_FONTS, Question, scene, text_scene
from m3_training.m3_tiny.vision import LabelledScenes, PatchClassifier
from m3_training.m3_tiny.vision_training import Round


CARDS = Path(__file__).parent.parent / "model_cards"


@pytest.fixture(scope="module")
def m3_tiny():
    folder = modeling_m3.default_checkpoint()
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(folder, backend="pil")


def test_folder_is_small_and_whole():
    folder = modeling_m3.default_checkpoint()
    weights = (folder / "model.safetensors").stat().st_size
    assert weights < 12e6 and sum(file.stat().st_size for file in folder.iterdir()) < 12.5e6
    for name in modeling_m3.REMOTE_CODE_FILES:
        assert filecmp.cmp(folder / name, Path(modeling_m3.__file__).with_name(name), shallow=False), name


@pytest.mark.parametrize(
    "scale", [576, pytest.param(36, marks=pytest.mark.slow), pytest.param(9, marks=pytest.mark.slow), 1]
)
def test_answers_questions_that_need_no_detail(m3_tiny, scale):
    model, processor = m3_tiny
    answers = evaluate(model, processor, itertools.islice(held_out_easy_vqa(), 24), [scale])["average"]
    assert answers.correct.mean() > 0.97


@pytest.mark.slow
def test_sees_with_many_tokens_what_it_cannot_with_few(m3_tiny):
    model, processor = m3_tiny
    seen = evaluate(model, processor, held_out_scenes(32), [1, 9, 144, 576])["average"].summary()
    small, code = seen["small shape"]["correct"], seen["code"]["correct"]
    assert small["144"] >= 28 and small["1"] <= 14
    assert code["576"] >= 24 and code["9"] <= 12


def test_answers_as_the_readme_says(m3_tiny):
    model, processor = m3_tiny
    with Image.open(Path(__file__).parent / "fixtures" / "scene.png") as picture:
        questions = [
            Question("code", "What does the code say?", "E419"),
            Question("color", "What color is the large circle?", "orange"),
        ]
        answers = evaluate(model, processor, [(picture.convert("RGB"), questions)], [1, 9, 36, 144, 576])["average"]
    assert answers.correct.tolist() == [[False, False, False, True, True], [True] * 5]


@pytest.mark.slow
def test_counts_what_generate_answers(m3_tiny):
    """`evaluate` packs all questions about a picture and never generates; one by one, `generate` must agree."""
    model, processor = m3_tiny
    tests = list(held_out_scenes(3)) + list(itertools.islice(held_out_easy_vqa(), 1))
    tests.append((tests[0][0], tests[0][1][:1]))  # one question alone
    answers = evaluate(model, processor, tests, [9, 576])["average"]
    generated = []
    for picture, questions in tests:
        for question in questions:
            content = [{"type": "image"}, {"type": "text", "text": question.text}]
            text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
            row = []
            for scale in answers.scales:
                inputs = processor(images=picture, text=text, num_visual_tokens=scale, return_tensors="pt")
                output = model.generate(**inputs, max_new_tokens=12)[0, inputs["input_ids"].shape[1] :]
                row.append(processor.decode(output, skip_special_tokens=True) == question.answer)
            generated.append(row)
    assert answers.correct.tolist() == generated
    assert 0 < np.mean(generated)


def test_results_page_is_made_of_the_counts(tmp_path):
    page = tmp_path / "m3-tiny.md"
    report.write_page(CARDS / "m3-tiny" / "results.json", page)
    assert page.read_text(encoding="utf-8") == (CARDS / "m3-tiny.md").read_text(encoding="utf-8")
    assert {file.name for file in (tmp_path / "m3-tiny").iterdir()} <= {
        file.name for file in (CARDS / "m3-tiny").iterdir()
    }


def test_results_page_counts_exactly():
    entry = {"questions": 4, "correct": {"1": 1, "9": 3}, "oracle": {"correct": 3, "tokens": 20}}
    other = {"questions": 4, "correct": {"1": 4, "9": 4}, "oracle": {"correct": 4, "tokens": 4}}
    counts = report.Counts({"m3-tiny": {"average": {"code": entry, "shape": other}}})
    assert counts.accuracy("m3-tiny", 9, ["code"]) == (75.0, pytest.approx(196 * (0.75 * 0.25 / 4) ** 0.5))
    assert counts.accuracy("m3-tiny", 1, ["code", "shape"])[0] == 62.5
    assert counts.oracle("m3-tiny", "code") == (75.0, 5.0)


def test_test_pictures_are_not_of_the_training_set():
    assert not set(TEST_FONTS) & set(TRAIN_FONTS)
    records = Records(40, "final")
    trained = {records[index]["image"].tobytes() for index in range(40)}
    assert not trained & {picture.tobytes() for picture, _ in held_out_scenes(40)}


@pytest.mark.parametrize("make", [scene, text_scene])
@pytest.mark.parametrize("view", [168, 336])
def test_scenes_are_labelled_where_things_are(make, view):
    """Characters are labelled in order, from left to right, on patches that differ from the background."""
    again = make(3, view=view)
    made = make(3, view=view)
    assert made.picture.tobytes() == again.picture.tobytes() and made.questions == again.questions
    assert made.labels.shape == (view // 14, view // 14, len(LABELS))
    names = [name for name, _ in LABELS]
    for kind, (_, classes) in enumerate(LABELS):
        assert 0 <= made.labels[..., kind].min() and made.labels[..., kind].max() < classes
    characters = made.labels[..., [names.index(f"character {place}") for place in (1, 2, 3, 4)]]
    assert characters.any()
    if make is scene:  # one code, every character of it somewhere, left to right
        code = next(question.answer for question in made.questions if question.kind == "code")
        shown = [set(characters[..., place].ravel().tolist()) - {0} for place in range(4)]
        assert shown == [{CHARACTERS.index(character) + 1} for character in code] + [set()] * (4 - len(code))
        columns = [np.nonzero(characters[..., place])[1].mean() for place in range(len(code))]
        assert columns == sorted(columns)


def test_yes_is_as_often_right_as_no():
    """Of either set: where "no" is right more often, a model learns to say it before it learns to look."""
    records = Records(300, "any", yes_or_no_first=1.0)
    answers = [[turn["value"] for turn in records[index]["conversations"][1::2]] for index in range(300)]
    first = [row[0] for row in answers if row[0] in ("yes", "no")]
    assert len(first) > 200 and abs(first.count("yes") / len(first) - 0.5) < 0.1
    assert Records(1, only=("code",))[0] == Records(1, only=("code",))[0]


def test_vision_tower_is_trained_as_the_model_runs_it(m3_tiny):
    """The first stage embeds patches itself, to place quarter views anywhere; whole views must come out the same."""
    model, processor = m3_tiny
    tower = model.model.vision_tower
    classifier = PatchClassifier(tower).eval()
    sample = LabelledScenes(2, view=336)[1]
    with torch.no_grad():
        logits = classifier(sample["pixel_values"][None], torch.zeros(1, 2, dtype=torch.long))["logits"]
        hidden = tower(sample["pixel_values"][None]).last_hidden_state[:, 1:]
    torch.testing.assert_close(logits, classifier.head(hidden))


def test_untrained_model_is_small():
    processor = AutoProcessor.from_pretrained(modeling_m3.default_checkpoint(), backend="pil")
    model = new_model(processor.tokenizer)
    assert 2e6 < sum(parameter.numel() for parameter in model.parameters()) < 3e6
    assert json.loads(model.config.to_json_string())["visual_token_scales"] == [1, 9, 36, 144, 576]


def test_layers_are_trained_by_muon_and_the_rest_by_adamw():
    """One optimizer does what torch's two do side by side, follows a schedule, and goes on from its state."""
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.Linear(4, 8)]), "head": torch.nn.Linear(8, 3)})
    apart, resumed = copy.deepcopy(model), copy.deepcopy(model)
    matrix, others = apart["layers"][0].weight, [apart["layers"][0].bias, *apart["head"].parameters()]
    reference = [
        torch.optim.Muon([matrix], lr=0.03, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=0.01, weight_decay=0.1),
    ]

    def one(of):
        return MuonWithAdamW(of, [{"params": list(of.parameters()), "lr": 0.01, "weight_decay": 0.1}])

    def steps(of, optimizers, number):
        schedules = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5) for optimizer in optimizers]
        for _ in range(number):
            of["head"](of["layers"][0](torch.ones(2, 4)).relu()).square().sum().backward()
            for step in (*optimizers, *schedules):
                step.step()
            for optimizer in optimizers:
                optimizer.zero_grad()

    optimizer = one(model)
    steps(model, [optimizer], 2)
    steps(apart, reference, 2)
    later = one(resumed)
    resumed.load_state_dict(model.state_dict())
    later.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for of, optimizers in ((model, [optimizer]), (apart, reference), (resumed, [later])):
        steps(of, optimizers, 2)
    for first, second, third in zip(model.parameters(), apart.parameters(), resumed.parameters()):
        torch.testing.assert_close(first, second)
        torch.testing.assert_close(first, third, rtol=0, atol=0)


@pytest.mark.slow
def test_recipe_runs_from_nothing(tmp_path, monkeypatch):
    """With two steps where the recipe has hundreds: what it makes loads, is measured, and is not made twice."""
    short = replace(recipe.RUNS["m3-tiny"], start="untrained", steps=2, batch=2)
    rounds = [
        Round(view=168, batch=2, steps=2, learning_rate=1e-3),
        Round(view=336, batch=2, steps=2, learning_rate=1e-3),
    ]
    few = {"TEST_PICTURES": 2, "ABLATION_TEST_PICTURES": 2}
    for name, value in {"VISION_ROUNDS": rounds, "RUNS": {"m3-tiny": short}, **few}.items():
        monkeypatch.setattr(recipe, name, value)
    monkeypatch.setattr(recipe, "held_out_easy_vqa", lambda: itertools.islice(held_out_easy_vqa(), 1))
    untrained = recipe.prepare(tmp_path)
    final = recipe.train(tmp_path, "m3-tiny")
    assert AutoModelForImageTextToText.from_pretrained(final).config.visual_token_scales == [1, 9, 36, 144, 576]
    assert "lm_head.weight" not in load_file(final / "model.safetensors")  # tied to the embeddings
    counts = recipe.measure(tmp_path, "m3-tiny")
    assert counts["average"]["code"]["questions"] == 2
    times = [path.stat().st_mtime for path in (untrained / "config.json", final / "config.json")]
    assert recipe.prepare(tmp_path) == untrained and recipe.train(tmp_path, "m3-tiny") == final
    assert times == [path.stat().st_mtime for path in (untrained / "config.json", final / "config.json")]
