"""How answers to one's own questions are judged, whatever the script; and runs that were judged by an older rule."""

import json
import re
import unicodedata
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from test_analysis import analyze, make_run

from m3_evaluation.runs import read_samples, read_task, write_task
from m3_evaluation.scores import METRICS, RULE, contains, exact_match, judge_anew


# Marks that end sentences, by their names; the inverted ones open them, and Adlam's initial ones too.
CLOSING = [
    mark
    for mark in map(chr, range(0x110000))
    if unicodedata.category(mark) == "Po"
    and re.search(
        r"FULL STOP|QUESTION MARK|EXCLAMATION MARK|DANDA|IDEOGRAPHIC COMMA|ELLIPSIS", unicodedata.name(mark, "")
    )
    and not re.search("INVERTED|INITIAL", unicodedata.name(mark))
]
WORDS = st.text(st.characters(categories=("L", "N", "M")), min_size=1, max_size=12)
TEXTS = st.lists(WORDS | st.text(max_size=6), min_size=1, max_size=4).map(" ".join)
# Letters that stand for themselves in any combination: no marks, no compatibility forms.
THAI, HAN, KANA = "กขคงจชซดตถทนบปพมยรลวสหอ", "红色的狗在白天吃三个苹果", "あいうえおかきくけこアイウエオカーキ"
TIBETAN, KHMER, LAO, BURMESE = "ཀཁགངཅཆཇཉཏཐདན", "កខគឃងចឆជឈញដឋ", "ກຂຄງຈຊຍດຕຖທນ", "ကခဂဃငစဆဇဈညဋဌ"
UNSPACED = st.sampled_from([THAI, HAN, KANA, TIBETAN, KHMER, LAO, BURMESE])


@pytest.mark.parametrize(
    ("answer", "right", "is_right"),
    [
        ("Red.", "red", True),
        ("dark red", "red", False),
        ("e419.", "E419", True),
        ("E 419", "E419", False),
        ("是。", "是", True),
        ("نعم؟", "نعم", True),
        ("हाँ।", "हाँ", True),
        ("It’s “red”", 'it\'s "red"', True),
        ("cafe\u0301", "Café", True),
        ("ＲＥＤ　１２", "red 12", True),
        ("twenty–one", "twenty-one", True),
        ("STRASSE", "Straße", True),
        ("ΟΔΟΣ", "οδος", True),
        ("do\u00adg\u200b", "dog", True),
        ("yes...", "yes…", True),
        ("yes..", "yes", False),  # one mark is dropped
        ("?", "!", False),  # and none where nothing else is there
        ("U.S.", "U.S", True),
        ("U.S.", "US", False),
        ("C++", "C", False),
        ("1,000", "1000", True),
        ("1,234,567.50", "1234567.5", True),
        ("1'000", "1000", True),
        ("1.0", "1", True),
        (".5", "0.50", True),
        ("+5", "5", True),
        ("−5", "-5.0", True),
        ("-0", "0", True),
        ("5", "-5", False),
        ("٣٫٥", "3.5", True),
        ("१२", "12", True),
        ("٥٠٪", "50%", True),
        ("10%", "10", False),
        ("$5", "5", False),
        ("-$5", "$-5", True),
        ("5 cm", "5", False),
        ("5cm", "5 cm", False),
        ("1.50cm", "1.5cm", True),
        ("1,5", "1.5", False),
        ("1,5", "15", False),
        ("10,00", "1000", False),
        ("1.000", "1000", False),
        ("1 000", "1000", False),
        ("0,001", "1", False),
        ("1,0000", "10000", False),
        ("007", "7", False),
        ("10²", "102", False),
        ("10²", "10^2", True),
        ("10₂", "10²", False),
        ("10₂", "102", False),
        ("1½", "11/2", False),
        ("1½", "1^1/2", False),
        ("H₂O", "h2o", True),
        ("½", "1/2", True),
        ("", "", True),
        ("", "a", False),
    ],
)
def test_exact_match(answer, right, is_right):
    assert exact_match(answer, ["other", right]) == exact_match(right, [answer]) == is_right


@pytest.mark.parametrize(
    ("answer", "right", "is_there"),
    [
        ("It is dark red.", "Red", True),
        ("It is reddish", "red", False),
        ("这是一只红色的狗。", "红色", True),
        ("これは赤いリンゴです", "リンゴ", True),
        ("นี่คือแมวสีดำ", "แมว", True),
        ("这是iPhone手机", "phone", False),  # a word among letters without spaces is one
        ("빨간색입니다", "색", False),  # Korean has spaces
        ("किताब", "कि", False),  # a vowel sign is part of its word
        ("1.5", "1", False),
        ("1.5", "5", False),
        ("3,000", "3", False),
        ("3,000", "000", False),
        ("about 3,000 dots", "3000", True),
        ("-5", "5", False),
        ("It is -5°C.", "-5", True),
        ("(−5)", "5", False),
        ("-$5", "5", False),
        ("气温是-5度", "5", False),
        ("气温是-5度", "-5", True),
        ("13个", "3", False),
        ("约1.5米", "1.5", True),
        ("3-5", "5", True),  # a hyphen between digits or letters is none of a number
        ("3–5", "3", True),
        ("covid-19", "19", True),
        ("10%-20%", "20", True),
        ("5 - 3", "3", True),
        (".5", "5", False),
        ("1,5", "5", False),
        ("v1.5", "5", False),
        ("1e-5", "5", False),
        ("10:30", "30", False),
        ("1/2", "2", False),
        ("10²", "10", False),
        ("10⁻²", "10", False),
        ("1½", "1", False),
        ("10₂", "10", False),
        ("12.10.2024", "10", False),
        ("E419", "419", False),
        ("$5", "5", True),
        ("10%", "10", True),
        ("5 cm", "5", True),
        ("№5", "5", True),
        ("C++ it is", "C++", True),
        ("red", "", False),
        ("Is it red?", "?", True),
        ("Is it red?", "red!", True),
    ],
)
def test_contains(answer, right, is_there):
    assert contains(answer, ["elsewhere", right]) == is_there


@given(text=TEXTS, form=st.sampled_from(["NFC", "NFD"]), space=st.sampled_from(["  ", "\t", "\n", "\u3000", "\u2028"]))
def test_another_form_or_white_space_is_the_same(text, form, space):
    assert exact_match(f"{space}{unicodedata.normalize(form, text).replace(' ', space)}{space}", [text]) == 1


@given(text=TEXTS)
def test_another_case_is_the_same(text):
    other = text.swapcase()
    assume(unicodedata.normalize("NFKC", other).casefold() == unicodedata.normalize("NFKC", text).casefold())
    assert exact_match(other, [text]) == 1


@given(words=st.lists(WORDS, min_size=1, max_size=3), mark=st.sampled_from(CLOSING))
def test_a_closing_mark_of_any_script_is_dropped(words, mark):
    text = " ".join(["It", *words])  # some words are of invisible characters alone
    assert exact_match(text + mark, [text]) == exact_match(text, [text + mark]) == 1


@given(
    words=st.lists(st.text(st.sampled_from("ab'\"-"), min_size=1), min_size=1, max_size=3),
    apostrophe=st.sampled_from("'‘’‛ʼ′`＇´"),
    quote=st.sampled_from('"“”„«»＂'),
    dash=st.sampled_from("-‐‑‒–—―−－﹣"),
)
def test_another_kind_of_quotes_and_dashes_is_the_same(words, apostrophe, quote, dash):
    text = " ".join(words)
    other = text.replace("'", apostrophe).replace('"', quote).replace("-", dash)
    assert exact_match(other, [text]) == 1


NUMBERS = st.integers(-(10**8), 10**8) | st.decimals(-(10**5), 10**5, places=3)


def written(number, style):
    """A number as people write it, by Python's own formats."""
    arabic = str.maketrans("0123456789.", "٠١٢٣٤٥٦٧٨٩٫")
    return {
        "plain": str(number),
        "grouped": f"{number:,}",
        "minus": str(number).replace("-", "−"),
        "arabic": f"{number:,}".translate(arabic),
    }[style]


@given(
    number=NUMBERS,
    other=NUMBERS,
    styles=st.tuples(*[st.sampled_from(["plain", "grouped", "minus", "arabic"])] * 2),
    around=st.sampled_from(
        [("", ""), ("It is ", "."), ("(", ")"), ("这是", "个"), ("x=", ", I think"), ("$", ""), ("", "%")]
    ),
)
def test_numbers_are_compared_as_numbers_and_none_is_found_in_another(number, other, styles, around):
    answer, right = written(number, styles[0]).join(around), written(other, styles[1])
    assert contains(answer, [right]) == (number == other)
    assert exact_match(written(number, styles[0]), [right]) == (number == other)


@given(answer=TEXTS, right=st.lists(TEXTS, min_size=1, max_size=3), pick=st.booleans())
def test_what_matches_exactly_is_contained(answer, right, pick):
    right += [answer.upper()] * pick
    assert contains(answer, right) >= exact_match(answer, right)
    assert contains(answer, [answer]) == 1


@given(script=UNSPACED, data=st.data())
def test_in_scripts_without_spaces_a_part_is_contained(script, data):
    letters = st.text(st.sampled_from(script), max_size=5)
    before, part, after = data.draw(letters), data.draw(letters.filter(bool)), data.draw(letters)
    assert contains(before + part + after + "。", [part]) == 1
    other = data.draw(letters.filter(bool))
    assert contains(before + part, [other]) == (other in before + part)


@given(
    answer=st.lists(st.sampled_from(["red", "dog", "a", "adog", "Пёс", "पीला", "강아지"]), max_size=6), data=st.data()
)
def test_elsewhere_whole_words_are_contained(answer, data):
    right = data.draw(
        st.lists(st.sampled_from(["red", "do", "dog", "a", "пёс", "пё", "पी", "강아"]), min_size=1, max_size=2)
    )
    lower, starts = [word.lower() for word in answer], range(len(answer) - len(right) + 1)
    assert contains(" ".join(answer), [" ".join(right)]) == any(lower[i : i + len(right)] == right for i in starts)


ANSWERS = [["3,000", "这是红色。", "red"], ["5", "-5", "-5"]]
OLD = {"exact_match": [[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]], "contains": [[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]]}
NEW = {"exact_match": [[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]], "contains": [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]}


def old_run(folder, rule=None):
    """As `m3-eval --data` wrote it before rules had numbers."""
    make_run(folder, ids=("1", "2"))
    samples = [
        replace(sample, target=target, answers=answers, scores={"anls": [0.0] * 3, **{k: OLD[k][i] for k in OLD}})
        for i, (sample, target, answers) in enumerate(zip(read_samples(folder, "my"), (["3", "红色"], "5"), ANSWERS))
    ]
    for sample in samples:
        sample.scores["anls"] = [METRICS["anls"](answer, list(sample.target)) for answer in sample.answers]
    task = read_task(folder, "my")
    write_task(folder, replace(task, metric="contains", overall=dict.fromkeys(METRICS), samples=2, rule=rule), samples)
    if rule is None:
        file = folder / "tasks" / "my" / "task.json"
        stored = json.loads(file.read_text())
        del stored["rule"]
        file.write_text(json.dumps(stored))
    return folder


def test_a_run_of_an_older_rule_is_judged_anew_from_its_answers(tmp_path, capsys):
    runs = [old_run(tmp_path / "old"), old_run(tmp_path / "new", RULE)]
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    analyze(*runs, "--output", tmp_path / "report", "--gallery", 0)  # whose font lacks Chinese
    assert {file: file.read_bytes() for file in before} == before
    old, new = json.loads((tmp_path / "report" / "results.json").read_text())["tasks"]["my"].values()
    assert old["judged_anew"] == {"anls": 0, "exact_match": 0, "contains": 4} and new["judged_anew"] is None
    assert [scale["score"] for scale in old["scales"]] == [0.5, 0.5, 0.0]
    assert [scale["score"] for scale in new["scales"]] == [1.0, 0.5, 0.5]  # as it says that it was judged
    told = f"judged anew by rule {RULE}"
    for name in ("report.md", "report.html"):
        page = (tmp_path / "report" / name).read_text()
        assert (
            page.count(told) == 1
            and "Of its 6 answers, so many are scored otherwise: 0 by exact_match, 4 by contains" in page
        )
    [line] = [line for line in capsys.readouterr().out.splitlines() if told in line]
    assert line.startswith(f"m3-analyze: {runs[0]}, my: ")


def test_what_a_benchmark_scored_stays(tmp_path):
    """Its metrics may have the names of ours."""
    folder = old_run(tmp_path / "run")
    samples = list(read_samples(folder, "my"))
    for overall in ({"contains": [1.0] * 3}, {"contains": None, "f1": None}):
        task = replace(read_task(folder, "my"), overall=overall)
        assert judge_anew(task, samples) == (samples, None)
    judged, changed = judge_anew(read_task(folder, "my"), samples)
    assert {name: [sample.scores[name] for sample in judged] for name in NEW} == NEW and changed["contains"] == 4
