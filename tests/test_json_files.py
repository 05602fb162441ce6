"""JSON Lines hold any text and survive any end of a process; what other tools write is read."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m3_conversion import json_files


# Any characters, halves of surrogate pairs too, which JSON can name and UTF-8 cannot hold.
TEXTS = st.text(
    st.characters(exclude_categories=()) | st.sampled_from("\u2028\u2029\x85\x0b\x0c\x1c\x1e\r\ufeff\ud800")
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=8,
)


@given(values=st.lists(VALUES, max_size=4))
@settings(deadline=None, max_examples=200)
def test_any_value_comes_back_and_is_one_line_to_every_reader(tmp_path_factory, values):
    file = tmp_path_factory.mktemp("lines") / "values.jsonl"
    json_files.write_json_lines(file, values)
    assert [value for _, value in json_files.read_json_lines(file)] == values
    text = file.read_text(encoding="utf-8")
    assert list(map(json.loads, text.splitlines())) == values  # as programs read it that split at all ends of lines
    for value in values:
        json_files.add_line(file, value)
    assert [value for _, value in json_files.read_added_lines(file)] == [*values, *values]


@given(value=VALUES, text=TEXTS, mark=st.booleans(), end=st.sampled_from(["\n", "\r\n"]), last=st.booleans())
@settings(deadline=None, max_examples=200)
def test_lines_of_other_tools_are_read(tmp_path_factory, value, text, mark, end, last):
    records = [{"a": value}, {"b": text.encode(errors="ignore").decode()}]
    lines = [json.dumps(records[0]), "", json.dumps(records[1], ensure_ascii=False)]
    file = tmp_path_factory.mktemp("lines") / "values.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" * mark + (end.join(lines) + end * last).encode())
    assert list(json_files.read_json_lines(file)) == [(1, records[0]), (3, records[1])]


@given(values=st.lists(VALUES, min_size=2, max_size=4), data=st.data())
@settings(deadline=None, max_examples=200)
def test_cut_anywhere_the_whole_lines_are_there_and_more_can_be_added(tmp_path_factory, values, data):
    file = tmp_path_factory.mktemp("lines") / "values.jsonl"
    for value in values:
        json_files.add_line(file, value)
    content = file.read_bytes()
    cut = data.draw(st.integers(0, len(content)))
    file.write_bytes(content[:cut])
    whole = content[:cut].count(b"\n")
    assert [value for _, value in json_files.read_added_lines(file)] == values[:whole]
    json_files.add_line(file, "more")
    assert [value for _, value in json_files.read_json_lines(file)] == [*values[:whole], "more"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-le"])
def test_json_is_read_in_every_encoding_that_its_standards_name(tmp_path, encoding):
    file = tmp_path / "content.json"
    file.write_text('{"a": "é"}', encoding=encoding)
    assert json_files.read_json(file) == {"a": "é"}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_lines_in_another_encoding_are_refused_by_its_name(tmp_path, encoding):
    file = tmp_path / "content.jsonl"
    file.write_text('{"a": 1}\n', encoding=encoding)
    with pytest.raises(ValueError, match="content.jsonl.*UTF-16 or UTF-32.*UTF-8"):
        list(json_files.read_json_lines(file))


@pytest.mark.parametrize("line", [b"{", b"\xff", b"[" * 100_000, b'{"a": 1} {}'])
def test_what_is_no_json_is_refused_by_its_line(tmp_path, line):
    file = tmp_path / "content.jsonl"
    file.write_bytes(b"{}\n\n" + line + b"\n")
    with pytest.raises(ValueError, match="content.jsonl, line 3 is not JSON"):
        list(json_files.read_json_lines(file))
    file.write_bytes(line)
    with pytest.raises(ValueError, match="content.jsonl is not valid JSON"):
        json_files.read_json(file)
    with pytest.raises(ValueError, match="There is no file"):
        json_files.read_json(tmp_path / "none")


def test_what_cannot_be_written_leaves_what_was_there(tmp_path):
    file = tmp_path / "values.jsonl"
    json_files.write_json_lines(file, [1])
    with pytest.raises(TypeError):
        json_files.write_json_lines(file, [2, object()])
    assert file.read_text() == "1\n"
    assert list(tmp_path.iterdir()) == [file]
