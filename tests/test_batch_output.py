"""What `m3-batch` writes: shards or one file, whole or not there, whenever it is stopped, and what it says at the end."""

import csv
import io
import json
import os
import signal
import sys

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_batch import SCALES, TINY, answers, batch, data  # noqa: F401 (a fixture)
from test_batch_rows import OfNoModel
from test_json_files import TEXTS

import modeling_m3
from m3_serving.batch_files import ENDINGS, TYPES, write_records


@pytest.fixture(scope="module")
def processor():
    return modeling_m3.M3LlavaProcessor.from_pretrained(TINY)


@pytest.fixture
def no_model(processor, monkeypatch):
    """Every row is answered at once by the number of its pictures; how often a model would have been loaded."""
    loaded = []
    made = lambda *about: loaded.append(about) or OfNoModel(processor)  # noqa: E731
    monkeypatch.setattr("m3_serving.batch_command.make_engine", made)
    return loaded


def run(data, output, *options):  # noqa: F811
    return batch("--input", data / "rows.jsonl", "--output", output, "--engine", "generate", "--shard-size", 9,
                 *options)  # fmt: skip


def read_file(file):
    if file.suffix == ".parquet":
        return pyarrow.parquet.read_table(file).to_pylist()
    if file.suffix == ".csv":
        with file.open(newline="", encoding="utf-8") as opened:
            rows = list(csv.DictReader(opened))
        whole = [name for name, kind in TYPES.items() if kind == pyarrow.int32()]
        return [
            {name: int(text) if text and name in whole else text or None for name, text in row.items()} for row in rows
        ]
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def beside(folder):
    """All that is in a folder, at any depth, but for the input."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("ending", ENDINGS)
def test_one_file_holds_the_rows_of_a_folder_and_is_never_replaced(ending, no_model, data, tmp_path, capsys):  # noqa: F811
    assert not run(data, tmp_path / "folder")
    file = tmp_path / f"one{ending}"
    assert not run(data, file)
    assert read_file(file) == answers(tmp_path / "folder") and len(no_model) == 2
    record = f".one{ending}.batch.json"
    assert {name for name in beside(tmp_path) if not name.startswith("folder/")} == {file.name, record}
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["folder"]
    capsys.readouterr()
    assert not run(data, file) and len(no_model) == 2  # no model is loaded again
    assert capsys.readouterr().out == (
        f"m3-batch: 21 of 26 rows are answered in {file}, 5 failed: their error says why\n"
    )
    content = file.read_bytes()
    assert run(data, file, "--num-visual-tokens", 9) == 1
    assert f"--output {file} holds answers with num_visual_tokens None, not 9" in capsys.readouterr().err
    file.write_bytes(content + b"x")
    other = tmp_path / f"other{ending}"
    other.write_bytes(b"mine")
    for place in (file, other):
        assert run(data, place) == 1
        assert f"{place} exists, and is not what this command wrote: give a new name" in capsys.readouterr().err
    assert (file.read_bytes(), other.read_bytes()) == (content + b"x", b"mine")
    assert {name for name in beside(tmp_path) if "other" in name} == {other.name}
    file.unlink()
    assert not run(data, file, "--num-visual-tokens", 9) and len(read_file(file)) == 26  # begun anew


def test_one_file_elsewhere_than_on_this_disk(no_model, data):  # noqa: F811
    files = fsspec.filesystem("memory")
    for _ in range(2):
        assert not run(data, "memory://one/out.csv")
        assert sorted(files.ls("/one", detail=False)) == ["/one/.out.csv.batch.json", "/one/out.csv"]
    assert len(no_model) == 1 and len(list(csv.reader(io.StringIO(files.cat_file("/one/out.csv").decode())))) == 27
    files.pipe_file("/one/mine.csv", b"mine")
    assert run(data, "memory://one/mine.csv") == 1 and files.cat_file("/one/mine.csv") == b"mine"


def test_a_file_that_appears_meanwhile_stays(no_model, data, tmp_path, monkeypatch, capsys):  # noqa: F811
    file, finished = tmp_path / "out.jsonl", os.fsync
    monkeypatch.setattr(os, "fsync", lambda at: finished(at) or file.write_bytes(b"mine"))
    assert run(data, file) == 1
    assert "has appeared meanwhile, and is not replaced" in capsys.readouterr().err and file.read_bytes() == b"mine"
    monkeypatch.undo()
    file.unlink()


RECORDS = st.lists(
    st.fixed_dictionaries(
        {
            name: TEXTS | st.none() if kind == pyarrow.string() else st.sampled_from(SCALES)
            for name, kind in TYPES.items()
        }
    ),
    max_size=3,
)


@settings(deadline=None, max_examples=40)
@given(shards=st.lists(RECORDS, max_size=3))
def test_files_hold_any_text(shards):
    written = {}
    for ending in ENDINGS:
        file = io.BytesIO()
        assert write_records(file, ending, shards) == sum(map(len, shards))
        written[ending] = file.getvalue()
    records = [record for shard in shards for record in shard]
    assert [json.loads(line) for line in written[".jsonl"].decode().splitlines()] == records
    escaped = [
        {name: v.encode(errors="backslashreplace").decode() if isinstance(v, str) else v for name, v in record.items()}
        for record in records
    ]
    assert pyarrow.parquet.read_table(io.BytesIO(written[".parquet"])).to_pylist() == escaped
    if sys.version_info >= (3, 11) or "\0" not in written[".csv"].decode():  # Python 3.10 reads no NUL
        header, *rows = csv.reader(io.StringIO(written[".csv"].decode(), newline=""))
        assert header == list(TYPES)
        assert rows == [["" if record[name] is None else str(record[name]) for name in TYPES] for record in escaped]


def test_the_last_line_counts_what_failed_and_what_was_left_out(no_model, data, tmp_path, capsys):  # noqa: F811
    def said(*options):
        status = batch("--input", data, "--question", "what?", "--engine", "generate", "--shard-size", 9, *options)
        captured = capsys.readouterr()
        return status, (captured.out + captured.err.splitlines()[-1] if status else captured.out).strip()

    whole = (None, f"m3-batch: 20 of 22 rows are answered in {tmp_path / 'out'}, 2 failed: their error says why; "
                   "1 files of folders are no pictures and were left out")  # fmt: skip
    assert said("--output", tmp_path / "out") == whole
    (tmp_path / "out" / "answers-000002.parquet").unlink()
    assert said("--output", tmp_path / "out") == whole == said("--output", tmp_path / "out")
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "a.png").write_bytes(b"")
    for output in (tmp_path / "failed", tmp_path / "failed.csv"):
        for _ in range(2):
            assert (
                batch("--input", tmp_path / "none", "--question", "what?", "--output", output, "--engine", "generate")
                == 1
            )
            assert f"m3-batch: all 1 rows failed: error says why in {output}\n" in capsys.readouterr().err
    assert "not a picture" in read_file(tmp_path / "failed.csv")[0]["error"]


def test_only_whole_shards_of_ours_count_as_done(no_model, data, tmp_path):  # noqa: F811
    run(data, tmp_path / "out")
    shards = [tmp_path / "out" / f"answers-{number:06}.parquet" for number in range(3)]
    before = [shard.read_bytes() for shard in shards]
    strangers = ["answers-x.parquet", "answers-1 (copy).parquet", "answers-999999.parquet", "answers-.parquet", "notes"]
    for name in strangers:
        (tmp_path / "out" / name).write_bytes(b"mine")
    shards[0].write_bytes(before[0][:-9])
    shards[1].write_bytes(before[2])  # of another number of rows
    shards[2].write_bytes(b"")
    assert not run(data, tmp_path / "out")
    assert [shard.read_bytes() for shard in shards] == before
    assert {(tmp_path / "out" / name).read_bytes() for name in strangers} == {b"mine"}


def test_another_folder_of_pictures_is_another_question(no_model, data, tmp_path, capsys):  # noqa: F811
    assert not run(data, tmp_path / "out")
    assert run(data, tmp_path / "out", "--image-folder", data) == 1
    assert "holds answers with image_folder None" in capsys.readouterr().err
    asked = json.loads((tmp_path / "out" / "batch.json").read_text())
    del asked["image_folder"]  # as in runs of before it was kept
    (tmp_path / "out" / "batch.json").write_text(json.dumps(asked))
    assert not run(data, tmp_path / "out")


@pytest.mark.parametrize("content", ["{", "[]", ""])
def test_a_broken_record_of_what_was_asked_is_told(content, no_model, data, tmp_path, capsys):  # noqa: F811
    (tmp_path / "batch.json").write_text(content)
    assert run(data, tmp_path) == 1
    assert f"{tmp_path}/batch.json" in capsys.readouterr().err and beside(tmp_path) == {"batch.json", ".lock"}


def test_a_folder_of_others_stays_as_it_is(no_model, data, tmp_path):  # noqa: F811
    (tmp_path / "mine").write_text("")
    assert run(data, tmp_path) == 1 and beside(tmp_path) == {"mine"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("name", ["out", "out.jsonl"])
def test_a_signal_ends_it_in_a_line_and_the_same_command_goes_on(number, name, no_model, data, tmp_path, monkeypatch, capsys):  # noqa: F811  # fmt: skip
    plain, sent = OfNoModel.answer, []

    def shards():
        return [path for path in beside(tmp_path) if "answers-" in path]

    def stopped(engine, prompts):
        if shards() and not sent:
            sent.append(number)
            os.kill(os.getpid(), number)
        return plain(engine, prompts)

    monkeypatch.setattr(OfNoModel, "answer", stopped)
    assert run(data, tmp_path / name) == 128 + number
    assert capsys.readouterr().err.splitlines()[-1] == "m3-batch: stopped; the same command goes on"
    assert len(shards()) == 1 and not any(path.endswith(".part") for path in beside(tmp_path))
    assert not run(data, tmp_path / name)
    assert not run(data, tmp_path / f"whole-{name}")
    results = [answers(tmp_path / n) if name == "out" else read_file(tmp_path / n) for n in (name, f"whole-{name}")]
    assert results[0] == results[1] and len(results[0]) == 26


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("name", [pytest.param("out", marks=pytest.mark.slow), "out.csv"])
def test_killed_at_any_moment_the_same_command_ends_with_the_same_bytes(name, no_model, data, tmp_path):  # noqa: F811
    """A fork of this process is killed at each of its steps in the file system, and half through each file."""
    lines = (data / "rows.jsonl").read_text().splitlines(keepends=True)[:2]
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    options = ["--input", tmp_path / "rows.jsonl", "--image-folder", data, "--engine", "generate", "--shard-size", 1]

    def written(folder):
        return {name: (folder / name).read_bytes() for name in beside(folder) if not name.endswith(".lock")}

    assert not batch(*options, "--output", tmp_path / "whole" / name)
    whole, place = written(tmp_path / "whole"), tmp_path / "killed" / "whole"
    steps = 0
    while True:
        child = os.fork()
        if not child:
            _die_at(steps, str(place))
            os._exit(batch(*options, "--output", place / name) or 0)
        _, status = os.waitpid(child, 0)
        there = written(place) if place.is_dir() else {}
        for file in {"out.csv"} & there.keys():
            assert there[file] == whole[file]
        if status == 0:
            break
        assert os.waitstatus_to_exitcode(status) == 9
        assert not batch(*options, "--output", place / name)
        assert written(place) == whole, steps
        for path in sorted(place.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        place.rmdir()
        steps += 1
    assert steps > 15


def _die_at(steps, place):
    """Ends this process at a step that has to do with a place: without a word, as SIGKILL does."""
    left, plain = [steps], os.fsync

    def step(half=None):
        if not left[0]:
            if half is not None:
                os.ftruncate(half, os.fstat(half).st_size // 2)
            os._exit(9)
        left[0] -= 1

    def noted(event, about):
        if event in ("open", "os.rename", "os.link", "os.remove", "os.rmdir", "os.mkdir") and place in str(about[0]):
            step()

    sys.addaudithook(noted)
    os.fsync = lambda file: step(file) or plain(file)
