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

from m3_conversion.signals import handling_signals
from m3_training import stopping
from m3_training.finetune import main
from m3_training.trainer import M3Trainer


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
@pytest.mark.parametrize(
    "command", ["m3-convert", "m3-train", "m3-train-tiny", pytest.param("m3-ask", marks=pytest.mark.slow)]
)
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
    return lambda name, **more: arguments(converted["llava15-m3"], tmp_path / name, **(settings | more))


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


# In this process, which sends itself the signals


@pytest.fixture
def at_step(monkeypatch):
    """Has something done while a run is at a step."""

    step = M3Trainer.training_step

    def set_up(number, action):
        def training_step(self, *arguments, **options):
            if self.state.global_step == number:
                action()
            return step(self, *arguments, **options)

        monkeypatch.setattr(M3Trainer, "training_step", training_step)

    return set_up


def raise_signal(number):
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.slow
@NUMBERS
def test_the_same_command_goes_on_where_it_was_stopped(number, run, at_step, tmp_path, capsys, caplog):
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    at_step(2, raise_signal(number))
    settings = {"dataloader_num_workers": 0}
    assert main(run("out", **settings)) == 128 + number
    checkpoint = tmp_path / "out" / "checkpoint-3"
    last = f"m3-train: stopped after step 3: the same command goes on from {checkpoint}"
    assert capsys.readouterr().err.strip().splitlines()[-1] == last
    assert not (tmp_path / "out" / "final").exists()
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before

    at_step(-1, None)
    for name in ("out", "unbroken"):
        caplog.clear()
        with caplog.at_level("INFO"):
            assert main(run(name, **settings)) == 0
        assert (f"going on from {checkpoint}" in caplog.text) == (name == "out")
    assert losses(tmp_path / "out") == losses(tmp_path / "unbroken")
    weights, expected = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("out", "unbroken"))
    assert all((weights[name] == value).all() for name, value in expected.items())


def test_a_second_ctrl_c_ends_it_at_once(run, at_step, tmp_path, capsys, monkeypatch):
    now = 100.0
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now)

    def three_times():
        nonlocal now
        for later in (0, 0.5, 5):  # the second one comes too soon to be meant, as from a launcher
            now = 100.0 + later
            os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("it went on")

    at_step(0, three_times)
    assert main(run("out", dataloader_num_workers=0)) == 130
    error = capsys.readouterr().err
    assert error.strip().splitlines()[-1].endswith("there is no checkpoint yet, and the same command begins anew")
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_before_the_first_step(run, monkeypatch, capsys):
    monkeypatch.setattr("m3_training.finetune.set_seed", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    assert main(run("out")) == 143
    assert capsys.readouterr().err.strip().splitlines()[-1] == "m3-train: stopped before the first step"


def test_a_signal_that_was_ignored_at_the_start_stays_ignored(run, at_step):
    """As under nohup, and in a shell's background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        at_step(0, raise_signal(signal.SIGINT))
        assert main(run("out", max_steps=1, dataloader_num_workers=0)) == 0
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.slow
def test_two_processes_and_their_workers_stop_at_the_same_step(run, tmp_path):
    (tmp_path / "slow.py").write_text(SLOW)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", tmp_path / "slow.py"]
    process = start([*launch, *run("out", per_device_train_batch_size=1)])
    until(process, "at a step 1")
    process.send_signal(signal.SIGTERM)  # the launcher hands it on, to workers that read data too
    _, error = process.communicate(timeout=120)
    assert process.returncode not in (0, None) and "Traceback" not in error.split("torch/distributed/elastic")[0]
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    assert f"the same command goes on from {checkpoint}" in error
    assert (checkpoint / "trainer_state.json").is_file()


@NUMBERS
def test_a_signal_during_a_destructor_is_not_lost(number):
    class Sends:
        def __del__(self):
            signal.raise_signal(number)

    def interrupt(signum, frame):
        raise KeyboardInterrupt(signum)

    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt) as stop, handling_signals(interrupt):
        Sends()
        time.sleep(30)
    assert stop.value.args == (number,)
    assert time.monotonic() - begin < 20, "what waits is woken"
