"""The cost of training a new model against torch's own count of FLOPs, forward and backward."""

from dataclasses import replace

import pytest
import torch
from conftest import tiny_config
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from benchmarks import training_cost
from m3_training.arguments import ModelArguments
from m3_training.parameters import prepare_parameters
from modeling_m3 import M3LlavaForConditionalGeneration


WAYS = {
    "frozen": ModelArguments("unused", train="projector"),
    "lora": ModelArguments("unused", freeze_vision_tower=True, lora=True, lora_r=training_cost.LORA_RANK),
    "all": ModelArguments("unused", freeze_vision_tower=True),
}


@pytest.mark.parametrize("way", WAYS)
def test_flops_are_those_that_torch_counts(way):
    """Of a whole step at all scales."""
    config = tiny_config()
    torch.manual_seed(0)
    model = M3LlavaForConditionalGeneration(config).train()
    model.set_attn_implementation("eager")  # whose products are counted
    prepare_parameters(model, WAYS[way])
    stage = training_cost.TrainingStage("", 1, text_tokens=200, answer_tokens=120, one_scale=False, language_model=way)
    count = max(config.visual_token_scales)
    ids = torch.full((1, 200 + count), 5)
    ids[0, 3 : 3 + count] = config.image_token_id
    labels = torch.full_like(ids, -100)
    labels[0, -120:] = 5
    side = config.vision_config.image_size
    with FlopCounterMode(display=False) as counter:
        pixels = torch.randn(1, 3, side, side)
        model(
            input_ids=ids, labels=labels, pixel_values=pixels, matryoshka_scales=config.visual_token_scales
        ).loss.backward()
    ours = sum(training_cost.sample_flops(config, stage, checkpointing=False).values())
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_one_scale_costs_the_average_and_checkpointing_a_forward_more():
    config = training_cost.new_config("1b")
    every = training_cost.STAGES[2]
    whole, one = (training_cost.sample_flops(config, replace(every, one_scale=one)) for one in (False, True))
    assert whole["language model"] == pytest.approx(4 * one["language model"])
    assert whole["vision tower"] == one["vision tower"]
    without = training_cost.sample_flops(config, every, checkpointing=False)
    assert whole["language model"] == pytest.approx(4 / 3 * without["language model"], rel=0.1)


def test_memory_is_that_of_the_parameters():
    """An 8B model with AdamW: 16 bytes for each trained parameter, 4 for each other."""
    config = training_cost.new_config("8b")
    frozen, lora, whole = (training_cost.held_bytes(config, stage, 1) for stage in training_cost.STAGES)
    parameters = 8.03e9  # Llama 3 8B
    assert frozen == pytest.approx(4 * (parameters + 0.43e9) + 16 * 0.02e9, rel=0.02)
    assert whole == pytest.approx(16 * parameters + 4 * 0.43e9, rel=0.02)
    assert frozen < lora < whole and training_cost.held_bytes(config, training_cost.STAGES[2], 8) == whole / 8


def test_command_and_its_refusals():
    run = CliRunner().invoke(training_cost.app, ["--language-model", "1b", "--gpus", "4"])
    assert run.exit_code == 0 and "1b on 4 x A100 at 40% of its peak, scales [1, 9, 81, 729]" in run.output
    wrong = CliRunner().invoke(training_cost.app, ["--language-model", "2b"])
    assert wrong.exit_code == 2 and "2b" in wrong.output
