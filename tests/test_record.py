"""What was answered is on disk, whatever ends a process and whatever another one is writing."""

import logging

from hypothesis import given, settings
from hypothesis import strategies as st
from test_json_files import TEXTS

from m3_conversion.json_files import to_line
from m3_evaluation.record import Record


def batch(number, text=""):
    return {f"{number}/{i}": {"results": [{"text": text}], "pictures": []} for i in range(2)}


# What a loss of power, a full disk or an editor can make of a line.
DAMAGES = {
    "zeros": lambda line: b"\0" * len(line) + b"\n",
    "zeros in it": lambda line: line[:5] + b"\0" * 40 + line[5:],
    "its first half": lambda line: line[: len(line) // 2] + b"\n",
    "its first half and another": lambda line: line[: len(line) // 2] + line,
    "no UTF-8": lambda line: b"\xff\xfe" + line,
    "no batch": lambda line: b"[1]\n",
}


@given(
    ranks=st.lists(st.integers(0, 11), min_size=1, max_size=8),
    texts=st.lists(TEXTS, min_size=8, max_size=8),
    damages=st.dictionaries(st.integers(0, 7), st.sampled_from(sorted(DAMAGES)), max_size=3),
    part=st.integers(0, 11),
)
@settings(deadline=None, max_examples=100)
def test_whatever_is_damaged_the_rest_is_there(tmp_path_factory, ranks, texts, damages, part):
    """Lines of up to twelve processes, some damaged, a part of a line in one; then one process goes on."""
    folder = tmp_path_factory.mktemp("task")
    expected, warnings, lines = {}, [], dict.fromkeys(ranks, 0)
    for number, rank in enumerate(ranks):
        file, added = folder / f"answers.{rank}.jsonl", batch(number, texts[number])
        line, lines[rank] = to_line(added).encode(), lines[rank] + 1
        if number in damages:
            line = DAMAGES[damages[number]](line)
            warnings.append(f"{file}, line {lines[rank]} is damaged")
        else:
            expected |= added
        with file.open("ab") as opened:
            opened.write(line)
    with (folder / f"answers.{part}.jsonl").open("ab") as opened:
        opened.write(to_line(batch(99)).encode()[:-1])

    messages = Messages()
    logger = logging.getLogger("m3_evaluation.record")
    logger.addHandler(messages)
    try:
        Record(folder / "answers.1.jsonl")  # another process says nothing of the same files
        record = Record(folder / "answers.0.jsonl")
        assert record.results == expected
        for number in (*damages, 99):
            assert record.missing(batch(number))
            record.add(batch(number, "again"))
        record.refresh()
    finally:
        logger.removeHandler(messages)
    assert sorted(message.partition(" (")[0] for message in messages.all) == sorted(warnings)
    assert all("\n" not in message and message.endswith("its questions are asked again") for message in messages.all)
    again = {key: value for number in (*damages, 99) for key, value in batch(number, "again").items()}
    assert record.results == Record(folder / "answers.5.jsonl").results == expected | again


class Messages(logging.Handler):
    def __init__(self):
        super().__init__()
        self.all = []

    def emit(self, record):
        self.all.append(record.getMessage())


def test_a_line_is_there_once_another_process_has_ended_it(tmp_path):
    line = to_line(batch(0)).encode()
    (tmp_path / "answers.1.jsonl").write_bytes(line[:20])
    record = Record(tmp_path / "answers.0.jsonl")
    assert record.missing(batch(0))
    with (tmp_path / "answers.1.jsonl").open("ab") as other:
        other.write(line[20:])
    record.refresh()
    assert record.results == batch(0)
