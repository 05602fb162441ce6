"""Ctrl-C, and the SIGTERM of a scheduler: one line, the status that a shell expects, and a checkpoint where there is time."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import commands_on_path
from safetensors.torch import load_file
from test_training_finetune import arguments, losses, records


NUMBERS = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])


def start(command, **options):
    return subprocess.Popen(
        list(map(str, command)),
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PATH": commands_on_path(), "OMP_NUM_THREADS": "1"},
        preexec_fn=_take_signals,
        **options,
    )


def _take_signals():
    """As in a shell's foreground."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def wait_until(condition, process):
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.01)


def imports(process, library):
    """Whether a process has opened one of the library's files, so that it is importing it, or has done so."""
    return any(library in line for line in open(f"/proc/{process.pid}/maps"))


@NUMBERS
@pytest.mark.parametrize("command", ["m3-ask", "m3-convert", "m3-train", "m3-train-tiny"])
@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="tells what a process imports by Linux's /proc")
def test_while_it_is_importing(command, number):
    words = {"m3-ask": ["a.png", "Hello"], "m3-convert": ["a", "b"], "m3-train": ["a.yaml"], "m3-train-tiny": ["a"]}[
        command
    ]
    process = start([command, *words])
    wait_until(lambda: imports(process, "libtorch"), process)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert error.strip() == f"{command}: stopped"


@pytest.fixture
def run(converted, tmp_path):
    """The command line of a run of eight steps."""
    (tmp_path / "data.json").write_text(json.dumps(records(8)))
    settings = {"data_path": tmp_path / "data.json", "num_train_epochs": 2, "dataloader_num_workers": 1}
    return lambda name, **more: arguments(converted["llava15-m3"], tmp_path / name, **settings, **more)


# Slow steps, so that a signal finds the command at one.
SLOW = """
import sys, time
from m3_training import finetune, trainer
step = trainer.M3Trainer.training_step
def slow(self, *arguments, **options):
    print("at a step", self.state.global_step, file=sys.stderr, flush=True)
    time.sleep(0.5)
    return step(self, *arguments, **options)
trainer.M3Trainer.training_step = slow
sys.exit(finetune.main(sys.argv[1:]))
"""


def until(process, text):
    """Reads what a process says until a line holds `text`."""
    lines = []
    while not any(text in line for line in lines[-1:]):
        lines.append(process.stderr.readline())
        assert lines[-1], "".join(lines)
    return "".join(lines)


def test_a_run_ends_with_a_checkpoint_that_the_same_command_goes_on_from(run, tmp_path):
    process = start([sys.executable, "-c", SLOW, *run("out")], start_new_session=True)
    until(process, "at a step 2")
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does: workers that read data get it, too
    _, error = process.communicate(timeout=120)
    *_, last = error.strip().splitlines()
    checkpoint = tmp_path / "out" / "checkpoint-3"
    assert process.returncode == 130
    assert "Traceback" not in error
    assert last == f"m3-train: stopped after step 3: the same command goes on from {checkpoint}"
    assert not (tmp_path / "out" / "final").exists()

    for name in ("out", "unbroken"):
        again = start(["m3-train", *run(name)])
        _, error = again.communicate(timeout=120)
        assert again.returncode == 0, error
        assert (f"going on from {checkpoint}" in error) == (name == "out")
    assert losses(tmp_path / "out") == losses(tmp_path / "unbroken")
    weights, expected = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("out", "unbroken"))
    assert all((weights[name] == value).all() for name, value in expected.items())


def test_a_second_ctrl_c_ends_it_at_once(run, tmp_path):
    process = start([sys.executable, "-c", SLOW.replace("0.5", "5"), *run("out")])
    until(process, "at a step 0")
    process.send_signal(signal.SIGINT)
    until(process, "stopping after this step")
    process.send_signal(signal.SIGINT)  # too soon to be meant
    time.sleep(1.1)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.strip().splitlines()[-1].endswith("there is no checkpoint yet, and the same command begins anew")
    assert "Traceback" not in error and not list((tmp_path / "out").glob("checkpoint-*"))


def test_before_the_first_step(run):
    script = SLOW.replace(
        "sys.exit(",
        "finetune.AutoProcessor.from_pretrained = lambda *a, **k: (print('here', file=sys.stderr), time.sleep(60))\nsys.exit(",
    )
    process = start([sys.executable, "-c", script, *run("out")])
    until(process, "here")
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error.strip()) == (130, "m3-train: stopped before the first step")


def test_two_processes_stop_at_the_same_step(run, tmp_path):
    (tmp_path / "slow.py").write_text(SLOW)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", tmp_path / "slow.py"]
    process = start([*launch, *run("out", per_device_train_batch_size=1)])
    until(process, "at a step 1")
    process.send_signal(signal.SIGTERM)  # the launcher hands it on
    _, error = process.communicate(timeout=120)
    assert process.returncode not in (0, None) and "Traceback" not in error.split("torch/distributed/elastic")[0]
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    assert f"the same command goes on from {checkpoint}" in error
    assert (checkpoint / "trainer_state.json").is_file()


def test_a_signal_that_was_ignored_at_the_start_stays_ignored(run):
    """As under nohup, and in a shell's background."""
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *map(str, run("out", max_steps=2))],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    until(process, "at a step 0")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    assert process.returncode == 0
