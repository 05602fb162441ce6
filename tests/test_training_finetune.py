"""Whole runs of a tiny checkpoint: the original's losses, resuming, two processes, the final folder."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import GOLDENS, golden
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback

from m3_conversion.convert import convert
from m3_training.arguments import CONFIGS, parse
from m3_training.finetune import finetune, main


PICTURES = ("img0_336x336.png", "img3_1000x300.png", "img5_97x53.png")


def records(num_images, num_texts=0):
    talk = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A thing, number 0."}]
    text = [{"from": "human", "value": "Name a fruit."}, {"from": "gpt", "value": "An apple, or 0 pears."}]
    numbered = [
        [{**turn, "value": turn["value"].replace("0", str(index))} for turn in (talk if index < num_images else text)]
        for index in range(num_images + num_texts)
    ]
    return [
        {"id": index, "conversations": turns} | ({"image": PICTURES[index % 3]} if index < num_images else {})
        for index, turns in enumerate(numbered)
    ]


def arguments(checkpoint, output, *more, **settings):
    settings = {
        "model_name_or_path": checkpoint,
        "output_dir": output,
        "image_folder": GOLDENS / "images",
        "template": "v1",
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "matryoshka_scales": "1 9",
        **settings,
    }
    return [word for name, value in settings.items() for word in (f"--{name}", *str(value).split())] + list(more)


def losses(output):
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "loss" in entry]


def evaluations(output):
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    names = ("step", "eval_loss", "eval_loss_at_1", "eval_loss_at_9")
    return [[entry[name] for name in names] for entry in history if "eval_loss" in entry]


class Watch(TrainerCallback):
    """Keeps the model of a run, and fails after a step, as a killed run would."""

    def __init__(self, fail_after=None):
        self.fail_after = fail_after

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.model = model

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.fail_after:
            raise KeyboardInterrupt


def test_four_steps_have_the_originals_losses(converted, tmp_path):
    case = golden("train.llava15-m3")["cases"][0]
    setup = case["adamw_setup"]
    run = arguments(
        converted["llava15-m3"],
        tmp_path / "out",
        matryoshka_scales=" ".join(map(str, case["scales"])),
        learning_rate=setup["lr"],
        projector_learning_rate=setup["mm_projector_lr"],
        vision_tower_learning_rate=setup["mm_vision_tower_lr"],
        weight_decay=setup["weight_decay"],
        lr_scheduler_type="constant",
        max_grad_norm=0,
        max_steps=4,
    )
    finetune(*parse(run), records=case["samples"])
    logged = losses(tmp_path / "out")
    # Our vocabulary has rows for new tokens, which enter the softmax: 0.001 of loss.
    assert [entry["loss"] for entry in logged] == pytest.approx(case["adamw_losses_no_grad_removed"], abs=3e-3)
    for scale in case["per_scale"]:
        assert logged[0][f"loss_at_{scale['scale']}"] == pytest.approx(scale["loss"], abs=2e-3)


@pytest.mark.slow
def test_a_resumed_run_has_the_losses_of_an_unbroken_one(converted, tmp_path):
    data = records(4, 2)
    settings = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 2, "scale_choice": "random", "lora_r": 4}

    def run(name, watch):
        parsed = parse(arguments(converted["llava15-m3"], tmp_path / name, "--lora", **settings))
        return finetune(*parsed, records=data, callbacks=[watch])

    unbroken = Watch()
    final = run("unbroken", unbroken)
    with pytest.raises(KeyboardInterrupt):  # three steps per epoch: it goes on from the middle of the second
        run("resumed", Watch(fail_after=5))
    assert not (tmp_path / "resumed" / "final").exists()
    (tmp_path / "resumed" / "checkpoint-6").mkdir()  # one whose writing was interrupted
    run("resumed", Watch())
    expected, found = losses(tmp_path / "unbroken"), losses(tmp_path / "resumed")
    assert len(expected) == 6 and found == expected
    assert {name for entry in expected for name in entry if name.startswith("loss_at")} == {"loss_at_1", "loss_at_9"}
    assert_same_model(unbroken.model, final)  # LoRA is merged


@pytest.mark.slow
def test_a_resumed_run_counts_the_bad_records_of_before(converted, tmp_path, caplog):
    data = records(4, 2)
    data[1]["image"] = "none.png"
    data[5]["conversations"] = [{"from": "human", "value": "Nothing?"}]
    settings = {"num_train_epochs": 1, "save_strategy": "steps", "save_steps": 1}

    def run(name, *callbacks):
        caplog.clear()
        finetune(
            *parse(arguments(converted["llava15-m3"], tmp_path / name, **settings)), records=data, callbacks=callbacks
        )
        return [line for line in caplog.messages if " of 6 records were " in line]

    expected = run("unbroken")
    assert len(expected) == 2
    for seen in range(1, 3):
        with pytest.raises(KeyboardInterrupt):
            run(f"after-{seen}", Watch(fail_after=seen + 1))
        assert run(f"after-{seen}") == expected


def test_a_quantized_checkpoint_is_refused(converted, tmp_path, capsys):
    convert(GOLDENS / "llava15-m3", tmp_path / "nf4", quantize="nf4")
    (tmp_path / "data.json").write_text(json.dumps(records(1)))
    for more in ((), ("--lora",)):
        assert main(arguments(tmp_path / "nf4", tmp_path / "out", *more, data_path=tmp_path / "data.json")) == 1
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert "is stored in 4 or 8 bits, which m3-train does not train" in line


def assert_same_model(model, folder):
    saved = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([[1, 5, 9, 400]])
    with torch.no_grad():
        torch.testing.assert_close(
            saved(input_ids=ids).logits, model.eval()(input_ids=ids).logits, rtol=1e-3, atol=1e-3
        )
    assert {name for name, _ in saved.named_parameters()} == {
        name.replace(".base_layer", "") for name, _ in model.named_parameters() if "lora_" not in name
    }


@pytest.fixture(scope="module")
def anyres_run(converted, tmp_path_factory):
    """A run on tiles and text, stored in bfloat16 as its checkpoint is, of which only CLIP is trained."""
    folder = tmp_path_factory.mktemp("anyres")
    source = folder / "source-m3"
    shutil.copytree(converted["llava-next-m3"], source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    card = (source / "README.md").read_text().replace("license: other", "license: llama2")
    (source / "README.md").write_text(card)
    broken = {"id": "broken one", "image": "none.png", "conversations": records(1)[0]["conversations"]}
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, [broken, *records(1, 1)])))
    more = ("--train", "clip", "--gradient_checkpointing", "--scale_choice", "fixed")
    settings = {
        "data_path": folder / "data.jsonl",
        "model_max_length": 4096,
        "matryoshka_scales": 9,
        "dataloader_num_workers": 1,
        "num_train_epochs": 1,
        "learning_rate": 1e-2,
    }
    return source, arguments(source, folder / "my-m3", *more, **settings)


def test_the_final_folder_is_as_conversion_writes_it(anyres_run, converted, caplog):
    source, run = anyres_run
    final = finetune(*parse(run))
    assert "1 of 3 records were skipped: record 0 ('broken one')" in caplog.text
    assert {file.name for file in final.iterdir()} == {file.name for file in converted["llava-next-m3"].iterdir()}
    assert not list(final.parent.glob(".final*"))
    for name in ("config.json", "generation_config.json", "processor_config.json", "tokenizer.json"):
        expected = json.loads((source / name).read_text()) | ({"trained_scales": [9]} if name == "config.json" else {})
        assert json.loads((final / name).read_text()) == expected, name
    assert (final / "chat_template.jinja").read_text() == (source / "chat_template.jinja").read_text()
    changed = set()
    with safe_open(final / "model.safetensors", "pt") as after, safe_open(source / "model.safetensors", "pt") as before:
        assert set(after.keys()) == set(before.keys())
        for name in after.keys():
            assert after.get_tensor(name).dtype == torch.bfloat16
            if not torch.equal(after.get_tensor(name), before.get_tensor(name).bfloat16()):
                changed.add(name)
    assert changed and all(name.startswith("model.vision_tower.") for name in changed)
    card = (final / "README.md").read_text()
    assert "\nlicense: llama2\n" in card and "# my-m3\n" in card
    for row in (
        "| Started from | `source-m3` |",
        "| Data | data.jsonl, 3 records, template `v1` |",
        "| Objective | next-token loss at 9 visual token(s) per tile |",
        "| Trained | vision tower (learning rate 0.01) |",
        "| Steps | 2 of 2 samples |",
    ):
        assert row in card
    assert AutoProcessor.from_pretrained(final).visual_token_scales == [1, 9, 36, 144, 576]


def test_a_finished_run_is_not_run_again(converted, tmp_path, capsys):
    (tmp_path / "final").mkdir()
    assert main(arguments(converted["llava15-m3"], tmp_path)) == 1
    assert "holds a finished run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data_path": "none.json"}, "There is no data file none.json."),
        ({}, "data_path is missing"),
        ({"image_folder": "none"}, "image_folder=none is no folder."),
        ({"matryoshka_scales": "7"}, "matryoshka_scales=[7]: 7 is not a number of visual tokens"),
        ({"model_name_or_path": "./none"}, "There is no folder ./none"),
        (
            {"model_name_or_path": GOLDENS / "llava15-m3"},
            "is an original LLaVA checkpoint; convert it first: m3-convert",
        ),
        ({"model_name_or_path": GOLDENS}, "is not a checkpoint: it has no config.json."),
    ],
)
def test_what_is_wrong_is_said_in_one_line(settings, message, converted, tmp_path, capsys):
    data = tmp_path / "data.json"
    data.write_text(json.dumps(records(1)))
    settings = ({"data_path": data} if settings else {}) | settings
    assert main(arguments(**{"checkpoint": converted["llava15-m3"], "output": tmp_path / "out"}, **settings)) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("m3-train: ") and message in error


def test_a_folder_with_other_things_is_left_alone(converted, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    assert main(arguments(converted["llava15-m3"], tmp_path)) == 1
    assert "is not empty and holds no checkpoint" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


def test_strict_stops_at_the_first_bad_sample(converted, tmp_path, capsys):
    data = tmp_path / "data.json"
    data.write_text(json.dumps([{"id": "bad", "image": "none.png", "conversations": []}]))
    assert main(arguments(converted["llava15-m3"], tmp_path / "out", "--strict", data_path=data)) == 1
    assert "record 0 ('bad'): there is no picture at" in capsys.readouterr().err


def test_a_batch_of_which_nothing_is_supervised_changes_nothing(converted, tmp_path, caplog):
    data = records(2)
    for record in data:
        record["conversations"][0]["value"] += " ASSISTANT: what?"
    finetune(*parse(arguments(converted["llava15-m3"], tmp_path / "out", max_steps=1)), records=data)
    (entry,) = losses(tmp_path / "out")
    assert entry["loss"] == entry["loss_at_9"] == entry["grad_norm"] == 0
    assert "2 of 2 records were without anything supervised: record 0 (0), record 1 (1)" in caplog.text


@pytest.fixture(scope="module")
def one_process(converted, tmp_path_factory):
    """The arguments of a run, but for output and batch, and the folder that one process wrote."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "data.json").write_text(json.dumps(records(4, 2)))
    bad = {**records(1)[0], "id": "bad", "image": "none.png"}
    (folder / "held-out.json").write_text(json.dumps([bad, *records(1, 3)]))
    settings = {"data_path": folder / "data.json", "num_train_epochs": 1, "learning_rate": 1e-3}
    settings |= {"eval_data_path": folder / "held-out.json", "per_device_eval_batch_size": 2}
    assert main(arguments(converted["llava15-m3"], folder / "one", per_device_train_batch_size=2, **settings)) == 0
    return settings, folder / "one"


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_two_processes_have_the_losses_and_weights_of_one(way, one_process, converted, project, tmp_path):
    """Started in a project whose folders have the names of ours."""
    settings, one = one_process
    run = arguments(converted["llava15-m3"], tmp_path / "two", per_device_train_batch_size=1, **settings)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "m3_training.finetune"]
    if way == "fsdp":
        config = yaml.safe_load((CONFIGS / "fsdp.yaml").read_text())
        config |= {"num_processes": 2, "mixed_precision": "no", "use_cpu": True, "main_process_port": 0}
        (tmp_path / "fsdp.yaml").write_text(yaml.safe_dump(config))
        launch = ["-m", "accelerate.commands.launch", "--config_file", tmp_path / "fsdp.yaml"]
        launch += [Path(__file__).with_name("fsdp_on_cpu.py")]
    result = subprocess.run(
        [sys.executable, *map(str, launch), *run],
        cwd=project,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "."},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    expected, found = losses(one), losses(tmp_path / "two")
    assert len(expected) == 3
    for name in ("loss", "loss_at_1", "loss_at_9", "grad_norm"):
        assert [entry[name] for entry in found] == pytest.approx([entry[name] for entry in expected], rel=1e-4)
    (found,), (expected,) = evaluations(tmp_path / "two"), evaluations(one)  # five records, one bad, each counted once
    assert found == pytest.approx(expected, rel=1e-4)
    weights, expected_weights = (
        load_file(folder / "final" / "model.safetensors") for folder in (tmp_path / "two", one)
    )
    torch.testing.assert_close(weights, expected_weights, rtol=1e-3, atol=1e-4)
