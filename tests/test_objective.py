"""The Matryoshka objective: the original's losses and gradients, and those of the plain way in every mode of training."""

import json

import pytest
import torch
from conftest import GOLDENS, golden_tensors, picture

from conversion.mapping import CHECKPOINT_KEYS, remap_key


TRAIN = json.loads((GOLDENS / "expected" / "train.llava15-m3.json").read_text(encoding="utf-8"))
SCALES = [1, 9, 36, 144, 576]
PARTS = {
    "vision_tower": "vision_tower",
    "mm_projector": "multi_modal_projector",
    "embed_tokens": "embed_tokens",
    "llm_layers": "language_model.layers",
    "norm": "language_model.norm",
    "lm_head": "lm_head",
}
CASES = [pytest.param(case, id=case["id"]) for case in TRAIN["cases"]]


def golden_inputs(case, processor, image_token_id):
    """The stored token ids and labels, with 576 placeholders for every mark, right padded, and the pictures."""
    rows = {"input_ids": [], "labels": [], "attention_mask": []}
    for ids, labels, mask in zip(case["input_ids"], case["labels"], case["attention_mask"]):
        valid = [index for index, keep in enumerate(mask) if keep]
        spread = [index for index in valid for _ in range(576 if ids[index] == -200 else 1)]
        rows["input_ids"].append(
            torch.tensor([image_token_id if ids[index] == -200 else ids[index] for index in spread])
        )
        rows["labels"].append(torch.tensor([labels[index] for index in spread]))
        rows["attention_mask"].append(torch.ones(len(spread), dtype=torch.long))
    padding = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    inputs = {
        name: torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=padding[name])
        for name, values in rows.items()
    }
    pictures = [picture(sample["image"]) for sample in case["samples"] if sample["image"]]
    return inputs | {"pixel_values": processor.image_processor(pictures, return_tensors="pt")["pixel_values"]}


@pytest.fixture
def fresh(converted):
    """A golden model to train, and its processor."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    import modeling_m3  # noqa: F401 - registers the classes

    def load(name="llava15-m3"):
        model = AutoModelForImageTextToText.from_pretrained(converted[name], attn_implementation="eager").train()
        # The original has no rows for tokens that are new here, which would enter the softmax: 0.001 of loss.
        vocabulary = json.loads((GOLDENS / name / "config.json").read_text(encoding="utf-8"))["vocab_size"]
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight[:vocabulary].detach().clone())
        model.config.text_config.vocab_size = vocabulary
        return model, AutoProcessor.from_pretrained(converted[name], backend="pil")

    return load


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_of_the_original(case, fresh):
    model, processor = fresh()
    inputs = golden_inputs(case, processor, model.config.image_token_id)
    output = model(**inputs, matryoshka_scales=SCALES)
    output.loss.backward()

    assert output.logits is None
    assert output.loss.item() == pytest.approx(case["loss"], abs=1e-4)
    assert output.scale_losses.tolist() == pytest.approx([entry["loss"] for entry in case["per_scale"]], abs=1e-4)
    for part, norm in case["grad_norm_no_grad_removed"].items():
        gradients = [p.grad for name, p in model.named_parameters() if PARTS[part] in name and p.grad is not None]
        assert torch.stack([g.square().sum() for g in gradients]).sum().sqrt().item() == pytest.approx(norm, rel=1e-4)
    stored = golden_tensors("train.llava15-m3")
    prefix = f"{case['id']}/no_grad_removed/grad/"
    slices = {key.removeprefix(prefix): value for key, value in stored.items() if key.startswith(prefix)}
    assert len(slices) == 7
    for key, expected in slices.items():
        gradient = model.get_parameter(remap_key(key, CHECKPOINT_KEYS)).grad.flatten()
        gradient = gradient[:: max(1, gradient.numel() // 512)]
        assert (gradient - expected).norm() <= 1e-4 * expected.norm(), key
    unused = [name for name, p in model.named_parameters() if p.grad is None]
    assert len(unused) == case["params_without_grad_no_grad_removed"]["count"]
    assert all("encoder.layers.3." in name or "post_layernorm" in name for name in unused)


@pytest.mark.parametrize("case", CASES)
def test_four_steps_of_the_original(case, fresh):
    model, processor = fresh()
    inputs = golden_inputs(case, processor, model.config.image_token_id)
    setup = case["adamw_setup"]
    rates = {"vision_tower": setup["mm_vision_tower_lr"], "multi_modal_projector": setup["mm_projector_lr"]}
    groups = []
    for name, parameter in model.named_parameters():
        rate = next((rate for part, rate in rates.items() if part in name), setup["lr"])
        decays = not name.endswith("bias") and "norm" not in name
        groups.append({"params": [parameter], "lr": rate, "weight_decay": setup["weight_decay"] * decays})
    optimizer = torch.optim.AdamW(groups, betas=setup["betas"], eps=setup["eps"])
    losses = []
    for _ in range(4):
        loss = model(**inputs, matryoshka_scales=SCALES).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == pytest.approx(case["adamw_losses_no_grad_removed"], abs=1e-3)
