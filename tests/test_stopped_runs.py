"""Commands of evaluation that are killed or stopped, wherever that is, and then go on to what an unbroken run would have."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from typer.testing import CliRunner

import modeling_m3
from m3_conversion import json_files
from m3_evaluation import analyze_command, eval_command, own_tasks
from m3_training import budget
from m3_training.m3_tiny.data import held_out_scenes


TINY = str(modeling_m3.default_checkpoint())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three questions about two pictures, the words of one not ASCII."""
    folder, lines = tmp_path_factory.mktemp("data"), []
    for index, (shown, questions) in enumerate(held_out_scenes(2)):
        shown.save(folder / f"{index}.png")
        lines += [{"question": each.text, "answer": each.answer, "image": f"{index}.png"} for each in questions[:2]]
    lines[1]["answer"] = ["färbig", "a\u2028b", lines[1]["answer"]]
    json_files.write_json_lines(folder / "my.jsonl", lines[:3])
    return folder / "my.jsonl"


@pytest.fixture(scope="module")
def m3_tiny():
    return modeling_m3.load(TINY)


@pytest.fixture
def m3_eval(data, m3_tiny, monkeypatch):
    """m3-eval in this process: its status and what it says, given an output folder and further arguments."""
    monkeypatch.setattr(modeling_m3, "load", lambda *args, **kwargs: m3_tiny)
    asked = [TINY, "--data", data, "--scales", "1,9", "--batch_size", 2]

    def run(output, *more):
        return CliRunner().invoke(eval_command.app, [*map(str, asked), "--output", str(output), *map(str, more)])

    return run


def content(folder):
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


class Killed(BaseException):
    """What no one catches, in place of a kill."""


def kill_at(monkeypatch, name, step):
    """Ends this process, so to say, where it would rename or remove a file of this name, or has written half of what is to be in it."""

    def at(place, function):
        def killed(*arguments):
            file = os.readlink(f"/proc/self/fd/{arguments[0]}") if place == "fsync" else arguments[0]
            if name not in Path(file).name:
                return function(*arguments)
            if place == "fsync":
                os.ftruncate(arguments[0], os.fstat(arguments[0]).st_size // 2)
            monkeypatch.setattr(Path, "unlink", lambda *args, **kwargs: None)  # a killed process cleans nothing up
            raise Killed

        return killed

    if step == "unlink":
        monkeypatch.setattr(Path, "unlink", at(step, Path.unlink))
    else:
        monkeypatch.setattr(os, step, at(step, getattr(os, step)))


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="names an open file by Linux's /proc")
@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("run.json", "replace"),
        (".jpg", "replace"),
        ("answers.0.jsonl", "fsync"),
        ("samples.jsonl", "fsync"),
        ("task.json", "replace"),
        ("answers.0.jsonl", "unlink"),
    ],
)
def test_killed_inside_its_writing_it_goes_on_to_the_same(name, step, m3_eval, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        kill_at(patched, name, step)
        with pytest.raises(Killed):
            m3_eval(tmp_path / "killed")
    for folder in ("killed", "whole"):
        done = m3_eval(tmp_path / folder)
        assert done.exit_code == 0, done.output
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def test_parts_of_lines_of_other_processes_end_nothing(m3_eval, tmp_path):
    for folder in ("run", "whole"):
        assert m3_eval(tmp_path / folder, "--limit", 1).exit_code == 0
    task = tmp_path / "run" / "tasks" / "my"
    (task / "task.json").unlink()
    (task / "answers.7.jsonl").write_bytes(b'{"0": {"resu\x00\x00\x00\n{"1": {"res')
    done = m3_eval(tmp_path / "run", "--limit", 1)
    assert done.exit_code == 0 and content(tmp_path / "run") == content(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="names an open file by Linux's /proc")
def test_killed_at_every_step_it_goes_on_to_the_same(data, tmp_path):
    asked = [TINY, "--data", str(data), "--signals", "--batch_size", "2", "--output", "OUTPUT"]
    script = Path(__file__).with_name("kill_points.py")
    done = subprocess.run(
        [sys.executable, script, tmp_path, TINY, json.dumps([["m3_evaluation.eval_command", asked]])],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["differing"] == {}
    assert len(found["steps"]) > 20 and not [name for name in found["files"] if Path(name).name.startswith(".")]


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="names an open file by Linux's /proc")
def test_a_report_is_whole_or_not_there(m3_eval, tmp_path, monkeypatch):
    assert m3_eval(tmp_path / "run").exit_code == 0

    def m3_analyze(output):
        arguments = [str(tmp_path / "run"), "--resamples", "100", "--output", str(output)]
        assert CliRunner().invoke(analyze_command.app, arguments).exit_code == 0

    m3_analyze(tmp_path / "whole")
    for name, step in (("my-scores.png", "replace"), ("report.html", "fsync")):
        with monkeypatch.context() as patched:
            kill_at(patched, name, step)
            with pytest.raises(Killed):
                m3_analyze(tmp_path / "killed")
        assert not (tmp_path / "killed" / name).exists()
    m3_analyze(tmp_path / "killed")
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def test_m3_budget_goes_on_where_it_was_killed_before_it_had_written_anything(data, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    arguments = budget.BudgetArguments(TINY, str(data), str(tmp_path / "out"))
    with monkeypatch.context() as patched:
        kill_at(patched, "asked.json", "replace")
        with pytest.raises(Killed):
            budget._begin(tmp_path / "out", arguments, "print")
    assert [file.name for file in (tmp_path / "out").iterdir()] == [".asked.json.part"]
    budget._begin(tmp_path / "out", arguments, "print")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["asked.json"]


# The tasks that need no network


def test_what_a_killed_process_left_of_the_tasks_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(own_tasks, "cache_folder", lambda: tmp_path)

    def killed(folder):
        (folder / "half").touch()
        monkeypatch.setattr(own_tasks.shutil, "rmtree", lambda *args, **kwargs: None)
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(own_tasks, "make", killed)
        with pytest.raises(Killed):
            own_tasks.make_once()
    monkeypatch.undo()
    monkeypatch.setattr(own_tasks, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(own_tasks, "make", lambda folder: (folder / "whole").touch())
    (tmp_path / ".tasks-of-another-release").mkdir()
    name = f"tasks-{modeling_m3.__version__}"
    assert (tmp_path / f".{name}" / "half").exists()
    for _ in range(2):
        assert [file.name for file in own_tasks.make_once().iterdir()] == ["whole"]
        assert sorted(file.name for file in tmp_path.iterdir()) == [".lock", name]
        (tmp_path / f".{name}").mkdir()  # another process that was killed, with the tasks there
    own_tasks.make_once()
    assert sorted(file.name for file in tmp_path.iterdir()) == [".lock", name]


def test_two_processes_that_want_the_tasks_at_once_make_them_once(tmp_path, monkeypatch):
    both, made = threading.Barrier(2), []

    def make(folder):
        made.append(folder)
        (folder / "whole").touch()

    def cache_folder():
        both.wait(30)  # neither finds them there
        return tmp_path

    monkeypatch.setattr(own_tasks, "cache_folder", cache_folder)
    monkeypatch.setattr(own_tasks, "make", make)
    found = []
    threads = [threading.Thread(target=lambda: found.append(own_tasks.make_once())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [tmp_path / f"tasks-{modeling_m3.__version__}"] * 2 and len(made) == 1
    assert [file.name for file in found[0].iterdir()] == ["whole"]
