"""Runs under DeepSpeed, on two processes: the losses, the validation and the weights of one process without it."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_training_finetune import arguments, evaluations, losses, records

from m3_training.finetune import main


pytestmark = [
    pytest.mark.deepspeed,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed; CI has a stage for it"),
]


@pytest.fixture(scope="module")
def alone(converted, tmp_path_factory):
    """The settings of a run, and the folder of it in one process."""
    folder = tmp_path_factory.mktemp("deepspeed")
    (folder / "data.json").write_text(json.dumps(records(4, 2)))
    settings = {"data_path": folder / "data.json", "eval_data_path": folder / "data.json", "learning_rate": 1e-3}
    settings |= {"num_train_epochs": 1, "optim": "adamw_torch"}
    assert main(arguments(converted["llava15-m3"], folder / "one", **settings)) == 0
    return settings, folder / "one"


@pytest.mark.parametrize("checkpointing", [(), ("--gradient_checkpointing",)], ids=["", "checkpointing"])
@pytest.mark.parametrize("stage", [2, 3])
def test_two_processes_equal_one(stage, checkpointing, alone, converted, tmp_path):
    settings, one = alone
    config = dict.fromkeys(("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_clipping"), "auto")
    config |= {"gradient_accumulation_steps": "auto", "zero_allow_untested_optimizer": True}
    config["zero_optimization"] = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True}
    (tmp_path / "deepspeed.json").write_text(json.dumps(config))
    run = arguments(
        converted["llava15-m3"], tmp_path / "two", *checkpointing, deepspeed=tmp_path / "deepspeed.json", **settings
    )
    run[run.index("--per_device_train_batch_size") + 1] = "1"
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    result = subprocess.run(
        [sys.executable, *launch, str(Path(__file__).with_name("deepspeed_on_cpu.py")), *run],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    for name in ("loss", "loss_at_1", "loss_at_9"):
        found, expected = ([entry[name] for entry in losses(output)] for output in (tmp_path / "two", one))
        assert len(expected) == 3 and found == pytest.approx(expected, rel=1e-4)
    (found,), (expected,) = evaluations(tmp_path / "two"), evaluations(one)
    assert found == pytest.approx(expected, rel=1e-4)
    weights, reference = (load_file(output / "final" / "model.safetensors") for output in (tmp_path / "two", one))
    torch.testing.assert_close(weights, reference, rtol=1e-3, atol=1e-3)
