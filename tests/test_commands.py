"""The commands, inside a user's project whose folders have the names of ours; and what an installation brings."""

import json
import os
import shlex
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest
from conftest import GOLDENS, commands_on_path

import m3_commands
import modeling_m3


REPOSITORY = Path(__file__).parent.parent
PICTURE = GOLDENS / "images" / "photo_400x266.png"
RECORDS = REPOSITORY / "tests" / "fixtures" / "records.json"
RUN = f"--model_name_or_path {{demo}} --data_path {RECORDS} --image_folder {GOLDENS / 'images'} --max_steps 1 --use_cpu true"
QUESTION = json.dumps({"question": "What is it?", "answer": "a dog", "image": "photo_400x266.png"})
# A command, and a file that it writes.
COMMANDS = {
    "m3-convert": (f"m3-convert {GOLDENS / 'llava15-m3'} new", "new/model.safetensors"),
    "m3-create": ("m3-create --help", None),  # what it does is in test_create.py
    "m3-ask": (f"m3-ask {PICTURE} Hello --model {{demo}} --max-new-tokens 2", None),
    "m3-budget": ("m3-budget --help", None),  # what it does is in test_automatic_budget.py
    "m3-batch": (
        f"m3-batch --model {{demo}} --input {PICTURE} --question Hello --max-new-tokens 2 --engine generate --output answers",
        "answers/answers-000000.parquet",
    ),
    "m3-demo": ("m3-demo --help", None),  # what it does is in test_demo.py
    "m3-serve": ("m3-serve --help", None),  # what it does is in test_serve_engine.py
    "m3-cache": ("m3-cache list", None),  # what it does is in test_load.py
    "m3-eval": (
        f"m3-eval {{demo}} --data questions.jsonl --image_folder {GOLDENS / 'images'} --scales 1,9 --output run",
        "run/tasks/questions/task.json",
    ),
    "m3-export": ("m3-export --help", None),  # what it does is in test_export.py
    "m3-analyze": ("m3-analyze run --output report", "report/report.html"),
    "m3-train": (f"m3-train {RUN} --output_dir alone", "alone/final/model.safetensors"),
    "accelerate": (
        f"accelerate launch --cpu --num_processes 1 -m m3_training.finetune {RUN} --output_dir by-accelerate",
        "by-accelerate/final/model.safetensors",
    ),
    "m3-train-tiny": ("m3-train-tiny --help", None),  # what it does is in test_m3_tiny.py
}
INSTALLED = distribution("m3-hf").entry_points.select(group="console_scripts")


def run(command: str, folder: Path) -> str:
    environment = {**os.environ, "PATH": commands_on_path(), "PYTHONPATH": "."}
    result = subprocess.run(shlex.split(command), cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, f"{command}\n{result.stderr}"
    return result.stdout


def test_every_command_is_tested():
    assert INSTALLED.names == COMMANDS.keys() - {"accelerate"}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_commands_work_in_a_project_with_folders_of_our_names(name, project, converted):
    command, written = COMMANDS[name]
    (project / "questions.jsonl").write_text(QUESTION)
    if name == "m3-analyze" and not (project / "run").exists():
        run(COMMANDS["m3-eval"][0].format(demo=converted["llava15-m3"]), project)
    assert run(command.format(demo=converted["llava15-m3"]), project).strip()
    assert written is None or (project / written).is_file()


def test_a_command_whose_extra_is_missing_says_which(monkeypatch, capsys):
    monkeypatch.setattr("m3_commands.find_spec", lambda name: None if name == "pyarrow" else "found")
    assert m3_commands.batch() == 1
    assert capsys.readouterr().err == "m3-batch: needs pyarrow: pip install '.[serve]' in the clone\n"


@pytest.mark.parametrize("command", INSTALLED, ids=lambda command: command.name)
def test_version(command, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [command.name, "--version"])
    with pytest.raises(SystemExit, match="^0$"):
        sys.exit(command.load()())
    assert capsys.readouterr().out == f"m3-hf {distribution('m3-hf').version}\n"
    assert modeling_m3.__version__ == distribution("m3-hf").version


@pytest.mark.slow
def test_from_a_checkout_conversion_also_runs_as_a_module(tmp_path):
    arguments = [GOLDENS / "llava15-m3", tmp_path / "demo"]
    subprocess.run([sys.executable, "-m", "conversion", *arguments], cwd=REPOSITORY, check=True, capture_output=True)
    assert (tmp_path / "demo" / "README.md").is_file()


@pytest.mark.slow
def test_links_that_git_wrote_as_texts(tmp_path):
    """As a clone has them on a system where git may make no links."""
    package, folder = tmp_path / "modeling_m3", tmp_path / "modeling_m3" / "m3_tiny"
    folder.mkdir(parents=True)
    for file in (REPOSITORY / "modeling_m3").glob("*.py"):
        (package / file.name).symlink_to(file)
        (folder / file.name).write_text(f"../{file.name}")
    code = "import modeling_m3.__main__ as ask; ask.app(['README.md', 'Hello'])"
    (tmp_path / "README.md").touch()
    script = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {code}"]
    result = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 1
    assert "git config core.symlinks true" in result.stderr.splitlines()[-1]
