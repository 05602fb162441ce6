"""Every one of transformers' training arguments: it works, or is refused in a line before anything is loaded."""

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from test_training_finetune import arguments, losses, records
from transformers import TrainingArguments

from m3_training.finetune import main
from m3_training.options import REFUSED, WORK


DOCS = Path(__file__).parents[1] / "docs" / "training.md"
CHECKED = {"optim", "train_sampling_strategy"}  # by value
OLD_AND_NEW = {"activation_checkpointing", "activation_checkpointing_kwargs"}  # not in 5.16


def test_every_argument_of_this_release_is_decided_on_and_no_other():
    own = {field.name for field in fields(TrainingArguments)}
    assert not WORK & REFUSED.keys()
    assert own <= WORK | REFUSED.keys() | CHECKED
    assert WORK | REFUSED.keys() | CHECKED <= own | OLD_AND_NEW


def test_the_documentation_says_the_same():
    text = DOCS.read_text(encoding="utf-8")
    refused = text[text.index("| refused |") :].split("\n\n")[0]
    named = set(re.findall(r"`(\w+)`", "\n".join(row.split("|")[1] for row in refused.splitlines()[2:])))
    assert named == REFUSED.keys() | CHECKED


def slow(options):
    return pytest.param(options, marks=pytest.mark.slow)


@pytest.fixture
def run(converted, tmp_path, capsys):
    """Runs the command on six records. Returns its status, its last line on stderr, and the losses it logged."""
    data = tmp_path / "data.json"
    data.write_text(json.dumps(records(4, 2)))

    def start(*options, output="out", **settings):
        output = tmp_path / output
        settings = {"data_path": data, "num_train_epochs": 1, "learning_rate": 1e-3, **settings}
        status = main(arguments(converted["llava15-m3"], output, *options, **settings))
        logged = losses(output) if (output / "trainer_state.json").exists() else None
        assert (output / "final").exists() == (status == 0)
        return status, capsys.readouterr().err.strip().splitlines()[-1:], logged

    return start


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("--label_smoothing_factor 0.1", "label_smoothing_factor=0.1 is refused: the Matryoshka loss is"),
        ("--use_liger_kernel", "use_liger_kernel=True is refused: liger has no kernels for M3."),
        ("--bf16_full_eval", "bf16_full_eval=True is refused: it would round the weights"),
        ("--fp16_full_eval", "fp16_full_eval=True is refused"),
        ("--auto_find_batch_size", "auto_find_batch_size=True is refused"),
        ("--dataloader_in_order false --dataloader_num_workers 2", "dataloader_in_order=False is refused"),
        ('--accelerator_config {"split_batches":true}', "is refused: it changes which process reads which sample"),
        ("--save_only_model", "save_only_model=True is refused: the run could not go on"),
        ("--enable_jit_checkpoint", "enable_jit_checkpoint=True is refused"),
        ("--resume_from_checkpoint here", "resume_from_checkpoint='here' is refused: the same command goes on"),
        ("--push_to_hub", "push_to_hub=True is refused: the folder that is for the Hub is written at the end"),
        ("--hub_model_id a/b", "hub_model_id='a/b' is refused"),
        ("--hub_strategy end", "is refused: the folder that is for the Hub"),
        ("--optim lomo", "optim='lomo' is refused"),
        ("--optim galore_adamw --optim_target_modules all", "is refused"),
        ("--optim stable_adamw", "You need to install `torch-optimi`"),
        ("--optim adamw_torch_xla", "optim='adamw_torch_xla' is refused"),
        ("--train_sampling_strategy group_by_length", "batches are made by group_by_modality_length"),
        ("--train_sampling_strategy group_by_length --group_by_modality_length false", "'group_by_length' is refused"),
        ("--train_sampling_strategy sequential", "With --group_by_modality_length false it may be"),
        ("--dataloader_persistent_workers", "set dataloader_num_workers"),
        ("--eval_strategy steps", "eval_dataset"),
        ("--deepspeed none.json", "deepspeed"),
    ],
)
def test_what_would_not_do_what_it_says_is_refused_in_a_line(options, reason, run):
    status, line, _ = run(*options.split())
    assert status == 1
    assert line[0].startswith("m3-train: ") and reason in line[0]


def test_two_gpus_in_one_process_are_refused_with_the_line_that_starts_two(run, monkeypatch):
    """Else `Trainer` takes `nn.DataParallel`, which trained only a part of the model."""
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda _: 2))
    status, line, _ = run()
    assert status == 1
    assert "`torchrun --nproc_per_node 2 -m m3_training.finetune`" in line[0]


@pytest.mark.parametrize("options", [
    "--gradient_checkpointing",
    "--ddp_find_unused_parameters true --remove_unused_columns true --label_names answer --include_num_input_tokens_seen true",
    slow('--gradient_checkpointing --gradient_checkpointing_kwargs {"use_reentrant":true}'),
    slow("--use_cache true"),
    slow("--full_determinism"),
    slow("--max_grad_norm 0"),
    slow("--average_tokens_across_devices false"),
])  # fmt: skip
def test_what_changes_no_loss_changes_none(options, run, plain_losses):
    status, _, logged = run(*options.split(), lr_scheduler_type="constant", max_grad_norm=0)
    assert status == 0
    assert [entry["loss"] for entry in logged] == pytest.approx(plain_losses, rel=1e-4)


def test_a_compiled_model_is_written(run, monkeypatch):
    """Its prefix came in the way of the final folder. It is wrapped as if it were compiled, which takes two minutes here."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")  # which the arguments set, for this process and all it does
    with torch._dynamo.config.patch(disable=True):  # what monkeypatch puts back there does not last
        assert run("--torch_compile", max_steps=1)[0] == 0


@pytest.fixture(scope="module")
def plain_losses(converted, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    (folder / "data.json").write_text(json.dumps(records(4, 2)))
    settings = {"data_path": folder / "data.json", "num_train_epochs": 1, "learning_rate": 1e-3}
    settings |= {"lr_scheduler_type": "constant", "max_grad_norm": 0}
    assert main(arguments(converted["llava15-m3"], folder / "out", **settings)) == 0
    return [entry["loss"] for entry in losses(folder / "out")]


@pytest.mark.parametrize("options", [
    "--bf16", "--gradient_accumulation_steps 2",
    "--lora --lora_r 4 --freeze_vision_tower --freeze_projector --gradient_checkpointing",
    slow("--neftune_noise_alpha 5"), slow("--optim sgd"), slow("--optim adafactor"), slow("--optim paged_adamw_8bit"),
    slow("--optim lion_8bit"), slow("--group_by_modality_length false"),
    slow("--train_sampling_strategy sequential --group_by_modality_length false"), slow("--lr_scheduler_type cosine"),
])  # fmt: skip
def test_what_changes_how_it_trains_trains(options, run, plain_losses):
    status, _, logged = run(*options.split())
    found = [entry["loss"] for entry in logged]
    assert status == 0
    assert found != pytest.approx(plain_losses, rel=1e-5) and found[-1] < found[0]


def test_a_parameter_that_gets_no_gradient_ends_the_run(converted, tmp_path, monkeypatch):
    """Whatever the reason: here a wrapper that computes with copies, as none known does any more."""
    from modeling_m3 import M3LlavaModel

    forward = M3LlavaModel.forward
    monkeypatch.setattr(M3LlavaModel, "forward", lambda self, **kwargs: forward(detached(self), **kwargs))
    data = tmp_path / "data.json"
    data.write_text(json.dumps(records(2)))
    with pytest.raises(RuntimeError, match=r"got no gradient in step 1, model\.language_model\.layers\.0"):
        main(arguments(converted["llava15-m3"], tmp_path / "out", data_path=data))


def detached(model):
    layer = model.language_model.layers[0].self_attn.q_proj
    layer.forward = lambda hidden: torch.nn.functional.linear(hidden, layer.weight.detach())
    return model
