"""`num_visual_tokens="auto"`: what was chosen is what a plain call at that number answers, however it is asked."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import GOLDENS, tiny_config
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor, TextStreamer, pipeline
from typer.testing import CliRunner

import modeling_m3
from m3_evaluation.checkpoints import fingerprint
from m3_evaluation.eval_command import app as m3_eval
from m3_evaluation.own_data import exact_match
from m3_training.budget import BudgetArguments, fit_budget
from m3_training.budget import main as m3_budget
from m3_training.budget_data import read_labelled
from m3_training.budget_samples import Samples, ask, samples_of_run
from m3_training.m3_tiny.budget import fitted_on, write_questions
from m3_training.m3_tiny.scenes import scene
from modeling_m3 import M3LlavaForConditionalGeneration
from modeling_m3.__main__ import app as m3_ask
from modeling_m3.automatic_budget_m3 import AUTOMATIC_BUDGET_FILE, AutomaticBudget, Confidence, Network
from modeling_m3.weights_print_m3 import print_of_folder


TINY = modeling_m3.default_checkpoint()
SCALES = [1, 9, 36, 144, 576]
PICTURES = [Image.open(file).convert("RGB") for file in sorted((GOLDENS / "images").glob("*.png"))[:3]]


class Drawn:
    """A choice at random, the same for the same prompt, whoever asks with it."""

    keep, probe_tokens = 0.99, 3

    def __init__(self, scales, start):
        self.scales, self.start = scales, start

    def first_choice(self, signals, keep):
        drawn = [np.random.default_rng(int(1000 * abs(row.double().sum().item())) // 5) for row in signals]
        finer = [scale for scale in self.scales if scale >= self.start]
        scales = np.array([generator.choice(finer) for generator in drawn])
        return np.zeros((len(drawn), 1)), scales, np.array([generator.random() < 0.6 for generator in drawn])

    def next_choice(self, scale, logits, confidence, keep):
        assert confidence.shape == (len(logits), 6) and (confidence[:, 5] >= 1).all()
        finer = [other for other in self.scales if other >= scale]
        return np.array([finer[int(1000 * abs(row[0].item())) % len(finer)] for row in confidence])


@pytest.fixture
def tiny():
    return modeling_m3.load(TINY, dtype="float32")


def prepare(processor, chats, number):
    return processor.apply_chat_template(
        chats,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"num_visual_tokens": number, "padding": True},
    )


def chat(text, *pictures):
    return [
        {
            "role": "user",
            "content": [*({"type": "image", "image": p} for p in pictures), {"type": "text", "text": text}],
        }
    ]


def new_tokens(sequence, inputs, processor):
    pad = processor.tokenizer.pad_token_id
    return [token for token in sequence[inputs["input_ids"].shape[1] :].tolist() if token != pad]


@pytest.mark.parametrize("together", [pytest.param(1, marks=pytest.mark.slow), 8])
@pytest.mark.parametrize("name", ["llava15-m3", "llava-next-m3", "m3-tiny"])
def test_what_follows_is_the_answer_at_the_chosen_number(name, together, converted):
    model, processor = modeling_m3.load(TINY if name == "m3-tiny" else converted[name], dtype="float32")
    scales = processor.visual_token_scales
    model.automatic_budget = Drawn(scales, scales[1])
    texts = (
        "What is written?",
        "Where is the small star, and what is beside it?",
        "Count the dots.",
        "What color is it?",
    )
    asked = [(chat(text, picture), ["auto"]) for picture in PICTURES for text in texts]
    asked[2] = (chat(texts[0], *PICTURES[:2]), ["auto", "auto"])
    asked[4] = (chat(texts[1], *PICTURES[:2]), [scales[0], "auto"])
    asked[5] = (chat(texts[1], PICTURES[0]), [scales[0]])
    asked[6] = (chat("Hello"), [])
    chosen = []
    for begin in range(0, len(asked), together):
        batch = asked[begin : begin + together]
        numbers = [number for _, own in batch for number in own]
        inputs = prepare(processor, [messages for messages, _ in batch], numbers or None)
        output = model.generate(**inputs, max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
        assert (output.sequences[:, : inputs["input_ids"].shape[1]] == inputs["input_ids"]).all()
        found = iter(output.num_visual_tokens.tolist() if "auto" in numbers else numbers)
        for index, (messages, own) in enumerate(batch):
            scale = [next(found) for _ in own]
            assert all(a in ("auto", b) for a, b in zip(own, scale))
            alone = prepare(processor, [messages], scale or None)
            plain = model.generate(**alone, max_new_tokens=6, do_sample=False)
            assert new_tokens(output.sequences[index], inputs, processor) == new_tokens(plain[0], alone, processor)
            chosen += [b for a, b in zip(own, scale) if a == "auto"]
    assert len(set(chosen)) >= 3, "the choice is too seldom another to tell"


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"do_sample": True, "temperature": 2.0},
        {"do_sample": True, "num_return_sequences": 3},
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"output_scores": True, "return_dict_in_generate": True},
    ],
    ids=lambda settings: "-".join(settings),
)
@pytest.mark.parametrize("scale", [9, 36])
def test_settings_are_those_of_a_plain_call(settings, scale, tiny):
    model, processor = tiny
    model.automatic_budget = Drawn([9, 36, 576], 9)
    model.automatic_budget.first_choice = lambda signals, keep: (np.zeros((1, 5)), np.array([scale]), np.array([True]))
    model.automatic_budget.next_choice = lambda number, *_: np.array([number])
    message = [chat("What is written?", PICTURES[0])]
    outputs = []
    for number in ("auto", scale):
        torch.manual_seed(0)
        inputs = prepare(processor, message, number)
        output = model.generate(**inputs, max_new_tokens=5, **settings)
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        outputs.append([new_tokens(row, inputs, processor) for row in sequences])
        if not isinstance(output, torch.Tensor):
            outputs[-1].append(torch.stack(output.scores))
    assert outputs[0][:-1] == outputs[1][:-1]
    if isinstance(outputs[0][-1], torch.Tensor):
        torch.testing.assert_close(outputs[0][-1], outputs[1][-1], atol=1e-4, rtol=1e-4)
    else:
        assert outputs[0] == outputs[1]


def test_all_passes_are_counted_and_images_encoded_once(tiny, monkeypatch):
    model, processor = tiny
    model.automatic_budget = Drawn(SCALES, 9)
    plan = {0: (9, False), 1: (36, True), 2: (576, False), 3: (9, True)}
    model.automatic_budget.first_choice = lambda signals, keep: (
        np.arange(4)[:, None],
        np.array([plan[i][0] for i in range(4)]),
        np.array([plan[i][1] for i in range(4)]),
    )
    then = {1: 144, 3: 9}
    model.automatic_budget.next_choice = lambda scale, rows, *_: np.array(
        [144 if scale == 144 else then[int(row[0])] for row in rows]
    )
    calls, tower = [], model.model.vision_tower.forward
    monkeypatch.setattr(model.model.vision_tower, "forward", lambda *a, **k: calls.append(1) or tower(*a, **k))
    inputs = prepare(processor, [chat(f"What is {i}?", PICTURES[0]) for i in range(4)], "auto")
    output = model.generate(**inputs, max_new_tokens=3, return_dict_in_generate=True)
    assert output.num_visual_tokens.tolist() == [9, 144, 576, 9]
    assert output.visual_tokens_spent.tolist() == [9, 9 + 36 + 144, 9 + 576, 9]
    assert len(calls) == 1


def test_nothing_is_printed_of_a_pass_that_is_thrown_away(tiny, capsys):
    model, processor = tiny
    model.automatic_budget = Drawn(SCALES, 9)
    model.automatic_budget.first_choice = lambda *_: (np.zeros((1, 5)), np.array([9]), np.array([True]))
    model.automatic_budget.next_choice = lambda *_: np.array([576])
    printed = []
    for number in ("auto", 576):
        streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        inputs = prepare(processor, [chat("What is written?", PICTURES[0])], number)
        model.generate(**inputs, max_new_tokens=5, streamer=streamer)
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] != ""
    inputs = prepare(processor, [chat("What is written?", PICTURES[0])] * 2, "auto")
    with pytest.raises(ValueError, match="Give it one prompt"):
        model.generate(**inputs, streamer=streamer)


def test_the_processor_lays_out_the_finest_and_writes_0(tiny, tmp_path):
    model, processor = tiny
    inputs = prepare(processor, [chat("Hello", *PICTURES[:2])], [9, "auto"])
    assert inputs["num_visual_tokens"].tolist() == [9, 0]
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 9 + 576
    finest = prepare(processor, [chat("Hello", PICTURES[0])], 576)
    as_auto = prepare(processor, [chat("Hello", PICTURES[0])], "auto")
    torch.testing.assert_close(model(**as_auto).logits, model(**finest).logits)
    processor.num_visual_tokens = "auto"
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert again.num_visual_tokens == "auto"
    assert again(images=PICTURES[0], text="<image>", return_tensors="pt")["num_visual_tokens"].tolist() == [0]
    for wrong in (0, [0], "automatic", ["auto", 0]):
        with pytest.raises(ValueError, match="Choose from .*or auto"):
            processor(
                images=[PICTURES[0]] * (len(wrong) if isinstance(wrong, list) else 1),
                text="<image>" * 2,
                num_visual_tokens=wrong,
            )


def test_engines_get_a_number(tiny):
    _, processor = tiny
    size = [(336, 336)]
    with pytest.raises(ValueError, match="only `generate` of transformers chooses"):
        processor._get_num_multimodal_tokens(size, num_visual_tokens="auto")
    with pytest.raises(ValueError, match="only `generate` of transformers chooses"):
        processor(images=PICTURES[0], text="<image>", num_visual_tokens="auto", return_text_replacement_offsets=True)
    processor.num_visual_tokens = "auto"
    assert processor._get_num_multimodal_tokens(size)["num_image_tokens"] == [576]
    inputs = processor(images=PICTURES[0], text="<image>", return_text_replacement_offsets=True)
    assert inputs["num_visual_tokens"] == [576]


def test_without_a_fitted_choice_a_careful_rule_is_used(tiny):
    model, processor = tiny
    model.automatic_budget = None
    made = scene("budget of a test")
    inputs = prepare(processor, [chat(made.questions[1].text, made.picture)], "auto")
    chosen = [
        model.generate(**inputs, auto_keep=keep, return_dict_in_generate=True).num_visual_tokens.item()
        for keep in (0.5, 1.0)
    ]
    assert chosen == [9, 576]


def random_choice(scales=tuple(SCALES), width=384):
    draw = np.random.default_rng(0).normal

    def network(inputs):
        sizes = ((inputs,), (inputs,), (inputs, 4), (4,), (4, len(scales)), (len(scales),))
        return Network(*(np.abs(draw(size=size)).astype(np.float16).astype(np.float32) for size in sizes))

    after = {scale: network(len(scales) + 9) for scale in scales[1:-1]}
    prices = [(0.9, 1.0, 2.0), (1.0, 0.0, 0.5)]
    return AutomaticBudget(list(scales), scales[1], width, 8, 0.97, 0.95, prices, network(width), after)


def test_a_choice_is_stored_with_the_model_as_it_is(tiny, tmp_path):
    model, processor = tiny
    model.automatic_budget = choice = random_choice()
    for part in tiny:
        part.save_pretrained(tmp_path / "first")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "first", dtype="float32")
    again.save_pretrained(tmp_path / "second")  # not read before
    processor.save_pretrained(tmp_path / "second")
    quantized, _ = modeling_m3.load(tmp_path / "first", quantize="nf4")
    quantized.save_pretrained(tmp_path / "nf4")
    without_head = modeling_m3.M3LlavaModel.from_pretrained(tmp_path / "first")
    without_head.save_pretrained(tmp_path / "third")
    adapted = get_peft_model(again, LoraConfig(r=2, target_modules=r".*language_model.*\.q_proj"))
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    folders = [tmp_path / name for name in ("first", "second", "nf4", "third", "merged")]
    stored = [(folder / AUTOMATIC_BUDGET_FILE).read_bytes() for folder in folders]
    assert set(stored) == {choice.to_bytes()}
    names = [sorted(file.name for file in (tmp_path / name).iterdir()) for name in ("first", "second")]
    assert names[0] == names[1]
    signals = torch.randn(5, 384)
    for own, loaded in zip(choice.first_choice(signals, 0.95), again.automatic_budget.first_choice(signals, 0.95)):
        assert (own == loaded).all()
    with safe_open(tmp_path / "first" / AUTOMATIC_BUDGET_FILE, "pt") as file:
        assert list(file.keys()) == []  # whoever loads all of a folder's *.safetensors finds no weights in it
    again.automatic_budget = None
    again.save_pretrained(tmp_path / "second")
    assert not (tmp_path / "second" / AUTOMATIC_BUDGET_FILE).exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (random_choice(scales=(1, 9, 576)).to_bytes(), r"was fitted for scales \[1, 9, 576\]"),
        (random_choice(width=100).to_bytes(), "hidden states of 50, this model has .* 192"),
        (b"no choice", "is no choice that m3-budget stored"),
        (random_choice().to_bytes()[:-40], "is no choice that m3-budget stored"),
    ],
    ids=["scales", "width", "other content", "cut"],
)
def test_a_stored_choice_of_another_model_is_refused(content, message, tiny, tmp_path):
    model, processor = tiny
    model.save_pretrained(tmp_path)
    (tmp_path / AUTOMATIC_BUDGET_FILE).write_bytes(content)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype="float32")
    inputs = prepare(processor, [chat("Hello", PICTURES[0])], "auto")
    with pytest.raises(ValueError, match=message):
        model.generate(**inputs, max_new_tokens=1)


def test_bad_input(tiny):
    model, processor = tiny
    inputs = prepare(processor, [chat("Hello", PICTURES[0])], "auto")
    for keep in (1.5, 0, -1, True, "much"):
        with pytest.raises(ValueError, match=f"auto_keep={keep!r}"):
            model.generate(**inputs, auto_keep=keep)
    output = model.generate(
        **prepare(processor, [chat("Hello", PICTURES[0])], 9), max_new_tokens=1, return_dict_in_generate=True
    )
    with pytest.raises(ValueError, match="cannot go on from a cache"):
        model.generate(**inputs, past_key_values=output.past_key_values)
    with pytest.raises(ValueError, match="which are not those"):
        model.generate(**{**inputs, "input_ids": inputs["input_ids"][:, 20:], "attention_mask": None})
    one = tiny_config()
    one.visual_token_scales = [144]
    with pytest.raises(ValueError, match="offers 144 alone"):
        M3LlavaForConditionalGeneration(one).generate(
            input_ids=torch.ones(1, 3, dtype=torch.long),
            pixel_values=torch.zeros(1, 3, 24, 24),
            num_visual_tokens=torch.tensor([0]),
        )


def test_confidence_by_hand():
    probabilities = torch.tensor(
        [[[0.5, 0.25, 0.25], [0.8, 0.1, 0.1]], [[0.9, 0.05, 0.05], [0.4, 0.3, 0.3]]]
    )  # step, row
    confidence = Confidence(2, "cpu")
    confidence.add(probabilities[0].log(), torch.tensor([True, True]))
    confidence.add(probabilities[1].log(), torch.tensor([True, False]))
    entropy = -(probabilities * probabilities.log()).sum(-1)
    expected = [
        [np.log(0.5) + np.log(0.9), np.log(0.5), np.log(0.5), np.log(2), entropy[:, 0].sum(), 2],
        [np.log(0.8), np.log(0.8), np.log(0.8), np.log(8), entropy[0, 1], 1],
    ]
    torch.testing.assert_close(confidence.values(), torch.tensor(expected, dtype=torch.float32))


def test_generate_pipeline_and_m3_ask_agree(tiny, tmp_path, monkeypatch):
    model, processor = tiny
    made = scene("budget of a test")
    made.picture.save(tmp_path / "scene.png")
    text = made.questions[0].text
    inputs = prepare(processor, [chat(text, made.picture)], "auto")
    output = model.generate(**inputs, max_new_tokens=16, return_dict_in_generate=True)
    answer = processor.decode(new_tokens(output.sequences[0], inputs, processor), skip_special_tokens=True)
    asked = pipeline("image-text-to-text", model=model, processor=processor)(
        text=chat(text, made.picture),
        processor_kwargs={"num_visual_tokens": "auto"},
        max_new_tokens=16,
        return_full_text=False,
    )
    assert asked[0]["generated_text"] == answer
    result = CliRunner().invoke(m3_ask, [str(tmp_path / "scene.png"), text, "--num-visual-tokens", "auto"])
    assert result.stdout.strip() == answer
    chosen, spent = output.num_visual_tokens.item(), output.visual_tokens_spent.item()
    assert f"m3-ask: chose {chosen} visual tokens; all passes together took {spent}" in result.stderr
    table = CliRunner().invoke(m3_ask, [str(tmp_path / "scene.png"), text, "--compare", "--quiet"]).stdout
    assert f"auto: {spent}" in table.splitlines()[-1]


def test_what_ships_is_fitted_and_small():
    file = TINY / AUTOMATIC_BUDGET_FILE
    choice = AutomaticBudget.from_bytes(file.read_bytes(), str(file))
    assert choice.scales == SCALES and choice.keep == 0.99
    assert modeling_m3.load(TINY)[0].automatic_budget.print == choice.print == print_of_folder(TINY)
    assert file.stat().st_size <= max(200_000, 0.01 * (TINY / "model.safetensors").stat().st_size)


@pytest.mark.slow
def test_m3_budget_fits_stores_and_goes_on(tiny, tmp_path, capsys, monkeypatch):
    model, processor = tiny
    model.automatic_budget = None
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    before = {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()}
    data = write_questions(fitted_on(scenes=76, easy=2), tmp_path / "data")
    options = ["--model_name_or_path", tmp_path / "model", "--data_path", data, "--output_dir", tmp_path / "out"]
    assert m3_budget([*map(str, options), "--keep", "0.95", "0.9"]) == 0
    choice = (tmp_path / "model" / AUTOMATIC_BUDGET_FILE).read_bytes()
    assert {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()} == {
        **before,
        AUTOMATIC_BUDGET_FILE: choice,
    }
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [point["keep"] for point in result["automatic"]][:3] == [0.9, 0.93, 0.95]
    assert result["questions"] >= 500 and (tmp_path / "out" / "curve.png").stat().st_size > 10_000
    assert AutomaticBudget.from_bytes(choice, "").keep == 0.95
    monkeypatch.setattr("m3_training.budget.ask", None)  # all was asked
    assert m3_budget([*map(str, options), "--keep", "0.95", "0.9"]) == 0
    assert (tmp_path / "model" / AUTOMATIC_BUDGET_FILE).read_bytes() == choice
    stored = AutomaticBudget.from_bytes(choice, "")
    assert stored.print == print_of_folder(tmp_path / "model")
    capsys.readouterr()
    assert m3_budget([*map(str, options), "--max_new_tokens", "3"]) == 1
    assert "holds answers of another max_new_tokens" in capsys.readouterr().err
    shutil.copytree(tmp_path / "model", tmp_path / "unsorted")
    for name in ("config.json", "processor_config.json"):
        file = tmp_path / "unsorted" / name
        file.write_text(json.dumps({**json.loads(file.read_text()), "visual_token_scales": [576, 1, 36, 9, 144]}))
    shutil.copytree(tmp_path / "out", tmp_path / "again")  # test_budget_questions.py: the answers are the same
    asked = json.loads((tmp_path / "again" / "asked.json").read_text()) | {
        "checkpoint": fingerprint(tmp_path / "unsorted")
    }
    (tmp_path / "again" / "asked.json").write_text(json.dumps(asked))
    again = ["--model_name_or_path", tmp_path / "unsorted", "--data_path", data, "--output_dir", tmp_path / "again"]
    assert m3_budget([*map(str, again), "--keep", "0.95", "0.9"]) == 0
    assert (tmp_path / "unsorted" / AUTOMATIC_BUDGET_FILE).read_bytes() == choice
    capsys.readouterr()
    asked = json.loads((tmp_path / "out" / "asked.json").read_text())
    del asked["rule of scores"]  # as before rules had numbers: what is kept are scores, not answers
    (tmp_path / "out" / "asked.json").write_text(json.dumps(asked))
    assert m3_budget([*map(str, options), "--keep", "0.95", "0.9"]) == 1
    assert "holds answers of another rule of scores" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_with_signals_is_what_m3_budget_would_have_asked(tmp_path, capsys):
    data = write_questions(fitted_on(scenes=3, easy=1), tmp_path / "data")
    groups = read_labelled(data, None)
    lines = [
        {"image": str(group.pictures[0]), "question": question, "answer": answers, "kind": kind}
        for group in groups
        for question, answers, kind in zip(group.questions, group.answers, group.kinds)
    ]
    lines.append({"question": "Hello?", "answer": "Hi"})  # without a picture there is nothing to choose
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = [str(TINY), "--data", str(tmp_path / "my.jsonl"), "--output"]
    m3_eval([*run, str(tmp_path / "run"), "--signals", "--max_new_tokens", "16"], standalone_mode=False)
    found = samples_of_run(tmp_path / "run", SCALES, fingerprint(TINY))
    model, processor = modeling_m3.load(TINY)
    asked = Samples.joined([ask(model.eval(), processor, group, exact_match, 16) for group in groups])
    assert len(found) == len(asked) > 20
    for name in ("scales", "scores", "tokens"):
        assert np.array_equal(getattr(found, name), getattr(asked, name)), name
    for name in ("signals", "confidences"):
        np.testing.assert_allclose(getattr(found, name), getattr(asked, name), rtol=5e-3, atol=5e-3)
    assert [kind.removeprefix("my ") for kind in found.kinds] == asked.kinds.tolist()
    assert len(set(zip(found.groups, asked.groups))) == len(set(asked.groups)) == 4
    for file in (tmp_path / "run" / "tasks" / "my").glob("*.json*"):  # as judged by an older rule, and wrongly
        text = re.sub(r'("(?:exact_match|contains)": )\[[\d., ]*\]', rf"\1{[0.5] * len(SCALES)}", file.read_text())
        file.write_text(re.sub(r',\s*"rule": \d+', "", text))
    assert np.array_equal(samples_of_run(tmp_path / "run", SCALES, fingerprint(TINY)).scores, asked.scores)
    options = ["--model_name_or_path", str(TINY), "--data_path", str(tmp_path / "run"), "--output_dir"]
    assert m3_budget([*options, str(tmp_path / "out")]) == 1  # read, and found too few
    assert "are too few" in capsys.readouterr().err
    for wrong, message in (
        ({"metric": "bleu"}, "has no metric bleu; it has exact_match"),
        ({"fingerprint": "0"}, "another checkpoint"),
    ):
        with pytest.raises(ValueError, match=message):
            samples_of_run(tmp_path / "run", SCALES, **{"fingerprint": fingerprint(TINY), **wrong})
    m3_eval([*run, str(tmp_path / "plain"), "--limit", "1"], standalone_mode=False)
    with pytest.raises(ValueError, match="keeps no signals of my: run m3-eval with --signals"):
        samples_of_run(tmp_path / "plain", SCALES, fingerprint(TINY))
    assert m3_eval([*run, str(tmp_path / "few"), "--signals", "--scales", "9"], standalone_mode=False) == 1
    assert "leave out --scales 9" in capsys.readouterr().err


@pytest.mark.slow
def test_m3_budget_refuses_what_tells_nothing(tmp_path):
    many = write_questions(fitted_on(scenes=60, easy=15), tmp_path / "many")
    for arguments, message in (
        ({"keep": [1.5]}, r"--keep \[1.5\]"),
        ({"metric": "bleu"}, "--metric 'bleu'"),
        ({"start": 576}, "--start 576"),
        ({"data_path": str(tmp_path / "none.json")}, "There is no data file"),
    ):
        with pytest.raises(ValueError, match=message):
            fit_budget(
                BudgetArguments(
                    **{
                        "model_name_or_path": str(TINY),
                        "data_path": str(many),
                        "output_dir": str(tmp_path / "c"),
                        **arguments,
                    }
                )
            )
