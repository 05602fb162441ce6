"""Validation data: the loss at every scale, of every record once, whoever computes it."""

import json
from pathlib import Path

import pytest
import torch
from conftest import GOLDENS
from test_training_finetune import PICTURES, arguments, evaluations, losses, records
from transformers import AutoModelForImageTextToText, AutoProcessor

from m3_training.data import Collator, LlavaDataset
from m3_training.finetune import main


@pytest.fixture(scope="module")
def evaluated(converted, tmp_path_factory):
    """The settings of a run with validation data, of which one record is bad, and the folder of it in one process."""
    folder = tmp_path_factory.mktemp("evaluated")
    (folder / "data.json").write_text(json.dumps(records(2)))
    bad = {**records(1)[0], "id": "bad", "image": "none.png"}
    longer = [
        {"from": "human", "value": "<image>\nAnd this?"},
        {"from": "gpt", "value": "A thing, and then some more " * 3},
    ]
    held_out = [bad, *records(1, 2), {"id": "longer", "image": PICTURES[1], "conversations": longer}]
    (folder / "held-out.json").write_text(json.dumps(held_out))
    settings = {"data_path": folder / "data.json", "eval_data_path": folder / "held-out.json", "max_steps": 2}
    settings |= {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "learning_rate": 1e-3,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    settings["metric_for_best_model"] = "loss_at_9"
    run = arguments(converted["llava15-m3"], folder / "one", **settings, per_device_eval_batch_size=3)
    assert main(run) == 0
    return settings, folder / "one"


def test_it_is_the_average_over_all_tokens_of_the_good_records(evaluated):
    settings, output = evaluated
    processor = AutoProcessor.from_pretrained(output / "final", backend="pil")
    model = AutoModelForImageTextToText.from_pretrained(output / "final", dtype=torch.float32).eval()
    good = json.loads(Path(settings["eval_data_path"]).read_text())[1:]
    samples = LlavaDataset(good, processor, image_folder=GOLDENS / "images", template="v1")
    sums, tokens = torch.zeros(2), 0
    for index in range(len(samples)):
        batch = Collator(0)([samples[index]])
        supervised = int((batch["labels"] != -100).sum())
        with torch.no_grad():
            sums += supervised * model(**batch, matryoshka_scales=[1, 9]).scale_losses
        tokens += supervised
    at_1, at_9 = (sums / tokens).tolist()
    step, *found = evaluations(output)[-1]
    assert step == 2
    assert found == pytest.approx([(at_1 + at_9) / 2, at_1, at_9], rel=1e-4)


def test_it_follows_the_steps_that_are_asked_for_and_the_last_one(evaluated):
    _, output = evaluated
    steps = [step for step, *_ in evaluations(output)]
    assert steps == [1, 2, 2]
    assert json.loads((output / "trainer_state.json").read_text())["best_metric"] == min(
        row[3] for row in evaluations(output)
    )


def test_it_leaves_training_as_it_is(evaluated, converted, tmp_path):
    settings, output = evaluated
    plain = {name: value for name, value in settings.items() if "eval" not in name and "best" not in name}
    assert main(arguments(converted["llava15-m3"], tmp_path / "out", **plain)) == 0
    names = ("loss", "loss_at_1", "loss_at_9", "grad_norm")
    found, expected = ([[entry[name] for name in names] for entry in losses(o)] for o in (output, tmp_path / "out"))
    assert found == expected


def test_bad_records_are_named_and_counted(evaluated, converted, tmp_path, caplog):
    settings, _ = evaluated
    assert main(arguments(converted["llava15-m3"], tmp_path / "out", **settings)) == 0
    assert "1 of 5 records were skipped: record 0 ('bad')" in caplog.text


def test_a_missing_file_is_named(converted, tmp_path, capsys):
    (tmp_path / "data.json").write_text(json.dumps(records(1)))
    settings = {"data_path": tmp_path / "data.json", "eval_data_path": "none.json"}
    assert main(arguments(converted["llava15-m3"], tmp_path / "out", **settings)) == 1
    assert capsys.readouterr().err.strip().endswith("There is no data file none.json.")
