"""Commands of evaluation that are killed or stopped, wherever that is, and then go on to what an unbroken run would have."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from test_signals import NUMBERS, start, until
from test_video_evaluation import data as video_data  # noqa: F401 - a fixture
from typer.testing import CliRunner

import modeling_m3
from m3_conversion import json_files, signals, whole_files
from m3_evaluation import analyze_command, eval_command, own_tasks, record, video_budgets
from m3_evaluation.answering import Answerer
from m3_evaluation.runs import read_samples
from m3_training import budget
from m3_training.m3_tiny.data import held_out_scenes
from modeling_m3.any_checkpoint import M3Checkpoint


TINY = str(modeling_m3.default_checkpoint())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three questions about two pictures, one with characters that other programs end lines at, or cannot write."""
    folder, lines = tmp_path_factory.mktemp("data"), []
    for index, (shown, questions) in enumerate(held_out_scenes(2)):
        shown.save(folder / f"{index}.png")
        lines += [{"question": each.text, "answer": each.answer, "image": f"{index}.png"} for each in questions[:2]]
    lines[1] |= {"answer": ["färbig", "a\u2028b", "\ud83d", lines[1]["answer"]], "kind": "\u2029 \ud800"}
    json_files.write_json_lines(folder / "my.jsonl", lines[:3])
    return folder / "my.jsonl"


@pytest.fixture(scope="module")
def m3_tiny():
    return modeling_m3.load(TINY)


@pytest.fixture
def m3_eval(data, m3_tiny, monkeypatch):
    """m3-eval in this process: its status and what it says, given an output folder and further arguments."""
    monkeypatch.setattr(M3Checkpoint, "load", lambda *args, **kwargs: m3_tiny)
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
    other = os.getpid() + 1
    with monkeypatch.context() as patched:
        kill_at(patched, name, step)
        patched.setattr(record.os, "getpid", lambda: other)
        with pytest.raises(Killed):
            m3_eval(tmp_path / "killed")
    for folder in ("killed", "whole"):
        done = m3_eval(tmp_path / folder)
        assert done.exit_code == 0, done.output
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def test_a_folder_that_another_one_writes_to_is_left_to_it(m3_eval, tmp_path):
    assert m3_eval(tmp_path / "run").exit_code == 0
    shutil.rmtree(tmp_path / "run" / "tasks")
    with whole_files.used_alone(tmp_path / "run", "m3-eval"):
        refused = m3_eval(tmp_path / "run")
    assert refused.exit_code == 1 and "run: another m3-eval writes to it" in refused.stderr
    assert not (tmp_path / "run" / "tasks").exists()
    assert m3_eval(tmp_path / "run").exit_code == 0


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
    hidden = {Path(name).name for name in found["files"] if Path(name).name.startswith(".")}
    assert len(found["steps"]) > 20 and hidden == {whole_files.LOCK}


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
    assert "\\ud800" in (tmp_path / "killed" / "report.md").read_text(encoding="utf-8")
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


# Ctrl-C and SIGTERM


@pytest.fixture
def sends(monkeypatch):
    """Has this process sent a signal where a function is called."""

    def set_up(place, name, number):
        monkeypatch.setattr(place, name, lambda *args, **kwargs: os.kill(os.getpid(), number))

    return set_up


@NUMBERS
def test_m3_eval_says_how_it_goes_on(number, m3_eval, sends, tmp_path, monkeypatch):
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patched:
        answer = Answerer.answer
        asked = []

        def second(self, chats, *args, **kwargs):
            asked.append(len(chats))
            if len(asked) == 2:
                os.kill(os.getpid(), number)
            return answer(self, chats, *args, **kwargs)

        patched.setattr(Answerer, "answer", second)
        stopped = m3_eval(tmp_path / "run")
    assert stopped.exit_code == 128 + number
    assert stopped.output.splitlines()[-1] == "m3-eval: stopped; the same command goes on"
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before
    for folder in ("run", "whole"):
        assert m3_eval(tmp_path / folder).exit_code == 0
    assert content(tmp_path / "run") == content(tmp_path / "whole")


def test_what_catches_the_signal_keeps_nothing_of_it(m3_eval, tmp_path, monkeypatch):
    """As the code of a task, or a module that is being imported, may do."""
    with monkeypatch.context() as patched:

        def catches(*arguments):
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            except KeyboardInterrupt:
                return 0.0

        patched.setitem(eval_command.METRICS, "contains", catches)
        stopped = m3_eval(tmp_path / "run")
    assert stopped.exit_code == 143 and not list(tmp_path.rglob("task.json"))
    assert m3_eval(tmp_path / "run").exit_code == 0 and len(list(read_samples(tmp_path / "run", "my"))) == 3

    with pytest.raises(KeyboardInterrupt) as stop, signals.interrupting():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt as error:
            raise ImportError("cannot import name") from error
    assert stop.value.args == (signal.SIGTERM,)


@NUMBERS
def test_m3_analyze_begins_anew(number, m3_eval, sends, tmp_path, monkeypatch):
    assert m3_eval(tmp_path / "run").exit_code == 0
    arguments = [str(tmp_path / "run"), "--resamples", "100", "--output", str(tmp_path / "report")]
    with monkeypatch.context() as patched:
        patched.setattr(whole_files.os, "fsync", lambda _: os.kill(os.getpid(), number))
        stopped = CliRunner().invoke(analyze_command.app, arguments)
    assert stopped.exit_code == 128 + number
    assert stopped.output.splitlines()[-1] == "m3-analyze: stopped; the same command begins anew"
    assert content(tmp_path / "report") == {}


@NUMBERS
def test_m3_budget_says_how_it_goes_on(number, data, sends, tmp_path, capsys, monkeypatch):
    sends(budget, "ask", number)
    monkeypatch.setattr(budget, "check_numbers", lambda questions, pictures: None)  # a few questions will do
    arguments = ["--model_name_or_path", TINY, "--data_path", str(data), "--output_dir", str(tmp_path / "out")]
    assert budget.main(arguments) == 128 + number
    assert capsys.readouterr().err.splitlines()[-1] == "m3-budget: stopped; the same command goes on"


def test_m3_budget_goes_on_where_it_was_killed_before_it_had_written_anything(data, sends, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    arguments = budget.BudgetArguments(TINY, str(data), str(tmp_path / "out"))
    with monkeypatch.context() as patched:
        kill_at(patched, "asked.json", "replace")
        with pytest.raises(Killed):
            budget._begin(tmp_path / "out", arguments, {"checkpoint": "print"})
    assert [file.name for file in (tmp_path / "out").iterdir()] == [".asked.json.part"]
    budget._begin(tmp_path / "out", arguments, {"checkpoint": "print"})
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["asked.json"]


@NUMBERS
def test_video_budgets_say_how_they_go_on(number, video_data, sends, tmp_path, capsys):  # noqa: F811
    sends(video_budgets.Answerer, "answer", number)
    options = {"data": video_data, "output": tmp_path / "out", "totals": "4", "most_frames": 20, "metric": "exact_match", "batch_size": 2, "limit": None}  # fmt: skip
    with pytest.raises(SystemExit) as end:
        video_budgets.main(TINY, **options)
    assert end.value.code == 128 + number
    assert capsys.readouterr().err.splitlines()[-1] == "m3_evaluation.video_budgets: stopped; the same command goes on"


# A process that comes to a known point, and is sent a signal there.
WAITS = """
import sys, time
import m3_commands
from m3_evaluation import eval_command
def add(self, batch):
    print("at a batch", file=sys.stderr, flush=True)
    time.sleep(60)
eval_command.Record.add = add
sys.exit(m3_commands.evaluate())
"""


@pytest.mark.slow
@NUMBERS
def test_a_process_of_m3_eval_is_stopped(number, data, tmp_path):
    process = start([sys.executable, "-c", WAITS, TINY, "--data", data, "--output", tmp_path / "run"])
    until(process, "at a batch")
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert error.strip().splitlines()[-1] == "m3-eval: stopped; the same command goes on"
    assert "Traceback" not in error and (tmp_path / "run" / "run.json").is_file()


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
