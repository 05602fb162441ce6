"""Arguments from files and the command line, and the files that ship."""

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from m3_training.arguments import CONFIGS, parse


RUNS = {"llava-v1.5-7b-m3": (2e-5, 2e-5, 2048), "llava-next-vicuna-7b-m3": (1e-5, None, 4096)}


@pytest.mark.parametrize("run", RUNS)
def test_the_papers_runs_are_as_the_paper_says(run):
    model, data, arguments = parse([str(CONFIGS / f"{run}.yaml"), "--bf16", "false"])
    learning_rate, projector_learning_rate, max_length = RUNS[run]
    assert arguments.learning_rate == learning_rate
    assert arguments.projector_learning_rate == projector_learning_rate
    assert arguments.vision_tower_learning_rate == 2e-5
    assert arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * 8 == 128
    assert arguments.scales([1, 9, 36, 144, 576]) == [1, 9, 36, 144, 576] and arguments.scale_choice == "all"
    assert arguments.num_train_epochs == 1 and arguments.gradient_checkpointing
    assert arguments.get_warmup_steps(1000) == 30 and arguments.lr_scheduler_type == "cosine"
    assert (data.template, data.model_max_length) == ("v1", max_length)
    assert not any(map(model.trains_nothing_of, ("language_model", "projector", "vision_tower")))


@pytest.mark.parametrize("file", ["fsdp", "zero3"])
def test_accelerate_takes_its_files(file):
    config = load_config_from_file(str(CONFIGS / f"{file}.yaml"))
    assert config.num_processes == 8 and config.mixed_precision == "bf16"
    if file == "fsdp":
        assert config.fsdp_config["fsdp_version"] == 2
    else:
        assert config.deepspeed_config["zero_stage"] == 3


STAGES = ("new-model-stage-1", "new-model-stage-2")  # in test_training_new_models.py


def test_every_configuration_is_tested():
    assert {file.stem for file in CONFIGS.iterdir()} == {*RUNS, *STAGES, "fsdp", "zero3"}


def write(folder, text):
    (folder / "run.yaml").write_text(text)
    return str(folder / "run.yaml")


def test_the_command_line_overrides_the_file(tmp_path):
    file = write(
        tmp_path,
        f"""
        model_name_or_path: a
        output_dir: {tmp_path}
        learning_rate: 2e-5  # a text, to YAML
        matryoshka_scales: [1, 9]
        lr_scheduler_kwargs: {{num_cycles: 1}}
        strict: true
        lora_target_modules: null
        use_cpu: true
        """,
    )
    model, data, arguments = parse([file, "--matryoshka-scales", "36", "--scale-choice", "fixed", "--train", "clip"])
    assert (model.model_name_or_path, model.train, model.lora_target_modules) == ("a", "clip", None)
    assert arguments.learning_rate == 2e-5 and arguments.lr_scheduler_kwargs == {"num_cycles": 1}
    assert (arguments.matryoshka_scales, arguments.scale_choice, data.strict) == ([36], "fixed", True)


@pytest.mark.parametrize(
    ("text", "more", "message"),
    [
        ("[1, 2]", (), "must hold one setting per line"),
        ("a: [", (), "run.yaml is not valid YAML"),
        ("model_name_or_path: a\nlearning_rat: 1", (), "learning_rat"),
        ("model_name_or_path: a", ("--template", "v2"), "template='v2' is not known: choose from"),
        ("model_name_or_path: a\nuse_cpu: true", ("--scale_choice", "fixed"), "needs one scale"),
    ],
)
def test_what_is_wrong_is_named(text, more, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        parse([write(tmp_path, text), *more])


def test_a_missing_file_is_named():
    with pytest.raises(ValueError, match="There is no configuration file none.yaml"):
        parse(["none.yaml"])
