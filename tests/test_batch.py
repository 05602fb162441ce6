"""`m3-batch`: rows from anywhere, each answered once as `generate` answers, whatever breaks in between."""

import json
import os
import random
import signal
import subprocess
import time
from importlib.util import find_spec

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import commands_on_path
from PIL import Image

import modeling_m3
from m3_serving.batch_command import app
from m3_serving.batch_input import read_source
from m3_training.m3_tiny.scenes import TEST_FONTS, scene


TINY = str(modeling_m3.default_checkpoint())
SCALES = [1, 9, 36, 144, 576]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A JSONL of 26 rows about 20 pictures, five of them wrong, and its pictures."""
    folder, records = tmp_path_factory.mktemp("data"), []
    for number in range(20):
        made = scene(f"batch {number}", TEST_FONTS)
        made.picture.save(folder / f"{number:02}.png")
        question = made.questions[number % len(made.questions)].text
        records.append({"id": f"row {number}", "image": f"{number:02}.png", "question": question})
        if number % 2:
            records[-1]["num_visual_tokens"] = SCALES[number // 2 % 5]
    whole = (folder / "00.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "text.png").write_text("no picture")
    records[7:7] = [
        {"image": "none.png", "question": "what?"},
        {"image": "cut.png", "question": "what?"},
        {"image": "text.png", "question": "what?"},
        {"image": "00.png", "question": "what?", "num_visual_tokens": 7},
        {"question": "what?"},
    ]
    records.append({"image": ["00.png", "01.png"], "question": "Which color is in both?"})
    (folder / "rows.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def batch(*arguments):
    return app(["--model", TINY, "--max-new-tokens", "8", *map(str, arguments)], standalone_mode=False)


def answers(folder):
    return [
        row for file in sorted(folder.glob("answers-*.parquet")) for row in pyarrow.parquet.read_table(file).to_pylist()
    ]


@pytest.fixture(scope="module")
def answered(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("answered") / "out"
    assert not batch("--input", data / "rows.jsonl", "--output", folder, "--num-visual-tokens", 36, "--shard-size", 4,
                     "--engine", "generate")  # fmt: skip
    return folder


def test_rows_are_answered_as_generate_does(data, answered):
    model, processor = modeling_m3.load(TINY)
    rows, records = answers(answered), [json.loads(line) for line in (data / "rows.jsonl").open()]
    assert len(rows) == len(records) == 26 and [row["id"] for row in rows[:2]] == ["row 0", "row 1"]
    assert len(list(answered.glob("answers-*"))) == 7
    for row, record in zip(rows, records):
        if row["error"] is not None:
            continue
        number = record.get("num_visual_tokens", 36)
        images = record["image"] if isinstance(record["image"], list) else [record["image"]]
        content = [{"type": "image"}] * len(images) + [{"type": "text", "text": record["question"]}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        pictures = [Image.open(data / name) for name in images]
        inputs = processor(images=pictures, text=text, num_visual_tokens=number, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        ended = output[-1].item() == processor.tokenizer.eos_token_id
        assert row["answer"] == processor.decode(output, skip_special_tokens=True).strip()
        assert (row["num_visual_tokens"], row["visual_tokens"]) == (number, number * len(images))
        assert row["prompt_tokens"] == inputs["input_ids"].shape[1]
        assert (row["answer_tokens"], row["finish_reason"]) == (len(output) - ended, "stop" if ended else "length")
        assert row["question"] == record["question"]
    wrong = [row["error"] for row in rows if row["error"] is not None]
    sentences = [
        "There is no picture",
        "cut.png cannot be read",
        "text.png is not a picture",
        "num_visual_tokens=7",
        'There is no "image"',
    ]
    assert len(wrong) == 5 and all(sentence in error for sentence, error in zip(sentences, wrong))
    assert rows[7]["id"] == "rows.jsonl:7" and rows[7]["answer"] is None


def test_the_same_from_parquet_with_bytes_and_by_url(data, answered, tmp_path):
    records = [json.loads(line) for line in (data / "rows.jsonl").open()]
    good = [record for record in records if record.get("id")]
    held = [{**record, "image": {"bytes": (data / record["image"]).read_bytes(), "path": None}} for record in good]
    table = pyarrow.Table.from_pylist([{"num_visual_tokens": None, **record} for record in held])
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=7)
    batch("--input", f"file://{tmp_path}/rows.parquet", "--output", f"file://{tmp_path}/out", "--num-visual-tokens", 36,
          "--shard-size", 4, "--engine", "generate")  # fmt: skip
    expected = [row for row in answers(answered) if row["id"].startswith("row ")]
    assert answers(tmp_path / "out") == expected


def test_a_folder_of_pictures_and_a_pattern(data, tmp_path, capsys):
    options = ["--question", "What color is the large circle?", "--num-visual-tokens", "auto", "--engine", "generate"]
    assert not batch("--input", data, "--output", tmp_path / "out", *options)
    found = answers(tmp_path / "out")
    assert [os.path.basename(row["id"]) for row in found[:2]] == ["00.png", "01.png"] and len(found) == 22
    assert {row["num_visual_tokens"] for row in found if row["error"] is None} <= set(SCALES)
    assert sum(row["error"] is not None for row in found) == 2
    assert len(read_source([f"{data}/0*.png"], "What?", None, 4).shards) == 3
    source = read_source([f"{data}/*.jsonl"], None, None, 10)
    assert [len(shard) for shard in source.shards] == [10, 10, 6]
    assert [row.id for row in source.rows(source.shards[2])][:2] == ["row 15", "row 16"]


def test_the_same_command_goes_on_and_another_is_refused(data, answered, tmp_path, capsys, monkeypatch):
    before = {file.name: file.read_bytes() for file in answered.iterdir()}
    for name in ("answers-000002.parquet", "answers-000005.parquet"):
        (answered / name).unlink()
    (answered / "answers-000005.parquet.part").write_bytes(b"half")  # of one that was killed
    options = ["--input", data / "rows.jsonl", "--output", answered, "--shard-size", 4, "--engine", "generate"]
    assert not batch(*options, "--num-visual-tokens", 36)
    assert {file.name: file.read_bytes() for file in answered.iterdir()} == before
    monkeypatch.setattr("m3_serving.batch_command.make_engine", None)
    assert not batch(*options, "--num-visual-tokens", 36)  # nothing is left to do
    assert batch(*options, "--num-visual-tokens", 9) == 1
    assert "holds answers with num_visual_tokens 36, not 9" in capsys.readouterr().err
    with (data / "rows.jsonl").open() as lines:
        (tmp_path / "rows.jsonl").write_text(lines.readline())
    assert batch("--input", tmp_path / "rows.jsonl", *options[2:], "--num-visual-tokens", 36) == 1
    assert "holds answers with input" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--input", "nothing.jsonl"], "--input nothing.jsonl: there is nothing."),
        (["--num-visual-tokens", "7"], "num_visual_tokens=7"),
        (["--num-visual-tokens", "few"], "--num-visual-tokens 'few': give a number"),
        (["--engine-options", "[1]"], "give an object"),
        (["--input", "{folder}"], "are pictures: say what to ask by --question"),
        (["--question", " \n"], r"--question ' \n' is empty: write what to ask."),
        (["--output", "{folder}"], "has other files: give a new folder"),
        (["--model", "nowhere"], "nowhere"),
    ],
)
def test_bad_arguments_are_told_in_a_line(options, sentence, data, tmp_path, capsys):
    given = {"--input": data / "rows.jsonl", "--output": tmp_path / "out", "--engine": "generate"}
    given |= {options[0]: options[1].format(folder=data)}
    assert batch(*(part for pair in given.items() for part in pair)) == 1
    captured = capsys.readouterr().err
    assert sentence in captured and len(captured.splitlines()) == 1
    assert not (tmp_path / "out" / "batch.json").exists()


def test_elsewhere_than_on_this_disk(data):
    """By fsspec's file system in memory; lines with nothing on them are no rows."""
    files = fsspec.filesystem("memory")
    files.pipe_file("/in/a.png", (data / "00.png").read_bytes())
    line = json.dumps({"image": "a.png", "question": "Which large shape is there?"}).encode()
    files.pipe_file("/in/rows.jsonl", b"\n" + line + b"\n\n" + line + b"\n  \n" + line)
    options = [
        "--input",
        "memory://in/rows.jsonl",
        "--output",
        "memory://out",
        "--shard-size",
        2,
        "--engine",
        "generate",
    ]
    for _ in range(2):
        assert not batch(*options)
        assert sorted(files.ls("/out", detail=False)) == [
            "/out/answers-000000.parquet",
            "/out/answers-000001.parquet",
            "/out/batch.json",
        ]
    with files.open("/out/answers-000001.parquet") as file:
        [row] = pyarrow.parquet.read_table(file).to_pylist()
    assert row["id"] == "rows.jsonl:2" and row["answer"] and row["num_visual_tokens"] == 576


def test_a_prompt_that_is_too_long_is_a_row_with_an_error(data, tmp_path):
    shown = [f"{data}/{number:02}.png" for number in range(2)]
    records = [{"image": shown, "question": "what"}, {"image": shown[0], "question": "what"}, "no object"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert not batch("--input", tmp_path / "rows.jsonl", "--output", tmp_path / "out", "--num-visual-tokens", 576,
                     "--engine", "generate")  # fmt: skip
    found = answers(tmp_path / "out")
    assert "1016 fit, of a context of 1024 and 8 for the answer" in found[0]["error"]
    assert found[1]["error"] is None and "Not an object" in found[2]["error"]


def started(*arguments, **environment):
    environment = {**os.environ, "PATH": commands_on_path(), "HF_HUB_OFFLINE": "1", **environment}
    command = ["m3-batch", "--model", TINY, "--max-new-tokens", "4", *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """200 small pictures."""
    folder = tmp_path_factory.mktemp("many")
    for number in range(200):
        drawn = np.random.default_rng(number)
        Image.fromarray(drawn.integers(0, 255, (6, 8, 3), dtype=np.uint8)).resize((48, 36)).save(
            folder / f"{number:04}.png"
        )
    return folder


@pytest.mark.slow
def test_killed_three_times_it_answers_the_same(many, tmp_path):
    options = ["--input", many, "--question", "Which shape is it?", "--num-visual-tokens", 1, "--shard-size", 10]
    options += ["--batch-size", 10, "--engine", "generate"]
    whole = started(*options, "--output", tmp_path / "whole")
    _, said = whole.communicate()
    assert whole.returncode == 0, said
    drawn, killed = random.Random(0), 0
    for _ in range(3):
        count = len(list((tmp_path / "broken").glob("answers-*.parquet")))
        process = started(*options, "--output", tmp_path / "broken")
        while process.poll() is None and len(list((tmp_path / "broken").glob("answers-*.parquet"))) < count + 5:
            time.sleep(0.01)
        time.sleep(drawn.random() / 2)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
    again = started(*options, "--output", tmp_path / "broken")
    _, said = again.communicate()
    assert again.returncode == 0, said
    assert killed == 3
    names = sorted(file.name for file in (tmp_path / "whole").iterdir() if file.suffix != ".part")
    assert len(names) == 22  # 20 shards, what was asked, the lock
    for name in names:
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.slow
def test_two_at_once_do_not_write_to_one_folder(many, tmp_path):
    options = ["--input", many, "--question", "Which?", "--num-visual-tokens", 1, "--output", tmp_path / "out"]
    first = started(*options, "--engine", "generate")
    while first.poll() is None and not (tmp_path / "out" / "batch.json").exists():
        time.sleep(0.05)
    second = started(*options, "--engine", "generate")
    _, said = second.communicate()
    assert second.returncode == 1 and b"another m3-batch writes to it" in said
    first.send_signal(signal.SIGINT)
    _, said = first.communicate()
    assert first.returncode == 130 and b"stopped" in said


@pytest.mark.serve
@pytest.mark.skipif(find_spec("ray") is None, reason="needs Ray (CI has a stage for it)")
def test_the_same_on_ray(data, answered, tmp_path):
    assert not batch("--input", data / "rows.jsonl", "--output", tmp_path / "out", "--num-visual-tokens", 36, "--shard-size", 4,
                     "--engine", "generate", "--ray", "local", "--workers", 2)  # fmt: skip
    assert answers(tmp_path / "out") == answers(answered)
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {file.name for file in answered.iterdir()}
    assert not batch("--input", data / "rows.jsonl", "--output", tmp_path / "out", "--num-visual-tokens", 36, "--shard-size", 4,
                     "--engine", "generate", "--ray", "local")  # all is there: no cluster is started  # fmt: skip


@pytest.mark.serve
@pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM (CI has a stage for it)")
def test_the_same_by_vllm(data, answered, tmp_path):
    """In a process of its own, since an engine does not give back what it holds."""
    options = [
        "--input",
        data / "rows.jsonl",
        "--output",
        tmp_path / "out",
        "--num-visual-tokens",
        36,
        "--shard-size",
        4,
    ]
    engine = ["--dtype", "float32", "--engine-options", '{"enforce_eager": true}', "--max-new-tokens", "8"]
    process = started(*options, *engine, VLLM_CPU_KVCACHE_SPACE="1")
    _, said = process.communicate()
    assert process.returncode == 0, said.decode()[-3000:]
    by_vllm, by_generate = answers(tmp_path / "out"), answers(answered)
    by_generate[10]["error"] = by_generate[10]["error"].replace(", or auto.", ".")  # which only generate offers
    assert by_vllm == by_generate
