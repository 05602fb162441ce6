"""New models' training: the projector alone, its file in the original's format, the recipe's data, stages and resuming."""

import json
from pathlib import Path

import pytest
import torch
from conftest import tiny_config
from peft import PeftModel
from test_training_finetune import arguments, losses, records

from m3_training import new_model
from m3_training.adapter import write_adapter
from m3_training.arguments import CONFIGS, ModelArguments, parse
from m3_training.finetune import finetune, main
from m3_training.m3_tiny.scenes import SHAPES
from m3_training.new_model_answers import GENERAL_QUESTIONS
from m3_training.new_model_lessons import (
    CHATS,
    LessonCollator,
    Lessons,
    captions,
    facts,
    held_out,
    questions,
    scene_of,
    see_scenes,
)
from m3_training.new_model_words import train_on_words
from m3_training.parameters import part_of, prepare_parameters
from m3_training.projector import read_projector, write_projector
from modeling_m3 import M3LlavaForConditionalGeneration, default_checkpoint, load


# As the original's `build_vision_projector` makes them: a layer, or a sequence with activations at the odd places.
ORIGINAL_KEYS = {
    1: {"model.mm_projector.weight", "model.mm_projector.bias"},
    2: {f"model.mm_projector.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")},
    3: {f"model.mm_projector.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")},
}


def tiny_model(depth=2, seed=0):
    torch.manual_seed(seed)
    return M3LlavaForConditionalGeneration(tiny_config(multimodal_projector_depth=depth))


def original_projector(file, size_in, size_out):
    """The original's class for a projector's file, in plain torch, with the file's weights loaded strictly."""
    stored = torch.load(file, weights_only=True)
    weights = {name.split("mm_projector.")[1]: tensor for name, tensor in stored.items()}  # its `get_w`
    depth = sum(name.endswith("weight") for name in weights)
    projector = torch.nn.Linear(size_in, size_out)
    if depth > 1:
        projector = torch.nn.Sequential(projector)
        for _ in range(1, depth):
            projector += torch.nn.Sequential(torch.nn.GELU(), torch.nn.Linear(size_out, size_out))
    projector.load_state_dict(weights, strict=True)
    return projector


@pytest.mark.parametrize("depth", ORIGINAL_KEYS)
def test_a_written_projector_is_the_originals(depth, tmp_path):
    model = tiny_model(depth)
    file = write_projector(model.state_dict(), tmp_path)
    assert file.name == "mm_projector.bin" and list(tmp_path.iterdir()) == [file]
    assert set(torch.load(file, weights_only=True)) == ORIGINAL_KEYS[depth]
    sizes = model.config.vision_config.hidden_size, model.config.text_config.hidden_size
    features = torch.randn(3, 5, sizes[0])
    found, expected = model.model.multi_modal_projector(features), original_projector(file, *sizes)(features)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("prefix", ["model.", "base_model.model.model.", "module.model."])
def test_a_projector_of_the_original_is_read_whatever_it_was_wrapped_in(prefix, tmp_path):
    model = tiny_model()
    sizes = model.config.vision_config.hidden_size, model.config.text_config.hidden_size
    torch.manual_seed(1)
    original = torch.nn.Sequential(torch.nn.Linear(*sizes), torch.nn.GELU(), torch.nn.Linear(sizes[1], sizes[1]))
    file = tmp_path / "mm_projector.bin"
    torch.save({f"{prefix}mm_projector.{name}": tensor for name, tensor in original.state_dict().items()}, file)
    features = torch.randn(2, 4, sizes[0])
    read_projector(model, file)
    torch.testing.assert_close(model.model.multi_modal_projector(features), original(features), rtol=0, atol=1e-6)


def test_bad_projector_files_are_named_and_change_nothing(tmp_path):
    model = tiny_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    text, empty, other, deeper, narrow = (
        tmp_path / f"{name}.bin" for name in ("text", "empty", "other", "deep", "narrow")
    )
    text.write_text("no weights")
    torch.save({}, empty)
    torch.save({"lm_head.weight": torch.ones(1)}, other)
    write_projector(tiny_model(depth=3).state_dict(), tmp_path).rename(deeper)
    weights = torch.load(write_projector(model.state_dict(), tmp_path), weights_only=True)
    weights["model.mm_projector.2.weight"] = weights["model.mm_projector.2.weight"][:, :-1]
    torch.save(weights, narrow)
    for file, words in (
        (tmp_path / "missing.bin", "is no file"),
        (text, "is no file of PyTorch's"),
        (empty, "holds no tensors by name"),
        (other, "holds lm_head.weight"),
        (deeper, "model.mm_projector.4.weight"),
        (narrow, "model.mm_projector.2.weight has the shape"),
    ):
        with pytest.raises(ValueError, match=words) as error:
            read_projector(model, file)
        assert str(file) in str(error.value) and "\n" not in str(error.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match="multimodal_projector_depth=0"):
        write_projector({"lm_head.weight": torch.ones(1)}, tmp_path)


def test_train_projector_trains_it_alone():
    model = tiny_model()
    prepare_parameters(model, ModelArguments("unused", train="projector"))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if part_of(name) == "projector"} != set()
    with pytest.raises(ValueError, match="nothing to train"):
        ModelArguments("unused", train="projector", freeze_projector=True)
    with pytest.raises(ValueError, match="lora"):
        ModelArguments("unused", train="projector", lora=True)


@pytest.mark.slow
def test_two_stages(converted, tmp_path):
    """Stage one on captions writes the projector alone; stage two begins with it, and trains LoRA beside it."""
    data = tmp_path / "data.json"
    data.write_text(json.dumps(records(4)))
    start = converted["llava15-m3"]
    one = arguments(start, tmp_path / "one", data_path=data, template="plain", train="projector", learning_rate=1e-2)
    assert main(one) == 0
    (entry,) = losses(tmp_path / "one")[:1]
    assert {"loss_at_1", "loss_at_9"} <= set(entry)
    file = tmp_path / "one" / "mm_projector.bin"
    first, final = load(str(start))[0].state_dict(), load(str(tmp_path / "one" / "final"))[0].state_dict()
    changed = {name for name in first if not torch.equal(first[name], final[name])}
    assert changed == {name for name in first if part_of(name) == "projector"}
    stored = torch.load(file, weights_only=True)
    for place, layer in ((0, "linear_1"), (2, "linear_2")):
        for kind in ("weight", "bias"):
            own = final[f"model.multi_modal_projector.{layer}.{kind}"]
            torch.testing.assert_close(stored[f"model.mm_projector.{place}.{kind}"].to(own.dtype), own, rtol=0, atol=0)

    two = ["--projector_weights", str(file), "--freeze_vision_tower", "true", "--lora", "true", "--lora_r", "2"]
    again = ["--max_steps", "2", "--learning_rate", "1e-12", "--lr_scheduler_type", "constant"]
    from_file = arguments(start, tmp_path / "two", *two, *again, data_path=data)
    from_final = arguments(tmp_path / "one" / "final", tmp_path / "three", *two[2:], *again, data_path=data)
    assert main(from_file) == main(from_final) == 0
    assert [e["loss"] for e in losses(tmp_path / "two")] == pytest.approx(
        [e["loss"] for e in losses(tmp_path / "three")], abs=2e-3
    )  # `final` is stored in half precision, the file in float32
    assert "mm_projector.bin" in (tmp_path / "two" / "final" / "README.md").read_text()
    assert not (tmp_path / "two" / "mm_projector.bin").exists()


def test_a_wrong_projector_file_ends_the_command_before_anything_is_written(converted, tmp_path, capsys):
    data = tmp_path / "data.json"
    data.write_text(json.dumps(records(2)))
    words = arguments(
        converted["llava15-m3"], tmp_path / "out", data_path=data, projector_weights=tmp_path / "none.bin"
    )
    assert main(words) == 1
    assert "none.bin is no file: name an mm_projector.bin." in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stage", [1, 2])
def test_configs_of_the_two_stages_are_read(stage):
    model, data, training = parse([f"new-model-stage-{stage}.yaml", "--bf16", "false", "--use_cpu", "true"])
    trained = [part for part in ("language_model", "projector", "vision_tower") if not model.trains_nothing_of(part)]
    assert trained == [["projector"], ["language_model", "projector"]][stage - 1]
    assert data.template == ["plain", "chat_template"][stage - 1]
    # llava/scripts/v1_5/pretrain.sh and finetune.sh, on 8 GPUs
    assert training.learning_rate == [1e-3, 2e-5][stage - 1]
    assert 8 * training.per_device_train_batch_size * training.gradient_accumulation_steps == [256, 128][stage - 1]
    assert training.num_train_epochs == 1 and training.warmup_steps == 0.03 and training.weight_decay == 0
    assert (CONFIGS / f"new-model-stage-{stage}.yaml").is_file()


@pytest.fixture(scope="module")
def tiny():
    return load(default_checkpoint())


@pytest.fixture(scope="module")
def scenes(tiny, tmp_path_factory):
    return see_scenes(*tiny, tmp_path_factory.mktemp("seen") / "seen.safetensors", count=40)


def test_lessons_say_what_the_scene_shows(tiny, scenes):
    _, processor = tiny
    for records_of, template in ((captions, "plain"), (questions, "chat_template")):
        lessons = Lessons(records_of(40), scenes, processor, template)
        for record, sample in ((record, lessons[i]) for i, record in enumerate(lessons.records)):
            answer = processor.decode(sample["labels"][sample["labels"] != -100], skip_special_tokens=True)
            if record["scene"] is None:
                assert answer.strip() == record["chat"][1] and "seen" not in sample
                continue
            shape, color = facts(scene_of(record["scene"] % 40))
            assert shape in answer and (color in answer or f"is a {shape}" in answer)
            assert (sample["input_ids"] == processor.image_token_id).sum() == 576
    chats = [record for record in questions(400) if record["scene"] is None]
    assert 10 < len(chats) < 45 and all(record["chat"] in CHATS for record in chats)
    assert not {question for question, _ in CHATS} & set(GENERAL_QUESTIONS)


def test_what_was_seen_is_what_the_model_sees_and_is_kept(tiny, scenes, tmp_path, monkeypatch):
    model, processor = tiny
    pixels = processor.image_processor(scene_of(7).picture, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = model.encode_images(pixels).tile_features
        found = model.model.multi_modal_projector(scenes.features[7:8].float())
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)  # kept in half precision
    first = see_scenes(model, processor, tmp_path / "seen.safetensors", count=3)
    monkeypatch.setattr(model.model.vision_tower, "forward", None)  # it is not asked again
    again = see_scenes(model, processor, tmp_path / "seen.safetensors", count=3)
    assert torch.equal(first.features, again.features) and first.facts == again.facts == scenes.facts[:3]


def test_held_out_scenes_are_others():
    assert facts(held_out(0))[0] in ("circle", "rectangle", "triangle", "diamond", "star", "cross")
    assert held_out(0).picture.tobytes() != scene_of(0).picture.tobytes()


def test_words_are_learned_without_the_language_model(tiny, scenes):
    """After training, the token most like a word is most like the right one: counted with cosines, in plain torch."""
    _, processor = tiny
    torch.manual_seed(0)
    projector = torch.nn.Sequential(torch.nn.Linear(128, 192), torch.nn.GELU(), torch.nn.Linear(192, 192))
    embeddings = torch.randn(512, 192)
    run = train_on_words(projector, embeddings, processor.tokenizer, scenes.features, scenes.facts, steps=60)
    assert sum(run[-10:]) < 0.5 * sum(run[:10])
    centred = embeddings - embeddings.mean(0)
    with torch.no_grad():
        tokens = projector(scenes.features.float()).unflatten(1, (3, 8, 3, 8)).mean((2, 4)).flatten(1, 2)
    tokens = tokens - embeddings.mean(0)
    ids = [processor.tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for word in SHAPES]
    vectors = torch.nn.functional.normalize(torch.stack([centred[row].mean(0) for row in ids]), dim=1)
    likest = [SHAPES[(row @ vectors.T).max(0).values.argmax()] for row in tokens]
    assert sum(word == shape for word, (shape, _) in zip(likest, scenes.facts)) > 30


def stages(batch=2, steps=3):
    shared = {"batch": batch, "learning_rate": 1e-3, "projector_learning_rate": 1e-3}
    return {
        "stage-1": new_model.Stage(
            captions, "plain", steps, shares={1: 1, 9: 1}, model={"train": "projector"}, **shared
        ),
        "stage-2": new_model.Stage(
            questions,
            "chat_template",
            steps,
            shares={1: 1, 36: 1},
            model={"freeze_vision_tower": True, "lora": True, "lora_r": 2},
            **shared,
        ),
    }


@pytest.fixture
def run_folder(tmp_path, monkeypatch):
    """Where a run has few scenes to see."""
    see = new_model.see_scenes
    monkeypatch.setattr(new_model, "see_scenes", lambda *args: see(*args[:3], count=6))
    return tmp_path


@pytest.mark.slow
def test_a_stage_that_was_stopped_goes_on_as_if_it_was_not(run_folder, monkeypatch):
    tmp_path, start = run_folder, default_checkpoint()
    whole = new_model.train(tmp_path / "whole", "stage-2", start, stages()["stage-2"], save_steps=1)
    step = new_model.LessonTrainer.compute_loss

    def stopped(self, *args, **kwargs):
        if self.state.global_step == 2:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(new_model.LessonTrainer, "compute_loss", stopped)
    with pytest.raises(KeyboardInterrupt):
        new_model.train(tmp_path / "again", "stage-2", start, stages()["stage-2"], save_steps=1)
    monkeypatch.setattr(new_model.LessonTrainer, "compute_loss", step)
    again = new_model.train(tmp_path / "again", "stage-2", start, stages()["stage-2"], save_steps=1)
    expected, found = (load(str(folder))[0].state_dict() for folder in (whole, again))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6, msg=name)
    first = load(start)[0].state_dict()
    assert {part_of(name) for name in first if not torch.equal(first[name], found[name])} == {
        "language_model",
        "projector",
    }


def test_the_loss_of_a_step_is_that_of_the_pictures_themselves(tiny, scenes, tmp_path):
    """What the tower has seen before, against the model's own forward from pixels, of a prompt written at the step's scale."""
    model, processor = tiny
    lessons = Lessons(captions(2), scenes, processor, "plain")
    lesson = lessons[0]
    made = scene_of(lessons.records[0]["scene"] % 40)
    text = processor.decode(lesson["labels"][lesson["labels"] != -100])
    inputs = processor(images=made.picture, text=f"<image>{text}", num_visual_tokens=9, return_tensors="pt")
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] < 4, -100)
    with torch.no_grad():
        expected = model(**inputs, labels=labels).loss
    batch = LessonCollator(processor.tokenizer.pad_token_id)([lesson])
    trainer = new_model.LessonTrainer(
        shares={9: 1.0},
        scales=[9],
        model=model,
        args=new_model.arguments_of(new_model.STAGES["stage-1"], tmp_path, 0, 1),
        train_dataset=lessons,
        processing_class=processor,
    )
    with torch.no_grad():
        found = trainer.compute_loss(model, batch)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_finetune_takes_the_folder_of_a_stage(run_folder):
    """What the recipe writes is a checkpoint like any other: m3-train goes on from it."""
    tmp_path = run_folder
    final = new_model.train(tmp_path, "stage-1", default_checkpoint(), stages()["stage-1"])
    data = tmp_path / "data.json"
    data.write_text(json.dumps(records(2)))
    words = arguments(final, tmp_path / "more", data_path=data, template="chat_template", max_steps=1)
    assert finetune(*parse(words)).is_dir()


def test_without_the_package_its_name_is_said(monkeypatch):
    monkeypatch.setattr(new_model, "PACKAGE", "no_such_package")
    with pytest.raises(FileNotFoundError, match="no_such_package is not installed: pip install"):
        new_model.packaged_language_model()


def test_the_adapter_is_the_run_result(run_folder):
    """PEFT puts LoRA and projector on what the run began with: its logits are then those of the merged result."""
    stage = stages()["stage-2"]
    final = new_model.train(run_folder, "stage-2", default_checkpoint(), stage, save_steps=3)
    adapter = write_adapter(
        run_folder / "stage-2" / "checkpoint-3",
        run_folder / "adapter",
        ModelArguments("unused", **stage.model),
        torch.float32,
    )
    merged, processor = load(str(final))
    model = PeftModel.from_pretrained(load(default_checkpoint())[0], str(adapter)).eval()
    inputs = processor(images=scene_of(0).picture, text="<image>\nWhat?", num_visual_tokens=9, return_tensors="pt")
    with torch.no_grad():
        before, expected = load(default_checkpoint())[0](**inputs).logits, merged.eval()(**inputs).logits
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=1e-4)
    assert not torch.allclose(before, expected, atol=1e-3)
    with pytest.raises(ValueError, match="has no LoRA"):
        write_adapter(Path(default_checkpoint()), run_folder / "none", ModelArguments("unused"))
    assert not (run_folder / "none").exists()
