"""One's own questions as editors, tables and scripts write them: what is read of them, and how a line is refused."""

import base64
import json
import math
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import modeling_m3
from m3_conversion.json_files import write_json_lines
from m3_evaluation.eval_command import app
from m3_evaluation.own_data import fingerprint_of, read_questions
from m3_evaluation.runs import read_samples, read_task
from m3_evaluation.scores import RULE
from m3_training.budget_data import read_labelled


SCENE = Path(__file__).parent / "fixtures" / "scene.png"
ENCODED = f"data:image/png;base64,{base64.b64encode(SCENE.read_bytes()).decode()}"
LINES_OF_OTHERS = "\u2028\u2029\x85\x0b\x0c\x1c\x1e"  # ends of lines to `str.splitlines`, none in JSON
TEXTS = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(LINES_OF_OTHERS))
MISSING = st.sampled_from([None, math.nan])
ANSWERS = st.one_of(
    TEXTS, st.integers(), st.integers(-(2**53), 2**53).map(float), st.floats(allow_nan=False, allow_infinity=False)
)
RECORDS = st.fixed_dictionaries(
    {"question": TEXTS.map("What {}?".format), "answer": ANSWERS | st.lists(ANSWERS, min_size=1, max_size=3)},
    optional={
        "image": st.sampled_from(["scene.png", ["scene.png"] * 2, [], "", ENCODED]) | MISSING,
        "video": MISSING | st.just([]),
        "subset": TEXTS | MISSING,
        "kind": TEXTS | MISSING | st.integers(),
        "id": MISSING,
        "another column": MISSING | st.booleans(),
    },
)


def as_text(answer):
    return str(int(answer)) if isinstance(answer, float) and answer == int(answer) else str(answer)


@given(
    records=st.lists(RECORDS, min_size=1, max_size=4), mark=st.booleans(), end=st.sampled_from(["\n", "\r\n", "\n\n"])
)
@settings(deadline=None)
def test_what_tools_write_is_read(records, mark, end, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "scene.png").symlink_to(SCENE)
    file, text = folder / "my.jsonl", end.join(json.dumps(record, ensure_ascii=False) for record in records)
    file.write_bytes(b"\xef\xbb\xbf" * mark + text.encode())
    found = read_questions(file)
    assert [question.text for question in found] == [record["question"] for record in records]
    for number, (question, record) in enumerate(zip(found, records)):
        right = record["answer"]
        assert question.answers == list(map(as_text, right if isinstance(right, list) else [right]))
        shown = record.get("image")
        expected = shown if isinstance(shown, list) else [shown] * (isinstance(shown, str) and shown != "")
        contents = [held if isinstance(held, bytes) else held.read_bytes() for held in question.pictures]
        assert contents == [SCENE.read_bytes()] * len(expected) and question.videos == []
        assert question.id == str(1 + number * (2 if end == "\n\n" else 1))
        for label in ("subset", "kind"):
            given_label = record.get(label)
            assert getattr(question, label) == (
                given_label if isinstance(given_label, str | None) else as_label(given_label)
            )


def as_label(value):
    return None if value != value else str(value)


GOOD = {"question": "Hello?", "answer": "hi", "id": 1}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "What?", "answer": "a"', "line 2 is not JSON"),
        ({"question": " \u3000\n", "answer": "a"}, 'line 2 has an empty "question"'),
        ({"question": "\u200b", "answer": "a"}, 'line 2 has an empty "question"'),
        ({"question": "a \ud83d", "answer": "a"}, 'line 2: the "question" holds U\\+D83D, half of a character'),
        ({"question": math.nan, "answer": "a"}, 'line 2 must be an object with a "question"'),
        ({"question": "What?", "answer": math.nan}, 'line 2 has no "answer"'),
        ({"question": "What?", "answer": []}, 'line 2 has no "answer"'),
        ({"question": "What?", "answer": ["a", None]}, "line 2 has the answer None"),
        ({"question": "What?", "answer": math.inf}, "line 2 has the answer inf"),
        ({"question": "What?", "answer": True}, 'line 2 has the answer true: give the text .* "yes"'),
        ({"question": "What?", "answer": {"text": "a"}}, "line 2 has the answer {'text'"),
        ({**GOOD, "id": "1"}, "has the id '1' twice, on lines 1 and 2"),
        ({**GOOD, "id": 2, "image": 5}, "line 2: 5 is no picture: give a path"),
        ({**GOOD, "id": 2, "image": [None]}, "line 2: None is no picture"),
        ({**GOOD, "id": 2, "image": {"bytes": "", "path": "a"}}, "line 2: {'bytes'.* is no picture"),
        ({**GOOD, "id": 2, "image": "none.png"}, "line 2: there is no picture .*none.png"),
        ({**GOOD, "id": 2, "image": "a" * 5000}, "line 2: there is no picture .{200,400}$"),
        (
            {**GOOD, "id": 2, "image": "data:image/png;base64,aGk="},
            "line 2: 'data:image.* holds no picture: .*not a picture",
        ),
        ({**GOOD, "id": 2, "image": ENCODED[:-1]}, "line 2: 'data:image.* holds no picture: .*padding"),
        ({**GOOD, "id": 2, "video": ENCODED}, "line 2: there is no video"),
    ],
)
def test_a_line_that_is_no_record_is_named(line, message, tmp_path):
    file = tmp_path / "my.jsonl"
    file.write_text(f"{json.dumps(GOOD)}\n{line if isinstance(line, str) else json.dumps(line)}")
    with pytest.raises(ValueError, match=f"^{re.escape(str(file))},? {message}"):
        read_questions(file)
    assert len(read_questions(file, limit=1)) == 1


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32"])
def test_another_encoding_is_named(encoding, tmp_path):
    file = tmp_path / "my.jsonl"
    file.write_text(json.dumps({**GOOD, "question": "Où?"}, ensure_ascii=False) + "\n", encoding=encoding)
    with pytest.raises(ValueError, match=f"^{re.escape(str(file))}, line 1 is not JSON"):
        read_questions(file)


def test_runs_on_disk_go_on(tmp_path):
    """Their settings hold this print of their questions, as the first release with videos made it."""
    (tmp_path / "a.png").write_bytes(b"picture")
    lines = [
        {"question": "What?", "answer": ["1", 2, 0.5, 36.0], "image": "a.png", "id": 7},
        {"question": "Who?", "answer": "a"},
    ]
    write_json_lines(tmp_path / "my.jsonl", lines)
    assert fingerprint_of(read_questions(tmp_path / "my.jsonl")) == (
        "1ca6a75d44fe7cfa3a169c50e4918512b2bc272e0f93b63257da0abe6d88c4d5"
    )


def test_pictures_in_the_file_are_asked_about(tmp_path):
    records = [
        {"question": "What does the code say?", "answer": "E419", "image": image} for image in (str(SCENE), ENCODED)
    ]
    write_json_lines(tmp_path / "my.jsonl", records)
    run = tmp_path / "run"
    arguments = ["--data", tmp_path / "my.jsonl", "--output", run, "--scales", 576]
    app([str(modeling_m3.default_checkpoint()), *map(str, arguments)], standalone_mode=False)
    by_file, held = read_samples(run, "my")
    assert by_file.answers == held.answers == ["E419"] and by_file.pictures == held.pictures != []
    assert read_task(run, "my").rule == RULE
    [group] = read_labelled(tmp_path / "my.jsonl", None)  # the same picture, by what it holds
    assert len(group.questions) == 2 and len(group.group) < 100


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": " ", "answer": "a", "image": str(SCENE)}, 'line 1 has an empty "question"'),
        (
            {"conversations": [("human", "<image>\n "), ("gpt", "a")], "image": str(SCENE)},
            "record 0 has an empty question",
        ),
        (
            {"conversations": [("human", "\udc80"), ("gpt", "a")], "image": str(SCENE)},
            "record 0: a question holds U\\+DC80",
        ),
        ({"conversations": [("human", 5), ("gpt", "a")], "image": str(SCENE)}, "record 0: turns must be"),
        ({"conversations": [("human", "a"), ("gpt", "a")], "image": math.nan}, "record 0 needs an image"),
    ],
)
def test_labelled_questions_are_refused_likewise(record, message, tmp_path):
    if "conversations" in record:
        record["conversations"] = [{"from": who, "value": value} for who, value in record["conversations"]]
    write_json_lines(tmp_path / "my.jsonl", [record])
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path / 'my.jsonl'))}, {message}"):
        read_labelled(tmp_path / "my.jsonl", None)


def test_labelled_questions_of_a_table(tmp_path):
    turns = [{"from": "human", "value": "<image>\nHow many?"}, {"from": "gpt", "value": "3"}]
    write_json_lines(tmp_path / "my.jsonl", [{"conversations": turns, "image": str(SCENE), "kind": math.nan}])
    [group] = read_labelled(tmp_path / "my.jsonl", None)
    assert (group.questions, group.answers, group.kinds) == (["How many?"], [["3"]], [""])
