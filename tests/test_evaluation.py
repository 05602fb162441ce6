"""m3-eval on one's own questions, which needs no benchmark library; and what asks, for it and for lmms-eval."""

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import GOLDENS, picture

import modeling_m3
from m3_evaluation import own_data
from m3_evaluation.analyze_command import app as analyze_app
from m3_evaluation.answering import Answerer
from m3_evaluation.asking import ask_all
from m3_evaluation.eval_command import app
from m3_evaluation.record import Record
from m3_evaluation.runs import read_run, read_samples, read_task
from m3_training.m3_tiny.data import held_out_easy_vqa, held_out_scenes
from modeling_m3.any_checkpoint import M3Checkpoint


SCALES = [1, 9, 36, 144, 576]
SETTINGS = {"max_new_tokens": 16, "do_sample": False}


def user(text, *pictures):
    content = [{"type": "image", "image": shown} for shown in pictures]
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


@pytest.fixture(scope="module")
def m3_tiny():
    return modeling_m3.load(modeling_m3.default_checkpoint(), dtype="float32")


@pytest.fixture(scope="module")
def scenes():
    """(picture, question) of some pictures, several questions about each."""
    made = [*held_out_scenes(3), *itertools.islice(held_out_easy_vqa(), 2)]
    return [(shown, question) for shown, questions in made for question in questions[:6]]


def texts(answers):
    return [[answer.text for answer in row] for row in answers]


def test_batches_and_kept_features_change_no_answer(m3_tiny, scenes):
    chats = [user(question.text, shown) for shown, question in scenes[:8]]
    together = Answerer(*m3_tiny)
    answers = together.answer(chats, SCALES, **SETTINGS)
    apart = Answerer(*m3_tiny, kept_bytes=0)
    assert texts(answers) == [texts(apart.answer([chat], SCALES, **SETTINGS))[0] for chat in chats]
    encodings = together.encodings
    assert texts(together.answer(chats[::-1], SCALES, **SETTINGS)) == texts(answers)[::-1]
    assert together.encodings == encodings == 2


@pytest.mark.parametrize("name", ["llava15-m3", "llava-next-m3"])
def test_asks_as_generate_answers(name, loaded):
    """Pictures of all shapes, two in a prompt, none in another, padded together; at every scale."""
    model, processor = loaded[name]
    shown = [picture(file.name) for file in sorted((GOLDENS / "images").glob("*.png"))[:3]]
    chats = [user("What is it?", shown[0]), user("And these two, which is larger?", *shown[1:]), user("Hello")]
    answerer = Answerer(model, processor)
    scales = answerer.scales()[:3]
    answers = answerer.answer(chats, scales, max_new_tokens=6, do_sample=False)
    for chat, row in zip(chats, answers):
        for scale, answer in zip(scales, row):
            inputs = processor.apply_chat_template(
                chat,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"num_visual_tokens": scale},
            )
            output = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
            placeholders = int((inputs["input_ids"] == processor.image_token_id).sum())
            assert answer.text == processor.decode(output, skip_special_tokens=True).strip()
            assert answer.visual_tokens == placeholders
            assert answer.text_tokens == inputs["input_ids"].shape[1] - placeholders


def test_likelihoods_are_those_of_the_model(loaded):
    model, processor = loaded["llava15-m3"]
    shown, answerer = picture("photo_400x266.png"), Answerer(model, processor)
    chats = [user("What is it?", shown), user("Hello")]
    scales = answerer.scales()[:2]
    found = answerer.likelihoods(chats, [" a dog", " world"], scales)
    for chat, continuation, row in zip(chats, (" a dog", " world"), found):
        text = processor.apply_chat_template(chat, add_generation_prompt=True)
        images = [shown] if "image" in str(chat[0]["content"][0]["type"]) else None
        for scale, likelihood in zip(scales, row):
            short, long = (
                processor(images=images, text=part, num_visual_tokens=scale if images else None, return_tensors="pt")
                for part in (text, text + continuation)
            )
            start = short["input_ids"].shape[1]
            with torch.no_grad():
                scores = model(**long).logits[0].log_softmax(-1)
            ids = long["input_ids"][0, start:]
            expected = scores[start - 1 : -1].gather(-1, ids[:, None]).sum().item()
            assert likelihood.log_probability == pytest.approx(expected, abs=1e-4)
            assert likelihood.is_greedy == bool((scores[start - 1 : -1].argmax(-1) == ids).all())


def test_kept_features_stay_within_their_bound(m3_tiny, scenes):
    one = Answerer(*m3_tiny)
    one.answer([user("Hello", scenes[0][0])], [1], **SETTINGS)
    [(_, features)] = one._kept.values()
    bounded = Answerer(*m3_tiny, kept_bytes=2 * features.nbytes)
    for shown, _ in scenes:
        bounded.answer([user("Hello", shown)], [1], max_new_tokens=1, do_sample=False)
        assert sum(kept.nbytes for _, kept in bounded._kept.values()) <= bounded.kept_bytes


def test_a_record_with_a_line_cut_short_goes_on(m3_tiny, scenes, tmp_path):
    """As a process leaves it that is killed while it writes, or whose disk is full."""
    questions = [(str(index), SETTINGS) for index in range(5)]

    def ask(folder):
        record = Record(folder / "answers.0.jsonl")
        answerer = Answerer(*m3_tiny)
        chat = [user(question.text, shown) for shown, question in scenes]
        ask_all(answerer, [1, 9], questions, lambda index: chat[index], record, folder, 2, "test", quiet=True)
        return record, answerer

    whole, _ = ask(tmp_path / "whole")
    ask(tmp_path / "cut")
    file = tmp_path / "cut" / "answers.0.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    assert len(lines) == 3
    file.write_bytes(lines[0] + lines[1][: len(lines[1]) // 2])
    again, answerer = ask(tmp_path / "cut")
    assert again.results == whole.results
    assert file.read_bytes() == (tmp_path / "whole" / "answers.0.jsonl").read_bytes()
    assert answerer.encodings > 0


@pytest.fixture(scope="module")
def my_data(scenes, tmp_path_factory):
    """A JSONL and its pictures."""
    folder = tmp_path_factory.mktemp("data")
    lines = []
    for index, (shown, question) in enumerate(scenes[:10]):
        shown.save(folder / f"{index}.png")
        lines.append(
            {"question": question.text, "answer": question.answer, "image": f"{index}.png", "kind": question.kind}
        )
    lines.append({"question": "Hello?", "answer": ["hello", "hi"], "id": "greeting"})
    (folder / "my.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "my.jsonl"


def run(*arguments):
    app([str(modeling_m3.default_checkpoint()), *map(str, arguments)], standalone_mode=False)


def test_own_data(my_data, tmp_path):
    run("--data", my_data, "--output", tmp_path / "run", "--batch_size", 4)
    found = read_run(tmp_path / "run")
    assert found.scales == SCALES and found.tasks == ["my"]
    samples = list(read_samples(tmp_path / "run", "my"))
    assert [sample.id for sample in samples] == [*map(str, range(1, 11)), "greeting"]
    assert read_task(tmp_path / "run", "my").metric == "exact_match"
    for sample in samples[:10]:
        assert sample.visual_tokens == SCALES
        assert sample.scores["exact_match"] == [float(answer == sample.target[0]) for answer in sample.answers]
        assert (tmp_path / "run" / sample.pictures[0]).is_file()
    assert samples[-1].visual_tokens == [0] * 5 and samples[-1].pictures == []
    assert not list((tmp_path / "run").rglob("answers*"))
    before = (tmp_path / "run" / "tasks" / "my" / "samples.jsonl").read_bytes()
    run("--data", my_data, "--output", tmp_path / "run", "--batch-size", 4)  # all is there: nothing is asked again
    assert (tmp_path / "run" / "tasks" / "my" / "samples.jsonl").read_bytes() == before


def test_the_model_may_choose(m3_tiny, scenes, my_data, tmp_path):
    chats = [user(question.text, shown) for shown, question in scenes[:12]]
    answerer = Answerer(*m3_tiny)
    [found] = zip(*answerer.answer(chats, ["auto"], **SETTINGS))
    assert [answer.text for answer in found] == [
        answerer.answer([chat], ["auto"], **SETTINGS)[0][0].text for chat in chats
    ]
    assert len({answer.visual_tokens for answer in found}) > 1 and min(answer.visual_tokens for answer in found) <= 9
    with pytest.raises(NotImplementedError, match="likelihoods"):
        answerer.likelihoods(chats[:1], ["yes"], answerer.scales(["auto"]))
    run("--data", my_data, "--output", tmp_path / "run", "--scales", "auto")
    assert read_run(tmp_path / "run").scales == [0]
    analyze_app([str(tmp_path / "run"), "--output", str(tmp_path / "report")], standalone_mode=False)
    [entry] = json.loads((tmp_path / "report" / "results.json").read_text())["tasks"]["my"].values()
    [scale] = entry["scales"]
    assert scale["num_visual_tokens"] == "auto" and scale["visual_tokens"] >= 1


def fails(capsys, *arguments):
    """The one line on stderr."""
    with pytest.raises(SystemExit) as end:
        app([str(modeling_m3.default_checkpoint()), *map(str, arguments)])
    assert end.value.code == 1
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("m3-eval:")]
    return line


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("[1]", 'line 2 must be an object with a "question"'),
        ('{"question": "What?", "image": "0.png"}', 'line 2 has no "answer"'),
        ('{"question": "What?", "answer": "a", "image": "none.png"}', "line 2: there is no picture .*none.png"),
        ('{"question": "What?", "answer": "a", "id": "1"}', "has the id '1' twice"),
    ],
)
def test_bad_records(line, message, my_data, tmp_path, capsys):
    first = json.dumps({"question": "Hello?", "answer": "a", "id": "1"})
    file = tmp_path / "bad.jsonl"
    file.write_text(f"{first}\n{line}\n")
    told = fails(capsys, "--data", file, "--image_folder", my_data.parent, "--output", tmp_path / "run")
    assert re.search(message, told) and not (tmp_path / "run").exists()


def test_bad_arguments(my_data, tmp_path, capsys, converted):
    output = tmp_path / "run"
    assert "100 is not a number of visual tokens" in fails(
        capsys, "--data", my_data, "--output", output, "--scales", "9,100"
    )
    assert not output.exists()
    run("--data", my_data, "--output", output, "--limit", 1, "--scales", 1)
    assert "with scales [1], not [1, 9]" in fails(
        capsys, "--data", my_data, "--output", output, "--limit", 1, "--scales", "1,9"
    )
    with pytest.raises(SystemExit):
        app([str(converted["llava15-m3"]), "--data", str(my_data), "--output", str(output), "--limit", "1"])
    assert "holds a run of another checkpoint" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    assert "has other files" in fails(capsys, "--data", my_data, "--output", tmp_path / "full")


@pytest.mark.parametrize(
    ("limit", "questions"), [("3", 3), ("1.0", 1), ("0.5", 6), ("0.999", 11), ("1e-9", 1), ("99", 11)]
)
def test_a_limit_is_a_number_or_a_share(limit, questions, my_data, m3_tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(M3Checkpoint, "load", lambda *args, **kwargs: m3_tiny)
    run("--data", my_data, "--output", tmp_path / "run", "--limit", limit, "--scales", 1)
    assert read_task(tmp_path / "run", "my").samples == questions
    whole = [json.loads(line)["question"] for line in my_data.read_text().splitlines()]
    assert [sample.question for sample in read_samples(tmp_path / "run", "my")] == whole[:questions]


@pytest.mark.parametrize("limit", ["0", "-1", "-0.5", "nan", "inf", "1.5", "2.0000001"])
def test_other_limits_are_refused(limit, my_data, tmp_path, capsys):
    told = fails(capsys, "--data", my_data, "--output", tmp_path / "run", f"--limit={limit}")
    assert (
        told
        == f"m3-eval: --limit {float(limit)}: give a number of questions from 1, or a share of them below 1, as 0.5."
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_is_told_in_a_line(my_data, tmp_path, capsys, monkeypatch):
    def add(self, batch):
        with open("/dev/full", "w") as file:
            file.write(json.dumps(batch))

    monkeypatch.setattr(Record, "add", add)
    told = fails(capsys, "--data", my_data, "--output", tmp_path / "run", "--limit", 1, "--scales", 1)
    assert "is full: make room, the same command goes on" in told


def test_without_lmms_eval_tasks_say_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("m3_evaluation.eval_command.find_spec", lambda name: None)
    assert "pip install '.[eval]' in the clone" in fails(capsys, "--tasks", "pope", "--output", tmp_path / "run")


@pytest.mark.parametrize(
    ("metric", "answer", "right", "score"),
    [
        ("exact_match", " Red. ", ["red"], 1),
        ("exact_match", "dark red", ["red"], 0),
        ("contains", "It is dark red.", ["blue", "Red"], 1),
        ("contains", "It is reddish", ["red"], 0),
        ("anls", "kitten", ["sitting", "mitten"], 1 - 1 / 6),
        ("anls", "kitten", ["sitting"], 1 - 3 / 7),
        ("anls", "abc", ["xyz"], 0),
        ("anls", "", [""], 1),
    ],
)
def test_metrics(metric, answer, right, score):
    assert own_data.METRICS[metric](answer, right) == pytest.approx(score)


def test_imports_of_runs_and_checkpoints_are_light():
    code = "import sys, m3_evaluation.runs, m3_evaluation.checkpoints; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
