"""Rows of `m3-batch` as people and tools write them: each is answered as `generate` answers, or says what is wrong; none ends a run."""

import base64
import json
import math
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_batch import TINY, answers, batch, data  # noqa: F401 (a fixture)
from test_json_files import TEXTS, VALUES

import modeling_m3
from m3_serving.batch_engines import EngineSettings, GenerateEngine, Result, answer_rows
from m3_serving.batch_input import read_source
from m3_serving.batch_rows import Row, read_row


@pytest.fixture(scope="module")
def engine():
    return GenerateEngine(EngineSettings(TINY, "generate", 1, 4))


def reference(engine, names, question, numbers):
    """The answer of `generate` to one prompt by itself, and its numbers of visual tokens."""
    content = [{"type": "image"}] * len(names) + [{"type": "text", "text": question}]
    text = engine.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    pictures = {"images": [Image.open(name) for name in names], "num_visual_tokens": numbers} if names else {}
    inputs = engine.processor(text=text, return_tensors="pt", **pictures)
    output = engine.model.generate(**inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    answer = engine.processor.decode(output.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answer.strip(), getattr(output, "num_visual_tokens", None)


def asked(engine, records, folder, number=None, question=None):
    how = EngineSettings(TINY, "generate", number, 4)
    return answer_rows(engine, how, [read_row(record, "row", question, str(folder)) for record in records], int)


SHAPES = [  # what "image" may be, and a part of the error, or None for a question about no picture
    ([], None),
    (None, 'There is no "image"'),
    (math.nan, 'There is no "image"'),
    ("", 'There is no "image"'),
    ([None], 'There is no "image"'),
    (["00.png", math.nan], 'There is no "image"'),
    ([["00.png"]], "['00.png']\" is no picture"),
    (7, "'7' is no picture"),
    ({}, 'There is no "image"'),
    ({"path": None, "bytes": None}, 'There is no "image"'),
    ({"bytes": "abc"}, "'abc' are no bytes of a file"),
    ({"path": "00.png", "num_visual_token": 9}, "has num_visual_token: give bytes, path"),
    ({"path": "00.png", "num_visual_tokens": "few"}, "num_visual_tokens 'few': give a number"),
    ({"path": "00.png", "num_visual_tokens": 7}, "num_visual_tokens=7"),
    ({"path": "00.png", "type": "video"}, "has the type 'video'"),
    ({"path": {"path": "00.png"}}, "is no picture"),
    ("data:image/png;base64,a", "a data URI that cannot be read"),
    ("data:image/png;base64,aaaa", "The picture is not a picture that PIL can open"),
    ("data:", "a data URI that cannot be read"),
]


@pytest.mark.parametrize("number", [36, "auto"])
def test_every_shape_of_image_is_answered_or_told(number, engine, data):  # noqa: F811
    question = "Which large shape is there?"
    good = {"image": "00.png", "question": question}
    found = asked(engine, [good, *({"image": shape, "question": question} for shape, _ in SHAPES), good], data, number)
    for (shape, error), result in zip(SHAPES, found[1:]):
        assert (error or "None") in str(result.error), shape
        if error is None:
            assert result.answer == reference(engine, [], question, None)[0]
            assert (result.num_visual_tokens, result.visual_tokens) == (None, 0) and result.prompt_tokens > 0
    assert found[0] == found[-1] and found[0].answer == reference(engine, [data / "00.png"], question, number)[0]


@pytest.mark.parametrize(
    ("record", "error"),
    [
        ({"question": ""}, 'The "question" is empty.'),
        ({"question": " \n\u3000\u200b"}, 'The "question" is empty.'),
        ({"question": "\ud83d?"}, "holds U+D83D, half of a character"),
        ({"question": ["what?"]}, 'The "question" is no text'),
        ({"question": "<image>"}, "The question contains <image>"),
        ({"num_visual_tokens": "few"}, "num_visual_tokens 'few': give a number"),
        ({"num_visual_tokens": [9]}, "num_visual_tokens [9]: give a number"),
        ({"num_visual_tokens": 7, "image": []}, "num_visual_tokens=7"),  # of no picture, but wrong
        ({"num_visual_tokens": True}, "num_visual_tokens True: give a number"),
    ],
)
def test_what_else_can_be_wrong_with_a_row(record, error, engine, data):  # noqa: F811
    [result] = asked(engine, [{"image": "00.png", "question": "what?", **record}], data, question="of the command")
    assert error in result.error and result.answer is None


def test_numbers_of_pictures_come_before_those_of_rows_and_these_before_the_commands(engine, data):  # noqa: F811
    one, two, question = data / "00.png", data / "01.png", "Which color is in both?"
    own = [{"path": "00.png", "num_visual_tokens": "9"}, {"type": "image", "path": "01.png"}]
    cases = [
        ({"image": own, "num_visual_tokens": 1.0}, [9, 1]),
        ({"image": own}, [9, 36]),
        ({"image": own[::-1], "num_visual_tokens": "1"}, [1, 9]),
        ({"image": ["00.png", "01.png"], "num_visual_tokens": math.nan}, [36, 36]),
        ({"image": {"bytes": one.read_bytes(), "path": "x", "num_visual_tokens": 144.0}}, [144]),
        ({"image": [own[0], {"path": "01.png", "num_visual_tokens": "auto"}]}, [9, "auto"]),
    ]
    found = asked(engine, [{"question": question, **record} for record, _ in cases], data, 36)
    for result, (record, numbers) in zip(found, cases):
        names = [one, two][:: -1 if record["image"] == own[::-1] else 1][: len(numbers)]
        answer, chosen = reference(engine, names, question, numbers)
        if chosen is None:
            assert result.visual_tokens == sum(numbers)
        else:
            numbers = chosen.tolist()
        assert (result.error, result.answer) == (None, answer), record
        assert result.num_visual_tokens == (numbers[0] if len({*numbers}) == 1 else None)


def test_a_data_uri_is_its_picture(engine, data):  # noqa: F811
    uri = "data:image/png;base64," + base64.b64encode((data / "00.png").read_bytes()).decode()
    records = [{"image": place, "question": "Which large shape is there?"} for place in ("00.png", uri, [uri])]
    first, *others = asked(engine, records, data, 144)
    assert first.error is None and others == [first, first]


def test_a_picture_that_the_processor_refuses_is_a_row_with_an_error(engine, tmp_path, data):  # noqa: F811
    Image.new("RGB", (32769, 1)).save(tmp_path / "long.png")
    records = [{"image": name, "question": "what?"} for name in (f"{data}/00.png", "long.png", f"{data}/01.png")]
    results = asked(engine, records, tmp_path, 1)
    assert "A picture of 32769x1 pixels is padded to a square" in results[1].error
    assert [results[0].error, results[2].error] == [None, None]
    assert [results[0], results[2]] == [asked(engine, [record], tmp_path, 1)[0] for record in records[::2]]


class OfNoModel:
    """Takes the place of an engine, with its processor."""

    def __init__(self, processor):
        self.processor, self.context = processor, 10**6

    def answer(self, prompts):
        return [Result(answer=str(len(prompt.pictures))) for prompt in prompts]


@settings(deadline=None, max_examples=60)
@given(
    records=st.lists(
        st.fixed_dictionaries({}, optional=dict.fromkeys(("id", "question", "image", "num_visual_tokens"), VALUES))
        | st.fixed_dictionaries({"image": st.sampled_from([[], "00.png"]), "question": TEXTS})
        | VALUES,
        max_size=5,
    ),
    number=st.sampled_from([None, 9, "auto"]),
)
def test_no_row_ends_a_run(records, number, engine, data):  # noqa: F811
    results = asked(OfNoModel(engine.processor), records, data, number)
    assert len(results) == len(records)
    assert all((result.answer is None) != (result.error is None) for result in results)


def test_only_one_thread_uses_the_tokenizer(engine, data, monkeypatch):  # noqa: F811
    """Whose padding is a state that another would meet."""
    used, plain = [], engine.processor.tokenizer.set_truncation_and_padding

    def noted(*args, **kwargs):
        plain(*args, **kwargs)
        used.append(threading.get_ident())

    monkeypatch.setattr(engine.processor.tokenizer, "set_truncation_and_padding", noted)
    rows = [Row(str(number), "what? " * (number % 5 + 1), [f"{data}/00.png"]) for number in range(16)]
    results = answer_rows(engine, EngineSettings(TINY, "generate", 1, 1, batch_size=4), rows, int)
    assert {result.error for result in results} == {None} and {*used} == {threading.get_ident()}


def test_rows_of_tools_are_read(tmp_path, data):  # noqa: F811
    """NaN for what is missing, floats for whole numbers, a byte-order mark, lines that hold other ends of lines."""
    lines = [
        '\ufeff{"id": NaN, "image": "00.png", "question": NaN, "num_visual_tokens": NaN}',
        '{"id": 7.0, "image": "00.png", "question": "a\u2028b", "num_visual_tokens": 36.0}',
        "",
        '{"id": "\\ud800", "image": ["00.png"], "question": "c", "num_visual_tokens": "auto"}',
        "\ufeff",
        '{"half": ',
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    for size in (1, 2, 10):
        source = read_source([str(tmp_path / "rows.jsonl")], "of the command", str(data), size)
        rows = [row for shard in source.shards for row in source.rows(shard)]
        assert [row.id for row in rows] == ["rows.jsonl:0", "7", "\ud800", "rows.jsonl:3", "rows.jsonl:4"]
        assert [row.question for row in rows[:3]] == ["of the command", "a\u2028b", "c"]
        assert [row.num_visual_tokens for row in rows[:3]] == [None, 36, "auto"]
        assert [row.error is None for row in rows] == [True, True, True, False, False]
    (tmp_path / "blank.jsonl").write_bytes(b"\xef\xbb\xbf\n" + lines[1].encode())
    source = read_source([str(tmp_path / "blank.jsonl")], None, None, 10)
    assert [row.id for row in source.rows(*source.shards)] == ["7"]
    (tmp_path / "utf16.jsonl").write_text(lines[1], encoding="utf-16")
    with pytest.raises(ValueError, match="UTF-16"):
        read_source([str(tmp_path / "utf16.jsonl")], None, None, 10)


def test_columns_of_tools_are_read(tmp_path):
    columns = {
        "id": pyarrow.array([7.0, math.nan, 8.0], from_pandas=False),
        "question": pyarrow.array([b"a", b"\xff", b"c"]).cast(pyarrow.binary()).view(pyarrow.string()),
        "image": pyarrow.array([["a.png"], ["b.png"], []]),
        "num_visual_tokens": pyarrow.array(np.array([36.0, math.nan, 9.0], dtype=np.float32)),
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "rows.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"picture": ["a.png"] * 3}), tmp_path / "others.parquet")
    source = read_source([str(tmp_path / "rows.parquet"), str(tmp_path / "others.parquet")], "what?", "", 10)
    first, wrong, last = source.rows(source.shards[0])
    assert (first.id, first.question, first.pictures, first.num_visual_tokens) == ("7", "a", [f"{tmp_path}/a.png"], 36)
    assert (last.id, last.pictures, last.num_visual_tokens, last.error) == ("8", [], 9, None)
    assert "'utf-8' codec can't decode" in wrong.error
    assert ['There is no "image"' in row.error for row in source.rows(source.shards[1])] == [True] * 3


@pytest.fixture
def vllm(monkeypatch):
    """A module in the place of vLLM, which notes what it is asked and says nothing."""
    noted = []

    class LLM:
        def __init__(self, **options):
            self.llm_engine = SimpleNamespace(model_config=SimpleNamespace(max_model_len=1024))

        def generate(self, prompts, sampling, use_tqdm):
            noted.extend(prompts)
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[5])]) for _ in prompts]

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=LLM, SamplingParams=SimpleNamespace))
    monkeypatch.setattr("m3_serving.batch_engines.installed_engine", lambda: "vllm")
    monkeypatch.setattr("m3_serving.batch_engines.check_engine", lambda: "vllm")
    return noted


def test_vllm_takes_one_number_for_each_row_and_chooses_none(vllm, data, tmp_path, capsys):  # noqa: F811
    processor = modeling_m3.M3LlavaProcessor.from_pretrained(TINY)
    for file in modeling_m3.default_checkpoint().iterdir():
        if file.is_file() and file.suffix != ".py":
            (tmp_path / "auto").mkdir(exist_ok=True)
            (tmp_path / "auto" / file.name).symlink_to(file)
    (tmp_path / "auto" / "processor_config.json").unlink()
    processor.num_visual_tokens = "auto"
    processor.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "processor_config.json").rename(tmp_path / "auto" / "processor_config.json")
    picture = f"{data}/00.png"
    records = [
        {"image": picture},
        {"image": picture, "num_visual_tokens": 9},
        {"image": picture, "num_visual_tokens": "auto"},
        {"image": [{"path": picture, "num_visual_tokens": 9}, {"path": picture, "num_visual_tokens": 9.0}]},
        {"image": [{"path": picture, "num_visual_tokens": 9}, picture]},
        {"image": []},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    options = ["--model", tmp_path / "auto", "--input", tmp_path / "rows.jsonl", "--question", "what?"]
    assert not batch(*options, "--output", tmp_path / "out")
    said = capsys.readouterr().err
    assert said.count("the checkpoint's default is auto, which is of --engine generate: vLLM answers at 576") == 1
    found = answers(tmp_path / "out")
    assert [row["num_visual_tokens"] for row in found] == [576, 9, None, 9, None, None]
    assert [row["visual_tokens"] for row in found] == [576, 9, None, 18, None, 0]
    assert "only `generate` of transformers chooses by itself" in found[2]["error"]
    assert "[9, 576]: vLLM has one number for all pictures of a row" in found[4]["error"]
    numbers = [prompt.get("mm_processor_kwargs", {}).get("num_visual_tokens") for prompt in vllm]
    assert sorted(map(str, numbers)) == ["576", "9", "9", "None"]
    assert [prompt.keys() for prompt in vllm if "mm_processor_kwargs" not in prompt] == [{"prompt_token_ids"}]
