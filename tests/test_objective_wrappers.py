"""The objective where more than autograd has to do with gradients: they are the plain way's, whoever computes them."""

import pytest
import torch
from test_objective import ANYRES, LAYOUTS, TINY_SCALES, assert_same, compare, gradients, tiny_batch, tiny_model
from torch.utils.checkpoint import checkpoint

from modeling_m3 import objective_m3


@pytest.fixture
def recomputed(monkeypatch):
    """How often a scale was made a checkpoint, to be computed again in the backward."""
    calls = []
    monkeypatch.setattr(objective_m3, "checkpoint", lambda *a, **k: calls.append(1) or checkpoint(*a, **k))
    return calls


def test_an_ordinary_model_computes_nothing_twice(recomputed):
    compare(tiny_model(), LAYOUTS["ragged"])
    assert not recomputed


@pytest.mark.parametrize("kind", ["flat", "anyres"])
def test_reentrant_gradient_checkpointing(kind, recomputed):
    model = tiny_model(**(ANYRES if kind == "anyres" else {}))
    model.gradient_checkpointing_enable({"use_reentrant": True})
    compare(model, LAYOUTS["ragged"])
    assert recomputed


def test_reentrant_gradient_checkpointing_with_adapters(recomputed):
    """The recipe of QLoRA: `prepare_model_for_kbit_training` asks for it, and has embeddings require gradients by a hook."""
    peft = pytest.importorskip("peft")
    model = tiny_model()
    model.is_loaded_in_4bit = True  # all that is asked
    model = peft.prepare_model_for_kbit_training(model)
    assert model.is_gradient_checkpointing
    targets = r".*language_model.*(q_proj|v_proj)"
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, init_lora_weights=False))
    compare(model.train(), LAYOUTS["ragged"])
    assert recomputed


def test_replicas_of_data_parallel(recomputed):
    """A replica computes with copies of parameters that are not its own: here, as on GPUs, made by `nn.DataParallel`'s parts."""
    model = tiny_model()
    batch = tiny_batch(model.config, LAYOUTS["ragged"], 144)
    model(**batch, matryoshka_scales=TINY_SCALES).loss.backward()
    expected = gradients(model)
    assert not recomputed
    output = replica_of(model)(**batch, matryoshka_scales=TINY_SCALES)
    output.loss.backward()
    assert_same(gradients(model), expected)
    assert recomputed


def replica_of(module):
    replica = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        replica._modules[name] = None if child is None else replica_of(child)
        if child is not None:
            setattr(replica, name, replica._modules[name])
    for name, parameter in module._parameters.items():
        setattr(replica, name, None if parameter is None else parameter.view_as(parameter))
    return replica


def test_parameters_that_are_computed_from_others(recomputed):
    model = tiny_model()
    torch.nn.utils.parametrizations.weight_norm(model.lm_head)
    compare(model, LAYOUTS["ragged"])
    torch.nn.utils.parametrize.register_parametrization(model.lm_head, "weight", torch.nn.Identity(), unsafe=True)
    compare(model, LAYOUTS["ragged"])


def test_a_trained_parameter_without_use(recomputed):
    model = tiny_model()
    model.model.language_model.unused = torch.nn.Parameter(torch.ones(3))
    compare(model, LAYOUTS["ragged"])
    assert recomputed


def test_losses_in_float16_are_not_used_before_they_are_scaled(recomputed):
    with torch.autocast("cpu", torch.float16):
        model = tiny_model()
        model(**tiny_batch(model.config, LAYOUTS["ragged"], 144), matryoshka_scales=TINY_SCALES).loss.backward()
    assert len(recomputed) == len(TINY_SCALES)
