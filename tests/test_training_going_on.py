"""A run goes on as it was begun, whatever ended it, or is refused in a line; its card says what it was trained on."""

import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import fields

import pytest
import torch
from conftest import GOLDENS
from filelock import FileLock
from PIL import Image
from safetensors.torch import load_file
from test_training_finetune import arguments, losses, records
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback, TrainerState

from m3_conversion.json_files import write_json, write_json_lines
from m3_training import finetune as command
from m3_training import run_folder
from m3_training.arguments import DataArguments, M3TrainingArguments, ModelArguments, parse
from m3_training.data import IGNORE_INDEX, LlavaDataset
from m3_training.finetune import finetune, main
from m3_training.options import DECIDED_BY_EVALUATION, HARMLESS, REFUSED, WORK
from m3_training.run_record import compare, describe_run, read_run
from m3_training.trainer import DATA_SO_FAR


STEPS = {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant", "matryoshka_scales": "1"}
QUICK = {**STEPS, "scale_choice": "fixed", "max_steps": 4, "freeze_vision_tower": "true"}  # of records without images


class Killed(BaseException):
    """What nothing of a run catches, as a kill is not caught."""


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(run_folder, "_WAIT", 0)


@pytest.fixture
def train(converted, tmp_path):
    """Runs the command on eight records. Returns its status."""
    data = tmp_path / "data.json"
    write_json(data, records(0, 8))

    def start(*options, output="out", **settings):
        settings = {"data_path": data, **QUICK, **settings}
        return main(arguments(converted["llava15-m3"], tmp_path / output, *options, **settings))

    return start


@pytest.fixture
def begun(converted, tmp_path_factory, tmp_path):
    """A folder whose run of four steps was killed after two, made once, and copied to where `train` goes on."""
    kept = tmp_path_factory.getbasetemp() / "begun"
    if not kept.exists():
        write_json(kept / "data.json", records(0, 8))
        run = arguments(converted["llava15-m3"], kept / "out", data_path=kept / "data.json", **QUICK)
        with pytest.raises(Killed):
            finetune(*parse(run), callbacks=[Dies(after=2)])
    shutil.copytree(kept / "out", tmp_path / "out")
    return tmp_path / "out"


class Dies(TrainerCallback):
    def __init__(self, after):
        self.after = after

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self.after:
            raise Killed


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def error_of(capsys):
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("m3-train: ")]
    return line


def facts_of(run, data=None, **options):
    model, told, training = parse(run)
    processor = AutoProcessor.from_pretrained(model.model_name_or_path, backend="pil")
    data = records(8) if data is None else data
    options = {"eval_records": None, **options}
    return describe_run(model, told, training, records=data, processor=processor, **options)


@pytest.fixture(scope="module")
def facts(converted):
    return facts_of(arguments(converted["llava15-m3"], "out"))


def refused(then, now, planned_steps=4):
    return {change.name for change in compare(then, now, planned_steps) if not change.harmless}


def taken(then, now, planned_steps=4):
    return {change.name for change in compare(then, now, planned_steps) if change.harmless}


def test_an_argument_is_a_part_of_the_run_unless_it_is_known_to_be_harmless(facts):
    assert HARMLESS - {"strict", "show"} <= WORK and DECIDED_BY_EVALUATION <= HARMLESS
    assert not compare(facts, facts, 4)
    own = {field.name for kind in (ModelArguments, DataArguments, M3TrainingArguments) for field in fields(kind)}
    special = {"output_dir", "local_rank", "image_folder", "num_train_epochs", "max_steps"}
    special |= {"per_device_train_batch_size", "gradient_accumulation_steps", "data_path"}
    for name in own - special:
        changed = facts | {name: "another value"}
        if name in HARMLESS:
            assert (taken(facts, changed), refused(facts, changed)) == ({name}, set()), name
        else:
            assert refused(facts, changed) == {name}
    assert not REFUSED.keys() & HARMLESS
    for release in ("m3-hf", "transformers", "torch"):
        assert taken(facts, facts | {release: "0"}) == {release}


@pytest.mark.parametrize("decides", [{"load_best_model_at_end": True}, {"lr_scheduler_type": "reduce_lr_on_plateau"}])
def test_when_it_is_evaluated_is_a_part_of_the_run_where_that_decides(decides, facts):
    then = facts | decides
    for name in DECIDED_BY_EVALUATION:
        assert refused(then, then | {name: "another value"}) == {name}
    assert not refused(then, then | {"per_device_eval_batch_size": 1})


def test_arguments_that_one_release_lacks(facts):
    without = {name: value for name, value in facts.items() if name != "weight_decay"}
    assert not compare(without, facts, 4)  # as the default is
    assert refused(without, facts | {"weight_decay": 0.1}) == {"weight_decay"}
    assert not compare(facts, without, 4)
    assert refused(facts | {"weight_decay": 0.1}, without) == {"weight_decay"}


@pytest.mark.parametrize(
    ("then", "now", "planned", "longer"),
    [
        ((4, 3), (8, 3), 4, True),
        ((4, 3), (4, 9), 4, None),  # epochs do not count
        ((4, 3), (3, 3), 4, False),
        ((-1, 1), (-1, 2.5), 4, True),
        ((-1, 2), (-1, 1), 4, False),
        ((-1, 1), (4, 1), 4, True),
        ((-1, 1), (3, 1), 4, False),
        ((4, 3), (-1, 3), 4, False),  # how many steps that makes is not known here
    ],
)
def test_a_run_may_become_longer(then, now, planned, longer, facts):
    then, now = (facts | dict(zip(("max_steps", "num_train_epochs"), length)) for length in (then, now))
    assert [change.harmless for change in compare(then, now, planned)] == ([] if longer is None else [longer])


@pytest.mark.parametrize(
    ("then", "now", "grouped", "number", "stored", "same"),
    [
        ((4, 1, 1), (2, 2, 1), True, 7, "whole", True),
        ((4, 1, 1), (1, 2, 2), True, 7, "whole", True),
        ((4, 1, 1), (4, 2, 1), True, 7, "whole", False),
        ((4, 1, 1), (2, 2, 1), False, 8, "whole", True),
        (
            (4, 1, 1),
            (2, 2, 1),
            False,
            7,
            "whole",
            False,
        ),  # how the last batch of an epoch is filled depends on the split
        ((1, 2, 2), (2, 1, 2), True, 7, "FSDP2", True),
        ((1, 2, 2), (1, 4, 1), True, 7, "FSDP2", False),
    ],
)
def test_the_same_batch_of_a_step_may_be_split_otherwise(then, now, grouped, number, stored, same, facts):
    names = ("per_device_train_batch_size", "gradient_accumulation_steps", "processes")
    facts = facts | {"group_by_modality_length": grouped, "checkpoints": stored}
    facts["data_path"] = facts["data_path"] | {"records": number}
    (change,) = compare(facts | dict(zip(names, then)), facts | dict(zip(names, now)), 4)
    assert change.harmless == same
    assert str(change) == f"{' x '.join(names)} {' x '.join(map(str, now))}, was {' x '.join(map(str, then))}"


def test_contents_count_and_not_where_they_lie(converted, facts, tmp_path):
    shutil.copytree(converted["llava15-m3"], tmp_path / "moved")
    shutil.copytree(GOLDENS / "images", tmp_path / "images")
    moved = facts_of(arguments(tmp_path / "moved", "elsewhere", image_folder=tmp_path / "images"))
    assert (taken(facts, moved), refused(facts, moved)) == ({"model_name_or_path", "image_folder"}, set())

    template = tmp_path / "moved" / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    assert refused(facts, facts_of(arguments(tmp_path / "moved", "out"))) == {"chat template", "model_name_or_path"}

    weights = tmp_path / "projector.bin"
    run = arguments(converted["llava15-m3"], "out", projector_weights=weights)
    weights.write_bytes(b"1")
    then = facts_of(run)
    weights.write_bytes(b"2")
    assert refused(then, facts_of(run)) == {"projector_weights"}


@pytest.mark.parametrize("text", ["a\u2028b\u0085c", "\ud800", '"\\', "ä\x00"])
def test_one_character_of_the_data_counts_and_how_it_is_written_does_not(text, facts, converted, tmp_path):
    data = records(8)
    data[5]["conversations"][1]["value"] = text
    write_json(tmp_path / "data.json", data)
    write_json_lines(tmp_path / "data.jsonl", [dict(reversed(record.items())) for record in data])
    run = arguments(converted["llava15-m3"], "out")
    now = facts_of(run, command.read_records(tmp_path / "data.json"))
    assert not compare(now, facts_of(run, command.read_records(tmp_path / "data.jsonl")), 4)
    assert refused(facts, now) == {"data_path"}
    assert refused(facts | {"eval_data_path": facts["data_path"]}, now | {"eval_data_path": now["data_path"]}) == {
        "data_path",
        "eval_data_path",
    }


def test_a_picture_that_was_missing_may_come_and_none_may_change(converted, tmp_path):
    run = arguments(converted["llava15-m3"], "out", image_folder=tmp_path)
    odd = ["data:image/png;base64," + "A" * 5000, "\0", "\ud800", ""]  # no names of files
    data = [{**record, "image": [f"{index}.png", *odd]} for index, record in enumerate(records(2))]
    Image.new("RGB", (9, 9)).save(tmp_path / "0.png")
    then = facts_of(run, data)
    Image.new("RGB", (9, 9)).save(tmp_path / "1.png")
    now = facts_of(run, data)
    assert not compare(then, now, 4)
    (tmp_path / "0.png").write_bytes(b"1")
    (change,) = compare(now, facts_of(run, data), 4)
    assert not change.harmless and re.search(r"0\.png: 1 bytes\), was .*0\.png: \d\d+ bytes", str(change))
    (tmp_path / "0.png").unlink()
    (change,) = compare(now, facts_of(run, data), 4)
    assert not change.harmless and "0.png: missing), was" in str(change)


class Made:
    """Records that a program makes, with other pixels whenever one is read."""

    def __init__(self, texts):
        self.texts = texts

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, index):
        picture = Image.effect_noise((8, 8), 50)
        return {"id": index, "image": picture, "conversations": [{"from": "gpt", "value": self.texts[index]}]}


def test_records_of_a_program_are_told_by_number_and_texts_or_by_their_own_print(converted):
    run = arguments(converted["llava15-m3"], "out")
    then = facts_of(run, Made("abc"))
    assert not compare(then, facts_of(run, Made("abc")), 4)
    assert refused(then, facts_of(run, Made("abd"))) == refused(then, facts_of(run, Made("ab"))) == {"data_path"}
    named, same, other = Made("abc"), Made("abd"), Made("abc")
    named.fingerprint, same.fingerprint, other.fingerprint = "one", "one", "two"
    then = facts_of(run, named)
    assert not compare(then, facts_of(run, same), 4)
    assert refused(then, facts_of(run, other)) == {"data_path"}
    pictures = [Made("a")[0]]
    assert not compare(facts_of(run, pictures), facts_of(run, [Made("a")[0]]), 4)
    assert refused(then, facts_of(run, named, optimizer_class=torch.optim.SGD)) == {"optimizer_class"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            "--learning_rate 0.5",
            "begun otherwise: learning_rate 0.5, was 5e-05. Go on as it was begun, or name another",
        ),
        ("--learning_rate 0.5 --seed 7 --logging_steps 3", "learning_rate 0.5, was 5e-05; seed 7, was 42. Go on"),
        ("--template plain", "template plain, was v1."),
        ("--lora --lora_r 2", "lora True, was False; lora_r 2, was 128."),
        ("--train projector", "train projector, was all."),
        ("--matryoshka_scales 9", "matryoshka_scales [9], was [1]."),
        ("--gradient_accumulation_steps 2", "gradient_accumulation_steps x processes 2 x 2 x 1, was 2 x 1 x 1."),
        ("--max_steps 3", "max_steps 3, was 4."),
    ],
)
def test_what_changes_the_run_is_refused_in_a_line(options, said, train, begun, capsys, monkeypatch):
    before = contents(begun)
    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", None)  # it is not loaded
    assert train(*options.split()) == 1
    line = error_of(capsys)
    assert f"output_dir={begun} holds a run that was begun otherwise: " in line and said in line
    assert contents(begun) == before


def test_other_data_is_refused_by_its_print(train, begun, capsys, tmp_path):
    write_json(tmp_path / "second.json", records(0, 4))
    assert train(data_path=tmp_path / "second.json") == 1
    assert re.search(
        r"data_path \(\S+/second\.json, 4 records, print \w{12}\), was \(\S+/data\.json, 8 records, print \w{12}\)\. Go on",
        error_of(capsys),
    )


def test_harmless_changes_are_said_and_taken(train, begun, tmp_path, caplog):
    (tmp_path / "data.json").rename(tmp_path / "moved.json")
    moved = begun.rename(tmp_path / "renamed")
    settings = {"logging_steps": 2, "save_steps": 3, "max_steps": 6, "data_path": tmp_path / "moved.json"}
    with caplog.at_level("INFO"):
        assert train("--strict", output="renamed", **settings) == 0
    (said,) = [line for line in caplog.messages if line.startswith("it goes on with ")]
    for change in ("logging_steps 2, was 1", "save_steps 3, was 1", "max_steps 6, was 4", "strict True, was False"):
        assert change in said
    assert "moved.json" in said and "learning_rate" not in said
    assert [entry["step"] for entry in losses(moved)] == [1, 2, 4, 6]
    assert {path.name for path in moved.glob("checkpoint-*")} == {f"checkpoint-{step}" for step in (1, 2, 3, 6)}
    assert read_run(moved / "run.json")["max_steps"] == 6  # what it goes on with is what the next one is held against


@pytest.mark.slow
def test_a_longer_run_has_the_rates_of_one_that_was_begun_so(train, begun):
    """Of a cosine: those of the steps that were taken are past."""
    shutil.rmtree(begun)
    cosine = {"lr_scheduler_type": "cosine", "learning_rate": 1e-3, "warmup_steps": 1}
    assert train(max_steps=3, **cosine) == 0
    shutil.rmtree(begun / "final")
    assert train(max_steps=6, **cosine) == 0

    def rate(step, of):
        return 1e-3 * (step if step < 1 else (1 + math.cos(math.pi * (step - 1) / (of - 1))) / 2)

    rates = [entry["learning_rate"] for entry in losses(begun)]
    assert rates == pytest.approx([rate(step, 3) for step in range(3)] + [rate(step, 6) for step in range(3, 6)])


def test_a_finished_run_says_how_it_becomes_longer(train, begun, capsys):
    (begun / "final").mkdir()
    assert train(max_steps=8) == 1
    assert error_of(capsys).endswith(f"To go on with a longer max_steps, remove {begun / 'final'}.")


SPLITS = ((4, 1), (2, 2), (1, 4))


@pytest.fixture(scope="module")
def unbroken(converted, tmp_path_factory):
    """A run of two epochs of three steps with four records each: five with images, six without."""
    folder = tmp_path_factory.mktemp("splits")
    write_json(folder / "data.json", records(5, 6)[:-1])
    settings = {
        "data_path": folder / "data.json",
        "num_train_epochs": 2,
        "scale_choice": "fixed",
        "learning_rate": 1e-3,
    }
    settings |= {**STEPS, "per_device_train_batch_size": 4}
    run = arguments(converted["llava15-m3"], folder / "out", **settings)
    assert main(run) == 0
    return settings, folder / "out"


def broken_off(unbroken, folder, step):
    """A copy of a run, as it was when it was killed after a step."""
    shutil.copytree(unbroken, folder)
    shutil.rmtree(folder / "final")
    (folder / "trainer_state.json").unlink()
    for checkpoint in folder.glob("checkpoint-*"):
        if int(checkpoint.name.split("-")[1]) > step:
            shutil.rmtree(checkpoint)
    return folder


def assert_as(expected, found):
    for name in ("loss", "loss_at_1", "grad_norm", "learning_rate", "epoch"):
        values = ([entry[name] for entry in losses(folder)] for folder in (found, expected))
        assert next(values) == pytest.approx(next(values), rel=1e-4), name
    weights, expected_weights = (load_file(folder / "final" / "model.safetensors") for folder in (found, expected))
    torch.testing.assert_close(weights, expected_weights, rtol=1e-3, atol=1e-4)
    assert trained_on(found) == trained_on(expected)


def trained_on(output):
    return re.search(r"^\| Trained on \| (.+) \|$", (output / "final" / "README.md").read_text(), re.MULTILINE)[1]


@pytest.mark.slow
def test_another_split_of_the_batch_has_the_losses_of_the_unbroken_run(unbroken, converted, tmp_path):
    settings, expected = unbroken
    folder = broken_off(expected, tmp_path / "out", 1)
    for until, (batch, accumulated) in ((4, SPLITS[1]), (8, SPLITS[2])):
        more = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated}
        run = parse(arguments(converted["llava15-m3"], folder, **settings | more))
        if until == 4:
            with pytest.raises(Killed):
                finetune(*run, callbacks=[Dies(after=4)])
    finetune(*run)
    assert len(losses(folder)) == 8
    assert_as(expected, folder)


@pytest.mark.slow
def test_it_goes_on_with_two_processes_and_with_one_again(unbroken, converted, tmp_path):
    settings, expected = unbroken
    folder = broken_off(expected, tmp_path / "out", 3)
    run = arguments(converted["llava15-m3"], folder, **settings | {"per_device_train_batch_size": 2})
    assert (launched := of_two(run)).returncode == 0, launched.stderr
    assert (
        "per_device_train_batch_size x gradient_accumulation_steps x processes 2 x 1 x 2, was 4 x 1 x 1"
        in launched.stderr
    )
    assert (folder / "checkpoint-6" / "rng_state_1.pth").exists()
    assert_as(expected, folder)
    again = broken_off(folder, tmp_path / "again", 6)
    assert main(arguments(converted["llava15-m3"], again, **settings)) == 0
    assert_as(expected, again)


@pytest.mark.slow
def test_processes_are_refused_together(unbroken, converted, tmp_path):
    settings, expected = unbroken
    folder = broken_off(expected, tmp_path / "out", 3)
    run = arguments(converted["llava15-m3"], folder, **settings | {"per_device_train_batch_size": 2})
    other = of_two([*run, "--learning_rate", "0.5"])
    with FileLock(folder / ".lock"):
        held = of_two(run)
    for launched, said in ((other, "learning_rate 0.5, was 0.001"), (held, "that of an m3-train that is under way")):
        assert launched.returncode
        lines = [line for line in launched.stderr.splitlines() if line.startswith("m3-train: ")]
        assert lines and all(said in line for line in lines)
    assert not (folder / "checkpoint-4").exists()


def of_two(run):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "m3_training.finetune"]
    return subprocess.run([sys.executable, *launch, *run], capture_output=True, text=True)


@pytest.mark.slow
def test_a_second_run_in_the_same_folder_is_refused(train, begun, capsys):
    before = contents(begun)
    with FileLock(begun / ".lock"):
        assert train() == 1
    assert "is that of an m3-train that is under way: name another folder, or wait" in error_of(capsys)
    assert contents(begun) == before
    assert train() == 0


def half_written(monkeypatch, steps):
    """Kills a run while it writes the state of a checkpoint."""

    def half(state, path):
        if state.global_step == steps:
            with open(path, "w") as file:
                file.write('{"epoch": 1, "glob')
            raise Killed
        save(state, path)

    save = TrainerState.save_to_json
    monkeypatch.setattr(TrainerState, "save_to_json", half)


def killed_in(train, **options):
    with pytest.raises(Killed):
        train(**options)


@pytest.mark.slow
def test_killed_while_a_checkpoint_is_written(train, tmp_path, monkeypatch):
    assert train(output="unbroken") == 0
    with monkeypatch.context() as patched:
        half_written(patched, 3)
        killed_in(train)
    assert (tmp_path / "out" / "checkpoint-3" / "model.safetensors").exists()
    (tmp_path / "out" / "checkpoint-7").mkdir()
    assert train() == 0
    assert not (tmp_path / "out" / "checkpoint-7").exists()
    assert losses(tmp_path / "out") == losses(tmp_path / "unbroken")


@pytest.mark.parametrize("written", ["a part", pytest.param("nothing", marks=pytest.mark.slow)])
def test_killed_while_the_run_is_recorded(written, train, tmp_path, monkeypatch):
    def killed(file, content):
        if written == "a part":
            file.with_name(f".{file.name}.part").write_text('{"lea')
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(run_folder, "write_json", killed)
        killed_in(train)
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / ".lock").touch()  # as a kill leaves it
    assert train(max_steps=1) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        ".lock",
        "run.json",
        "checkpoint-1",
        "final",
        "trainer_state.json",
    }


def test_killed_while_final_is_written(train, tmp_path, monkeypatch):
    """After three steps of four to an epoch: `Trainer` would take another one."""
    assert train(max_steps=3, output="unbroken") == 0
    with monkeypatch.context() as patched:
        patched.setattr("m3_training.export.write_other_files", lambda *_: (_ for _ in ()).throw(Killed))
        killed_in(train, max_steps=3)
    assert not (tmp_path / "out" / "final").exists()
    assert train(max_steps=3) == 0
    assert losses(tmp_path / "out") == losses(tmp_path / "unbroken")
    weights, expected = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("out", "unbroken"))
    assert all((weights[name] == value).all() for name, value in expected.items())
    assert trained_on(tmp_path / "out") == trained_on(tmp_path / "unbroken")


@pytest.mark.slow
def test_a_run_without_a_checkpoint_begins_anew_whatever_it_was(train, tmp_path):
    killed_in(lambda **_: finetune_dying(train), max_steps=4)
    assert train("--learning_rate", "0.5", max_steps=1) == 0
    assert losses(tmp_path / "out")[0]["learning_rate"] == 0.5


def finetune_dying(train):
    with pytest.MonkeyPatch.context() as patched:
        half_written(patched, 1)
        train()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"max_steps": 4}', "\ufeff{", '{"max_steps": 4}\n{'])
def test_a_record_that_cannot_be_read_is_refused_by_name(content, train, begun, capsys):
    (begun / "run.json").write_text(content, encoding="utf-8")
    assert train() == 1
    assert str(begun / "run.json") in error_of(capsys)


@pytest.mark.parametrize(
    "options",
    ["--lora --lora_r 2", "--train projector", "--freeze_projector", "--learning_rate 0.5", "--weight_decay 0.1"],
)
def test_of_a_run_without_a_record_the_optimizer_is_compared(options, train, begun, capsys):
    for name in ("run.json", ".lock"):
        (begun / name).unlink()
    before = contents(begun)
    assert train(*options.split()) == 1
    assert contents(begun) == before
    assert "holds a run without run.json, which says what it depends on. It trained, by group," in error_of(capsys)


@pytest.mark.slow
def test_a_run_without_a_record_goes_on_and_says_what_is_not_checked(train, begun, caplog, capsys):
    (begun / "run.json").unlink()
    state = json.loads((begun / "checkpoint-2" / "trainer_state.json").read_text())
    del state["stateful_callbacks"][DATA_SO_FAR]
    write_json(begun / "checkpoint-2" / "trainer_state.json", state)  # nor did it count
    assert train() == 0
    assert (
        "begun before run.json was written: that data, template and the like are the same is not checked" in caplog.text
    )
    assert trained_on(begun).endswith("answer tokens, counted from step 3 on")
    assert read_run(begun / "run.json")["max_steps"] == 4


def test_a_run_without_a_record_and_optimizer_is_refused(train, begun, capsys):
    (begun / "run.json").unlink()
    (begun / "checkpoint-2" / "optimizer.pt").unlink()
    assert train() == 1
    assert f"nor can it be seen from {begun / 'checkpoint-2'}: name another output_dir." in error_of(capsys)


@pytest.mark.slow
def test_states_of_callbacks_may_be_restored_from_a_checkpoint(train, tmp_path):
    with pytest.MonkeyPatch.context() as patched:
        half_written(patched, 3)
        with pytest.raises(Killed):
            train("--restore_callback_states_from_checkpoint")
    assert train("--restore_callback_states_from_checkpoint") == 0
    assert len(losses(tmp_path / "out")) == 4


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_the_card_counts_what_was_really_used(workers, converted, tmp_path):
    """Nothing that is read ahead, a bad record not, and what stands in for it."""
    data = records(0, 8)
    data[1]["conversations"] = "none"
    sequential = ("--group_by_modality_length", "false", "--train_sampling_strategy", "sequential")
    settings = {**QUICK, "scale_choice": "all", "matryoshka_scales": "1 9", "max_steps": 3}
    settings |= {"dataloader_num_workers": workers}
    processor = AutoProcessor.from_pretrained(converted["llava15-m3"], backend="pil")
    dataset = LlavaDataset(data, processor, image_folder=GOLDENS / "images", template="v1")
    used = [0, 2, 2, 3, 4, 5]  # 2 stands in for 1
    tokens = sum(int((dataset[index]["labels"][1:] != IGNORE_INDEX).sum()) for index in used)

    run = parse(arguments(converted["llava15-m3"], tmp_path / "unbroken", *sequential, **settings))
    finetune(*run, records=data)
    assert trained_on(tmp_path / "unbroken") == f"5 records, {tokens} answer tokens"

    for after in (1, 2):
        run = parse(arguments(converted["llava15-m3"], tmp_path / "out", *sequential, **settings))
        with pytest.raises(Killed):
            finetune(*run, records=data, callbacks=[Dies(after)])
    finetune(*run, records=data)
    assert trained_on(tmp_path / "out") == trained_on(tmp_path / "unbroken")


@pytest.mark.slow
def test_the_card_is_of_the_checkpoint_that_was_best(train, tmp_path):
    """A rate at which every step makes it worse: the first one is kept."""
    settings = {"learning_rate": 5, "max_steps": 3, "save_strategy": "best", "eval_data_path": tmp_path / "data.json"}
    settings |= {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss_at_1"}
    assert train("--load_best_model_at_end", **settings) == 0
    card = (tmp_path / "out" / "final" / "README.md").read_text()
    best = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["best_global_step"]
    assert best < 3 and f"| Steps | {best} of 2 samples |" in card
    assert trained_on(tmp_path / "out").startswith(f"{2 * best} records, ")


@pytest.mark.parametrize(
    "name, value",
    [
        ("max_steps", "4"),
        ("processes", None),
        ("data_path", {"print": "a"}),
        ("image_folder", {"path": "", "bytes": []}),
    ],
)
def test_a_record_that_was_edited_is_refused_by_its_name(name, value, tmp_path):
    whole = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "processes": 1, "max_steps": 4}
    whole |= {
        "num_train_epochs": 3.0,
        "data_path": {"records": 1, "print": "a"},
        "image_folder": {"path": "", "bytes": {}},
    }
    write_json(tmp_path / "run.json", whole)
    assert read_run(tmp_path / "run.json") == whole
    write_json(tmp_path / "run.json", {**whole, name: value})
    with pytest.raises(ValueError, match="run.json does not hold what a run depends on: name another output_dir"):
        read_run(tmp_path / "run.json")
