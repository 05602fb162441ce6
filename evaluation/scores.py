"""How answers to one's own questions are judged: `METRICS`, and the rule by which two texts are the same. Imports nothing heavy.

docs/evaluation.md says the rule. Texts are held against each other as tokens: a word, a number, a letter of a script without
spaces, or any other sign. White space only separates tokens.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache

import regex

from .runs import Sample, Task


RULE = 2  # of `exact_match` and `contains`; stored with scores, which runs of before this number lack
RULE_IN_WORDS = (
    f"rule {RULE} (texts in Unicode's NFKC, without case, with one kind of quotes and of dashes, and without a closing mark; "
    "numbers by their value; any part of a text in scripts without spaces)"
)


def exact_match(answer: str, right: Sequence[str]) -> float:
    """1 if the answer is one of the right ones, but for how it is written; else 0."""
    return float(_tokens(answer) in map(_tokens, right))


def contains(answer: str, right: Sequence[str]) -> float:
    """1 if one of the right answers stands in the answer: as whole words and numbers, in scripts without spaces anywhere; else 0."""
    whole = _tokens(answer, closed=True)  # "?" is in "Is it?"
    return float(any(_tokens(text) in whole for text in right))


def anls(answer: str, right: Sequence[str]) -> float:
    """Average normalized Levenshtein similarity of one answer: of the nearest right one, and 0 below a half.

    Source: Biten et al., "Scene Text Visual Question Answering" (2019), section 4; DocVQA's metric.
    """
    best = max(_similarity(" ".join(answer.lower().split()), " ".join(text.lower().split())) for text in right)
    return best if best >= 0.5 else 0.0


METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "exact_match": exact_match,
    "contains": contains,
    "anls": anls,
}


def judge_anew(task: Task, samples: list[Sample]) -> tuple[list[Sample], dict[str, int] | None]:
    """The samples of a task with scores by this release's rule.

    Returns:
        The samples, and by metric, how many answers are scored otherwise than was stored. None, and the samples as they are,
        where they were scored by this rule or by a benchmark.
    """
    ours = task.overall.keys() <= METRICS.keys() and all(value is None for value in task.overall.values())
    if not ours or task.rule == RULE:
        return samples, None
    changed, judged = dict.fromkeys(task.overall, 0), []
    for sample in samples:
        right = [sample.target] if isinstance(sample.target, str) else sample.target
        scores = {name: [METRICS[name](answer, right) for answer in sample.answers] for name in task.overall}
        for name, values in scores.items():
            changed[name] += sum(old != new for old, new in zip(sample.scores[name], values))
        judged.append(replace(sample, scores=scores))
    return judged, changed


# Letters of scripts without spaces between words: those that Unicode's line breaking (UAX 14) needs a dictionary for, ideographs
# and kana, and those that are broken after any syllable.
_UNSPACED = (
    r"[[\p{Line_Break=Complex_Context}\p{Script=Han}\p{Script=Hiragana}\p{Word_Break=Katakana}\p{Script=Bopomofo}"
    r"\p{Script=Tibetan}\p{Script=Javanese}\p{Script=Balinese}]&&[\p{L}\p{M}\p{Nl}]]"
)
_WORD = rf"[[\w\p{{N}}]--{_UNSPACED}]"  # a letter, mark or digit of the others
_FLAGS = regex.VERSION1 | regex.VERBOSE
_NO_SIGN_AFTER = rf"(?<![{_WORD}\p{{Pe}}%°+\-])"  # 3-5, covid-19, 10%-20%, f(x)-5
_TOKEN = regex.compile(
    rf"""
    (?: {_NO_SIGN_AFTER} [-+] (?=\.?[0-9]) )?
    (?: (?<![{_WORD}.]) \. (?=[0-9]) )?
    {_WORD}+ (?: (?: (?<=[0-9]) (?: [.,:/'] | \^[-+]? ) (?=[0-9]) | (?<=[0-9]e) [-+] (?=[0-9]) ) {_WORD}+ )*
    | \S
    """,
    _FLAGS,
)
_NUMBER = regex.compile(
    rf"""
    (?P<sign> [-+]? )
    (?: (?P<whole> [1-9][0-9]{{0,2}} (?: (?:,[0-9]{{3}})+ | (?:'[0-9]{{3}})+ ) | [1-9][0-9]* | 0 ) (?: \.(?P<part> [0-9]+ ) )?
    | \. (?P<part> [0-9]+ ) )
    (?P<unit> (?![0-9]) {_WORD}* )
    """,
    _FLAGS,
)
_SIGN_BEFORE_CURRENCY = regex.compile(rf"{_NO_SIGN_AFTER} ([-+]) (\p{{Sc}}) (?=\.?[0-9])", _FLAGS)
# NFKC would make one number or one word of these: 10² is not 102, 10₂ neither, 1½ not 11/2, №5 no word.
_POWER = regex.compile(r"(?<=\d)(?=[⁺⁻]?[⁰¹²³⁴-⁹])")
_JOINED = regex.compile(r"(?<=\d)(?=\p{No})")
_APART = regex.compile(r"(?<=\p{No})(?=\d)|(?=\p{So})(?<=\p{L}\p{M}*)|(?<=\p{So})(?=[\p{L}\p{N}])")
_IGNORED = regex.compile(r"\p{Default_Ignorable_Code_Point}")
# The first two are … and ‼, ⁇, ⁈, ⁉ in NFKC, · is a Greek one in NFC; those that follow lack the property.
_CLOSING = regex.compile(r"(?<=\S)\s*(?:\.{3}|[!?]{2}|[\p{Terminal_Punctuation}…·\uFE10-\uFE16\uFE19᠁՜՝՞⳾])$")
_APOSTROPHES = "`´ʹʻʼʽ՚′"  # that are no quotation marks to Unicode
_FOLDED = str.maketrans({**dict.fromkeys(_APOSTROPHES, "'"), "″": '"', "⁄": "/", "٫": ".", "٬": ",", "٪": "%"})


@lru_cache(maxsize=4096)
def _tokens(text: str, closed: bool = False) -> str:
    """The tokens of a text, each between two line feeds, so that those of a part of it are a part of them.

    With `closed`, its closing mark is one of them.
    """
    found = _TOKEN.findall(_plain(text, closed))
    return "\n" + "\n".join(map(_as_number, found)) + "\n"


def _plain(text: str, closed: bool) -> str:
    """A text as it is compared: NFKC without case (Unicode's toNFKC_Casefold), quotes, dashes, digits and spaces of one kind."""
    text = unicodedata.normalize("NFC", " ".join(_IGNORED.sub("", text).split())).translate(_FOLDED)
    text = _JOINED.sub("_", _POWER.sub("^", text if closed else _CLOSING.sub("", text)))
    text = _APART.sub(" ", text)
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFD", text).casefold())
    text = unicodedata.normalize("NFKC", text.casefold()).translate(_FOLDED)
    text = regex.sub(r"\p{Dash}", "-", regex.sub(r"\p{Quotation_Mark}", _quote, text)).replace("''", '"')
    text = regex.sub(r"\d", lambda digit: str(unicodedata.decimal(digit[0], digit[0])), text)
    return _SIGN_BEFORE_CURRENCY.sub(r"\2\1", text)


def _quote(mark: regex.Match[str]) -> str:
    name = unicodedata.name(mark[0], "")
    return "'" if "SINGLE" in name or "APOSTROPHE" in name else '"'


def _as_number(token: str) -> str:
    """A number as each is written that equals it; anything else as it is, dates, times and codes that begin with 0 too."""
    found = _NUMBER.fullmatch(token)
    if found is None:
        return token
    whole, part = regex.sub("[,']", "", found["whole"] or "0"), (found["part"] or "").rstrip("0")
    value = f"{whole}.{part}" if part else whole
    return f"{'-' * (found['sign'] == '-' and value != '0')}{value}{found['unit']}"


def _similarity(a: str, b: str) -> float:
    if not a and not b:
        return 1.0
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, start=1):
        previous, row[0] = row[0], i
        for j, other in enumerate(b, start=1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (left != other))
    return 1 - row[-1] / max(len(a), len(b))
