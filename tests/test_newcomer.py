"""What a newcomer meets in the first hour: folders that are none yet, devices that are not there, options that repeat."""

import importlib
import pkgutil
import shutil

import pytest
import typer
from conftest import GOLDENS
from test_ask import PICTURE, run
from typer.testing import CliRunner

import benchmarks
from m3_training.finetune import main as train


COMMANDS = [
    "modeling_m3.__main__",
    "modeling_m3.cache_command",
    "m3_evaluation.eval_command",
    "m3_evaluation.analyze_command",
    "m3_serving.batch_command",
    *(f"benchmarks.{module.name}" for module in pkgutil.iter_modules(benchmarks.__path__)),
]


def command_of(name):
    module = importlib.import_module(name)
    app = getattr(module, "app", None)
    if app is None and hasattr(module, "main"):
        app = typer.Typer()
        app.command()(module.main)
    return app


@pytest.mark.parametrize("name", COMMANDS)
def test_options_that_repeat_say_so_in_their_help(name):
    app = command_of(name)
    if app is None:
        return
    command = typer.main.get_command(app)
    for each in [command, *getattr(command, "commands", {}).values()]:
        for option in each.params:
            if getattr(option, "multiple", False):
                assert "repeat" in option.help.lower(), f"{name} {option.name}: {option.help}"


@pytest.mark.parametrize("name", ["prefill", "peers", "scaling", "one_encoding", "automatic_budget", "quantization"])
def test_a_device_that_is_not_there_is_told_in_a_line(name):
    result = CliRunner().invoke(command_of(f"benchmarks.{name}"), ["--device", "abacus"])
    assert result.exit_code == 2 and "torch cannot use abacus here" in " ".join(result.output.replace("│", "").split())


def test_a_folder_that_does_not_exist_is_called_so(tmp_path, monkeypatch, converted):
    monkeypatch.chdir(tmp_path)
    for name in ("nothing", "./nothing"):
        result = run(PICTURE, "?", "--model", name, "--quiet")
        assert result.exit_code == 1
        assert result.stderr.strip() == (
            f"m3-ask: There is no folder {name}, and an id on the Hub has an owner, as OWNER/NAME. No checkpoint is there. "
            f"`m3-convert SRC {name}` makes it of a LLaVA."
        )
    shutil.copytree(converted["llava15-m3"], tmp_path / "m3-demo")
    assert "Checkpoints there: m3-demo." in run(PICTURE, "?", "--model", "m3-dmo", "--quiet").stderr


def test_an_unconverted_folder_is_told_which_command_converts_it(tmp_path, capsys):
    original = GOLDENS / "llava15-m3"
    arguments = ["--model_name_or_path", original, "--data_path", "none.json", "--output_dir", tmp_path / "out"]
    assert train([str(argument) for argument in arguments]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert f"convert it first: m3-convert {original}" in line
    assert not (tmp_path / "out").exists()
