"""Questions about videos: m3-eval's own data, tasks from tables, and frames against tokens at equal cost."""

import csv
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ask import run as ask
from typer.testing import CliRunner
from video_files import CLIP, moving_frames, write_video

import modeling_m3
from m3_evaluation import video_tasks
from m3_evaluation.answering import Answerer
from m3_evaluation.eval_command import app
from m3_evaluation.runs import read_samples
from m3_evaluation.video_budgets import main, pairs_of, table


# Any text that UTF-8 holds; "\0" is no part of a CSV before Python 3.11.
CELLS = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0")
    | st.sampled_from('\u2028\u2029\x85\x0b\x1e\r\n,"\ufeff'),
    min_size=1,
)
SETTINGS = {"max_new_tokens": 8, "do_sample": False}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_video(folder / "other.mp4", moving_frames(20))
    lines = [
        {"id": "a", "question": "Is there a star?", "answer": "yes", "kind": "presence", "video": str(CLIP)},
        {"id": "b", "question": "What color is it?", "answer": "blue", "kind": "color", "video": "other.mp4"},
    ]
    (folder / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "q.jsonl"


@pytest.mark.parametrize("name", ["llava15-m3", "llava-next-m3"])
@pytest.mark.parametrize(
    "options", [{"num_frames": 3}, {"num_frames": 4, "video_layout": "collage"}, {"fps": 1, "add_timestamps": True}]
)
def test_answers_are_those_of_generate(name, options, loaded):
    model, processor = loaded[name]
    chat = [{"role": "user", "content": [{"type": "video", "video": str(CLIP)}, {"type": "text", "text": "What?"}]}]
    [answers] = Answerer(model, processor, video=options).answer([chat], [1, 36], **SETTINGS)
    for answer, number in zip(answers, (1, 36)):
        inputs = processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
            processor_kwargs={**options, "num_visual_tokens": number},
        )  # fmt: skip
        expected = model.generate(**inputs, **SETTINGS)[0, inputs["input_ids"].shape[1] :]
        assert answer.text == processor.decode(expected, skip_special_tokens=True).strip()
        assert answer.visual_tokens == (inputs["input_ids"] == processor.image_token_id).sum()


def test_own_questions_about_videos(data, tmp_path):
    arguments = [
        str(modeling_m3.default_checkpoint()),
        "--data",
        data,
        "--num_frames",
        2,
        "--scales",
        "9",
        "--output",
        tmp_path / "run",
    ]
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    samples = list(read_samples(tmp_path / "run", "q"))
    assert [sample.visual_tokens for sample in samples] == [[18], [18]]
    said = ask(CLIP, "Is there a star?", "--num-frames", 2, "--num-visual-tokens", 9, "--quiet").stdout.strip()
    assert samples[0].answers == [said]
    again = CliRunner().invoke(app, [str(a) for a in [*arguments[:-6], "--num_frames", 3, *arguments[-4:]]])
    assert again.exit_code == 1 and "video {'num_frames': 2}, not {'num_frames': 3}" in again.output


def test_pairs_cost_the_same():
    scales = [1, 9, 36, 144, 576]
    assert pairs_of(576, scales, 144) == [(1, 576), (4, 144), (16, 36), (64, 9)]
    assert pairs_of(36, scales, 144) == [(1, 36), (4, 9), (36, 1)]
    assert pairs_of(7, scales, 144) == [(7, 1)]


def test_frames_against_tokens(data, tmp_path, monkeypatch, capsys):
    checkpoint = str(modeling_m3.default_checkpoint())
    options = {"data": data, "output": tmp_path / "out", "totals": "4,36", "most_frames": 20, "metric": "exact_match", "batch_size": 2, "limit": None}  # fmt: skip
    main(checkpoint, **options)
    result = json.loads((tmp_path / "out" / "accuracy.json").read_text())
    assert list(result["accuracy"]) == ["4x1", "1x36", "4x9"]
    said = ask(CLIP, "Is there a star?", "--num-frames", 4, "--num-visual-tokens", 9, "--quiet").stdout.strip()
    assert result["accuracy"]["4x9"]["presence"] == float(said == "yes")
    assert "| 36 | 4 x 9 |" in capsys.readouterr().out and table(result).count("\n") == 4
    # Answers of before are not asked again, and are of this checkpoint.
    monkeypatch.setattr(Answerer, "answer", lambda *args, **kwargs: pytest.fail("asked again"))
    main(checkpoint, **options)
    with pytest.raises(Exception, match="of another checkpoint, or to other questions"):
        main(checkpoint, **{**options, "limit": 1})


def test_a_task_is_made_of_the_authors_tables(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(video_tasks.TEMPLATES)  # where lmms-eval finds them beside a task
    import m3_video_functions as functions

    rows = [["", "video_name", "question", "answer", "a0", "a1"], ["0", "clip", "what, now", "1", "a dog", "a cat"], ["1", "clip", "who", "B", "x", "y"]]  # fmt: skip
    (tmp_path / "next.csv").write_text("\n".join(",".join(f'"{cell}"' for cell in row) for row in rows))
    records = [video_tasks._record(row, "row", CLIP.parent) for row in video_tasks._rows(tmp_path / "next.csv")]
    assert [record["answer"] for record in records] == ["B", "B"]
    assert functions.doc_to_visual(records[0]) == [str(CLIP.resolve())]
    assert functions.doc_to_text(records[0]).startswith(
        "Question: what, now A:a dog. B:a cat. \nSelect the correct answer"
    )
    for said, right in (
        ("B", 1),
        ("b: a cat.", 1),
        ("a cat.", 1),
        ("Answer: B", 1),
        ("A", 0),
        ("A cat is not B", 0),
        ("", 0),
        ("Because", 0),
    ):
        assert functions.process_results(records[0], [said])["exact_match"] == right, said
    opened = {**records[0], "options": [], "answer": "dog"}
    assert functions.process_results(opened, ["A dog."]) == {"exact_match": 0.0, "contains": 1.0}
    assert functions.process_results(opened, ["Dog."]) == {"exact_match": 1.0, "contains": 1.0}
    for row, message in (
        ({"video": "none", "question": "q", "answer": "a"}, "there is no video .*none, nor with .mp4"),
        ({"video": "clip", "question": "q"}, "has no answer"),
        ({"video": "clip", "question": "q", "answer": "c", "a0": "x", "a1": "y"}, "'c' is none of"),
    ):
        with pytest.raises(ValueError, match=message):
            video_tasks._record(row, "row 1", CLIP.parent)


TABLE = st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=4)


@given(cells=TABLE, mark=st.booleans(), end=st.sampled_from(["\n", "\r\n", "\r"]), quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))  # fmt: skip
@settings(deadline=None, max_examples=100)
def test_tables_are_read_as_they_were_written(tmp_path_factory, cells, mark, end, quoting):
    """By Excel, which begins with a byte-order mark, and with ends of lines of any kind inside quotes."""
    rows = [{"video_name": "clip", "question": question, "answer": answer} for question, answer in cells]
    if any({*cell} & {*"\r\n"} for row in cells for cell in row):
        quoting = csv.QUOTE_ALL  # before Python 3.13 the writer quotes the one that it ends lines with alone
    folder = tmp_path_factory.mktemp("tables")
    with (folder / "table.CSV").open("w", encoding="utf-8-sig" if mark else "utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator=end, quoting=quoting)
        writer.writeheader()
        writer.writerows(rows)
    assert video_tasks._rows(folder / "table.CSV") == rows
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "table.jsonl").write_text(lines, encoding="utf-8-sig" if mark else "utf-8", newline="")
    assert video_tasks._rows(folder / "table.jsonl") == rows


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "question,answer\nWas?,Grün\n".encode("latin-1"), "a.csv is not in UTF-8"),
        ("a.csv", b"question\n" + b"x" * 200_000, "a.csv, line 2 is not CSV: field larger"),
        ("a.jsonl", b'{"question": "a"}\n{', "a.jsonl, line 2 is not JSON"),
        ("a.jsonl", b"[1]\n", "row 1 must be an object"),
        ("b.csv", None, "There is no file .*b.csv"),
    ],
)
def test_what_is_no_table_is_refused_in_a_line(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        video_tasks.make(tmp_path / "task", tmp_path / name, tmp_path, "a")
    assert not (tmp_path / "task").exists()
