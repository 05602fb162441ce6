"""The Matryoshka objective: the original's losses and gradients, and those of the plain way in every mode of training."""

import json
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from conftest import GOLDENS, golden_tensors, picture, tiny_config
from transformers.modeling_outputs import BaseModelOutputWithPast

from m3_conversion.mapping import CHECKPOINT_KEYS, remap_key
from modeling_m3 import M3LlavaForConditionalGeneration, objective_m3
from modeling_m3.visual_tokens import tile_grid


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


# Against the plain way: every scale by itself, with the inputs made for it

TINY_SCALES = [1, 9, 36, 144]
ANYRES = {"image_grid_pinpoints": [[24, 48], [48, 24], [48, 48]], "patch_merge_type": "spatial_unpad"}
SIZES = ((30, 20), (20, 47), (5, 48))  # (height, width), in turn
# What a batch looks like: per prompt its numbers of text tokens, with None for an image.
LAYOUTS = {
    "one image each": [[3, None, 5], [2, None, 6]],
    "ragged": [[3, None, 5, None, 4], [None, 9], [4, None, 2]],
    "adjacent images": [[2, None, None, 5], [None, None, None, 3]],
    "a row of text": [[3, None, 5], [11]],
    "text that is the longest row at some scales": [[3, None, 5], [60]],
}


def tiny_model(**overrides):
    torch.manual_seed(0)
    return M3LlavaForConditionalGeneration(tiny_config(**overrides)).train()


def tiny_batch(config, rows, scale, padding_side="right"):
    """What a processor makes of such prompts at a scale. Every text token is to be predicted but a row's first."""
    generator = torch.Generator().manual_seed(1)
    ids, layouts, sizes = [], [], []
    for row in rows:
        ids.append(torch.empty(0, dtype=torch.long))
        for part in row:
            if part is None:
                sizes.append(SIZES[len(sizes) % len(SIZES)])
                pinpoints = config.image_grid_pinpoints
                layouts.append(config.image_layout(pinpoints and tile_grid(sizes[-1], pinpoints, 24), sizes[-1]))
                new = torch.full((layouts[-1].count(scale),), config.image_token_id)
            else:
                new = torch.randint(3, 90, (part,), generator=generator)
            ids[-1] = torch.cat([ids[-1], new])
    input_ids, labels, mask = (
        torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=value, padding_side=padding_side)
        for values, value in (
            (ids, 0),
            ([torch.cat([torch.tensor([-100]), row[1:]]) for row in ids], -100),
            ([torch.ones_like(row) for row in ids], 0),
        )
    )
    labels = labels.masked_fill(input_ids == config.image_token_id, -100)
    batch = {"input_ids": input_ids, "attention_mask": mask, "labels": labels}
    if sizes:
        tiles = [torch.randn(layout.num_tiles, 3, 24, 24, generator=generator) for layout in layouts]
        pixels = torch.nn.utils.rnn.pad_sequence(tiles, batch_first=True)
        batch |= {
            "pixel_values": pixels[:, 0] if config.image_grid_pinpoints is None else pixels,
            "image_sizes": torch.tensor(sizes),
            "num_visual_tokens": torch.full((len(sizes),), scale),
        }
    return batch


def gradients(model):
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same(ours, plain, tolerance=1e-5):
    """Relative to each parameter, or to a thousandth of them all where there is next to nothing (biases of keys)."""
    assert ours.keys() == plain.keys()
    least = 1e-3 * torch.stack([gradient.norm() for gradient in plain.values()]).norm()
    for name, expected in plain.items():
        assert (ours[name] - expected).norm() <= tolerance * max(expected.norm(), least), name


def compare(model, rows, tolerance=1e-5, padding_side="right", context=nullcontext, scales=TINY_SCALES, **kwargs):
    """Asserts that losses and gradients over `scales` are those of the plain way."""
    losses = []
    for scale in scales:
        with context():
            losses.append(model(**tiny_batch(model.config, rows, scale, padding_side), **kwargs).loss)
    torch.stack(losses).mean().backward()
    expected = gradients(model)
    assert expected
    with context():
        batch = tiny_batch(model.config, rows, max(TINY_SCALES), padding_side)
        output = model(**batch, matryoshka_scales=scales, **kwargs)
    output.loss.backward()
    torch.testing.assert_close(output.scale_losses, torch.stack(losses).detach(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(output.loss, output.scale_losses.mean(), rtol=1e-6, atol=1e-6)
    assert not output.scale_losses.requires_grad
    assert_same(gradients(model), expected, tolerance)


def before_each_call(module, call):
    """As a forward hook, which would make gradients be taken in another way."""
    forward = module.forward
    module.forward = lambda *args, **kwargs: (call(), forward(*args, **kwargs))[1]


@pytest.fixture(params=["in forward", "native graph"])
def strategy(request, monkeypatch):
    """Both ways in which gradients are taken."""
    monkeypatch.setattr(objective_m3, "_is_plain", lambda *_: request.param == "in forward")


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("kind", ["flat", "anyres"])
@pytest.mark.parametrize("rows", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_gradients_equal_the_plain_way(rows, kind, padding_side, strategy):
    compare(tiny_model(**(ANYRES if kind == "anyres" else {})), rows, padding_side=padding_side)


@pytest.mark.parametrize("frozen", [
    ("vision_tower",), ("multi_modal_projector",), ("vision_tower", "multi_modal_projector"),
    ("language_model", "lm_head"), ("language_model", "lm_head", "image_newline"),
])  # fmt: skip
def test_frozen_parts(frozen, strategy):
    model = tiny_model(**ANYRES)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in frozen))
    compare(model, LAYOUTS["ragged"])


def test_tied_embeddings(strategy):
    model = tiny_model(tie_word_embeddings=True)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    compare(model, LAYOUTS["ragged"])


def test_gradient_checkpointing(strategy):
    model = tiny_model()
    model.gradient_checkpointing_enable()
    compare(model, LAYOUTS["ragged"])


def test_autocast(strategy):
    # Each way rounds to bfloat16 at other places; measured: 0.0064.
    compare(tiny_model(), LAYOUTS["ragged"], tolerance=0.02, context=lambda: torch.autocast("cpu", torch.bfloat16))


def test_adapters(strategy):
    peft = pytest.importorskip("peft")
    targets = r".*language_model.*(q_proj|v_proj)|.*vision_tower.*q_proj"
    adapted = peft.get_peft_model(tiny_model(), peft.LoraConfig(target_modules=targets, init_lora_weights=False))
    compare(adapted, LAYOUTS["ragged"])


@pytest.mark.parametrize("scales", [[144], [9], [9, 1], [36, 144, 1]])
def test_any_choice_of_scales(scales, strategy):
    compare(tiny_model(), LAYOUTS["ragged"], scales=scales)


def test_other_samplings(strategy):
    compare(tiny_model(), LAYOUTS["ragged"], visual_token_sampling="spatial")


def test_the_number_of_items_divides_the_sum(strategy):
    compare(tiny_model(), LAYOUTS["ragged"], num_items_in_batch=torch.tensor(100))


@pytest.mark.parametrize("labels", [True, False], ids=["both are given", "alone"])
@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("scales", [None, TINY_SCALES], ids=["one scale", "all"])
def test_labels_that_are_shifted_already_give_the_same_loss(scales, padding_side, labels, strategy):
    model = tiny_model()
    batch = tiny_batch(model.config, LAYOUTS["ragged"], 144, padding_side)
    expected = model(**batch, matryoshka_scales=scales, num_items_in_batch=torch.tensor(7)).loss
    expected.backward()
    plain = gradients(model)
    shifted = torch.cat([batch["labels"][:, 1:], torch.full((3, 1), -100)], dim=1)
    batch["labels"] = shifted if labels else None  # as transformers gives them to a model under sequence parallelism
    loss = model(**batch, shift_labels=shifted, matryoshka_scales=scales, num_items_in_batch=torch.tensor(7)).loss
    loss.backward()
    assert torch.equal(loss, expected)
    assert_same(gradients(model), plain, 0)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("rows", [[[3, None, 5], [2, None, 6]], [[4], [4]], [[2, 3, None, 1], [6, None]]], ids=str)
def test_the_last_shifted_label_may_be_of_a_token_that_is_not_there(rows, masked, strategy):
    """As of data that was cut into inputs and labels before; what is predicted is that of whole sequences."""
    model = tiny_model()
    whole = tiny_batch(model.config, [[*row, 1] for row in rows], 144)
    cut = tiny_batch(model.config, [[*row, 1] for row in rows], 144)
    cut |= {name: whole[name][:, :-1] for name in ("input_ids", "attention_mask")}
    cut |= {"labels": None, "shift_labels": whole["labels"][:, 1:]}
    for inputs in (whole, cut):
        inputs |= {} if masked else {"attention_mask": None}
    for scales in (None, TINY_SCALES):
        losses = [model(**inputs, matryoshka_scales=scales).loss for inputs in (whole, cut)]
        torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-6)


class Echo(torch.nn.Module):
    """Stands for a language model: what it is given can be compared at once, and thousands of tokens cost nothing."""

    def forward(self, inputs_embeds, **kwargs):
        return BaseModelOutputWithPast(last_hidden_state=inputs_embeds)


@pytest.mark.parametrize(
    ("name", "padding_side"),
    [
        ("llava15-m3", "right"),
        ("llava-next-m3", "left"),
        pytest.param("llava15-m3", "left", marks=pytest.mark.slow),
        pytest.param("llava-next-m3", "right", marks=pytest.mark.slow),
    ],
)
def test_inputs_are_cut_to_what_the_processor_writes(name, padding_side, fresh):
    """Real pictures and prompts of both families."""
    model, processor = fresh(name)
    embed_tokens = model.get_input_embeddings()
    model.model.get_input_embeddings = lambda: embed_tokens
    model.model.language_model = Echo()
    pictures = [picture("img3_1000x300.png"), picture("img4_200x700.png"), picture("img5_97x53.png")]
    prompts = [
        "Compare <image><image> briefly. A: no",
        "What is <image>\nhere? A: a code of many letters",
        "No picture.",
    ]

    def prepare(scale):
        inputs = processor(
            images=pictures,
            text=prompts,
            num_visual_tokens=scale,
            padding=True,
            padding_side=padding_side,
            return_tensors="pt",
        )
        unlabelled = (inputs["input_ids"] == model.config.image_token_id) | (inputs["attention_mask"] == 0)
        unlabelled |= inputs["input_ids"] == processor.tokenizer.bos_token_id
        return inputs | {"labels": inputs["input_ids"].masked_fill(unlabelled, -100)}

    def whole_rows(inputs):
        return [row[mask.bool()].tolist() for row, mask in zip(inputs["input_ids"], inputs["attention_mask"])]

    cut = []
    hook = model.model.register_forward_pre_hook(lambda module, args, kwargs: cut.append(kwargs), with_kwargs=True)
    with torch.no_grad():
        output = model(**prepare(576), matryoshka_scales=[576, 144, 36, 9, 1])
        hook.remove()
        for scale, kwargs, loss in zip([576, 144, 36, 9, 1], cut, output.scale_losses):
            inputs = prepare(scale)
            assert whole_rows(kwargs) == whole_rows(inputs)
            assert kwargs["input_ids"].shape == inputs["input_ids"].shape
            assert loss.item() == pytest.approx(model(**inputs).loss.item(), abs=1e-5)


# How it is computed


def test_images_are_encoded_once(strategy):
    model, calls = tiny_model(**ANYRES), []
    for part in (model.model.vision_tower, model.model.multi_modal_projector):
        part.register_forward_hook(lambda module, *_: calls.append(type(module).__name__))
    batch = tiny_batch(model.config, LAYOUTS["ragged"], 144)
    model(**batch, matryoshka_scales=TINY_SCALES).loss.backward()
    assert calls == ["CLIPVisionModel", "M3LlavaMultiModalProjector"]


def test_one_graph_at_a_time():
    """What autograd keeps when a scale begins is the encoder's graph, and never more than one scale's on top of it."""
    model = tiny_model()
    batch = tiny_batch(model.config, LAYOUTS["one image each"], 144)
    kept, peak, at_start = 0, 0, []

    class Saved:
        def __init__(self, tensor):
            nonlocal kept, peak
            self.tensor = tensor
            kept += tensor.nbytes
            peak = max(peak, kept)

        def __del__(self):
            nonlocal kept
            kept -= self.tensor.nbytes

    before_each_call(model.model.language_model, lambda: at_start.append(kept))
    peaks = []
    for arguments in ({"matryoshka_scales": TINY_SCALES}, {}):
        peak = 0
        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
            loss = model(**batch, **arguments).loss
        encoder, *others = at_start
        assert encoder > 0
        assert len(others) == (3 if arguments else 0)
        assert all(start - encoder < 0.01 * encoder for start in others)
        loss.backward()
        del loss
        assert kept == 0
        peaks.append(peak)
        at_start.clear()
    assert peaks[0] <= 1.01 * peaks[1]


def test_logits_are_computed_where_there_is_a_label():
    model, rows = tiny_model(), []
    model.lm_head.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape))
    batch = tiny_batch(model.config, LAYOUTS["ragged"], 144)
    supervised = int((batch["labels"][:, 1:] != -100).sum())
    output = model(**batch, matryoshka_scales=TINY_SCALES)
    assert output.logits is None
    assert rows == [(supervised, 32)] * 4


def test_gradients_accumulate_and_are_scaled(strategy):
    model = tiny_model()
    batch = tiny_batch(model.config, LAYOUTS["ragged"], 144)
    model(**batch, matryoshka_scales=TINY_SCALES).loss.backward()
    once = gradients(model)
    for factor in (0.5, 3):
        (factor * model(**batch, matryoshka_scales=TINY_SCALES).loss).backward()
    assert_same(gradients(model), {name: 3.5 * gradient for name, gradient in once.items()})


def test_evaluation_takes_no_gradients():
    model = tiny_model()
    batch = tiny_batch(model.config, LAYOUTS["ragged"], 144)
    expected = model(**batch, matryoshka_scales=TINY_SCALES)
    with torch.no_grad():
        output = model(**batch, matryoshka_scales=TINY_SCALES)
    assert not output.loss.requires_grad
    assert torch.equal(output.scale_losses, expected.scale_losses)
    model.requires_grad_(False)
    assert not model(**batch, matryoshka_scales=TINY_SCALES).loss.requires_grad


def test_a_second_backward_is_refused():
    model = tiny_model()
    loss = model(**tiny_batch(model.config, LAYOUTS["ragged"], 144), matryoshka_scales=TINY_SCALES).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="already"):
        loss.backward()


def test_batches_of_text_are_computed_once_and_leave_no_parameter_without_a_gradient():
    model, calls = tiny_model(**ANYRES), []
    before_each_call(model.model.language_model, lambda: calls.append(1))
    batch = tiny_batch(model.config, [[7], [4]], 144)
    output = model(**batch, matryoshka_scales=TINY_SCALES)
    assert len(calls) == 1
    output.loss.backward()
    ours = gradients(model)
    loss = model(**batch).loss
    loss.backward()
    assert output.scale_losses.tolist() == [loss.item()] * 4
    expected = gradients(model)
    of_images = {name: ours.pop(name) for name in ours.keys() - expected.keys()}
    assert {"model.image_newline", "model.multi_modal_projector.linear_1.bias"} < of_images.keys()
    assert not any(gradient.any() for gradient in of_images.values())
    assert_same(ours, expected)


def test_a_missing_mask_is_made_where_rows_become_ragged():
    model = tiny_model()
    rows = [[2, None, 3], [2 + 144 + 3]]
    for batch in (tiny_batch(model.config, rows, 144), tiny_batch(model.config, rows[:1], 144)):
        assert batch["attention_mask"].all()
        expected = model(**batch, matryoshka_scales=TINY_SCALES).scale_losses
        del batch["attention_mask"], batch["num_visual_tokens"]  # None: the finest
        assert torch.equal(model(**batch, matryoshka_scales=TINY_SCALES).scale_losses, expected)


def test_inputs_may_be_finer_than_the_scales_and_differ():
    model = tiny_model()
    fine, coarse = (tiny_batch(model.config, [[3, None, 5]], scale) for scale in (144, 36))
    mixed = {
        key: torch.nn.utils.rnn.pad_sequence(
            [fine[key][0], coarse[key][0]], batch_first=True, padding_value=-100 if key == "labels" else 0
        )
        for key in ("input_ids", "attention_mask", "labels")
    }
    mixed["pixel_values"] = torch.cat([fine["pixel_values"], coarse["pixel_values"]])
    output = model(**mixed, num_visual_tokens=[144, 36], matryoshka_scales=[9, 36])
    expected = [model(**tiny_batch(model.config, [[3, None, 5]], scale)).loss.item() for scale in (9, 36)]
    assert output.scale_losses.tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_cache_is_not_kept(use_cache):
    model = tiny_model()
    batch = tiny_batch(model.config, LAYOUTS["ragged"], 144)
    output = model(**batch, matryoshka_scales=TINY_SCALES, use_cache=use_cache)
    assert output.past_key_values is None
    assert torch.equal(output.loss, model(**batch, matryoshka_scales=TINY_SCALES).loss)


def test_scales_as_numbers_of_numpy_and_torch():
    model = tiny_model()
    batch = tiny_batch(model.config, LAYOUTS["ragged"], 144)
    expected = model(**batch, matryoshka_scales=[9, 36]).loss
    for scales in (np.array([9, 36]), torch.tensor([9, 36]), (9, np.int64(36))):
        assert torch.equal(model(**batch, matryoshka_scales=scales).loss, expected)


def test_the_output_as_a_tuple():
    model = tiny_model()
    batch = tiny_batch(model.config, LAYOUTS["ragged"], 144)
    output = model(**batch, matryoshka_scales=TINY_SCALES)
    loss, scale_losses = model(**batch, matryoshka_scales=TINY_SCALES, return_dict=False)
    assert torch.equal(loss, output.loss) and torch.equal(scale_losses, output.scale_losses)


def test_the_ordinary_loss_is_untouched():
    model = tiny_model()
    output = model(**tiny_batch(model.config, LAYOUTS["ragged"], 36))
    assert output.scale_losses is None and "scale_losses" not in output
    assert output.logits is not None


# What is refused


@pytest.mark.parametrize(("change", "message"), [
    ({"matryoshka_scales": [1, 16]}, "16.*Choose from"),
    ({"matryoshka_scales": []}, "at least one"),
    ({"matryoshka_scales": [9, 1, 9]}, "none twice"),
    ({"labels": None}, "pass labels"),
    ({"input_ids": None, "inputs_embeds": torch.zeros(2, 3, 32)}, "needs input_ids"),
    ({"inputs_embeds": torch.zeros(2, 3, 32)}, "inputs_embeds"),
    ({"position_ids": torch.zeros(2, 3, dtype=torch.long)}, "position_ids"),
    ({"past_key_values": ()}, "past_key_values"),
    ({"mm_encoder_outputs": {}}, "mm_encoder_outputs"),
    ({"shift_labels": torch.zeros(2, 3, dtype=torch.long)}, r"Labels of shape \(2, 3\) for input_ids of shape \(2,"),
    ({"cu_seq_lens_q": torch.zeros(3, dtype=torch.int)}, r"cu_seq_lens_q of shape \(3,\)"),
    ({"seq_idx": torch.zeros(2, 3, dtype=torch.int)}, r"seq_idx of shape \(2, 3\)"),
    ({"attention_mask": torch.ones(2, 1, 3, 3)}, r"attention_mask of shape \(2, 1, 3, 3\)"),
    ({"pixel_values": None, "num_visual_tokens": None}, "placeholders for 0 image"),
    ({"num_visual_tokens": [144, 36]}, "placeholders for 2 image"),
    ({"num_visual_tokens": [144, 100]}, "100"),
])  # fmt: skip
def test_what_cannot_be_cut_is_refused(change, message):
    model = tiny_model()
    inputs = tiny_batch(model.config, LAYOUTS["one image each"], 144) | {"matryoshka_scales": [1, 9]}
    with pytest.raises(ValueError, match=message):
        model(**inputs | change)


def test_scales_finer_than_the_inputs_are_refused():
    model = tiny_model()
    inputs = tiny_batch(model.config, LAYOUTS["one image each"], 36)
    with pytest.raises(ValueError, match="made at num_visual_tokens=36.*Make them at 144"):
        model(**inputs, matryoshka_scales=[1, 144])


def test_labels_on_placeholders_are_refused():
    model = tiny_model()
    inputs = tiny_batch(model.config, LAYOUTS["one image each"], 144)
    inputs["labels"] = inputs["input_ids"].clone()
    with pytest.raises(ValueError, match="288 placeholder.*-100 where input_ids is 98"):
        model(**inputs, matryoshka_scales=[1, 9])
