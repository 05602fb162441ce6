"""Numbers of visual tokens, however people and tools write them, are read alike by every command."""

import math
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3_conversion.written_numbers import AUTO, parse_number, parse_numbers
from modeling_m3 import visual_tokens


AS_WRITTEN = (int, float, str, np.int32, np.float64, Decimal, "{}.0".format, " {} ".format)


@given(number=st.integers(0, 2**24), write=st.sampled_from(AS_WRITTEN))
def test_a_number_is_read_however_it_is_written(number, write):
    found = parse_number(write(number))
    assert found == number and type(found) is int


@pytest.mark.parametrize("value", [None, math.nan, np.float32("nan"), Decimal("NaN")])
def test_what_is_missing_is_none(value):
    assert parse_number(value) is None


def test_auto_is_the_word_of_the_processor():
    assert parse_number(" auto ") == AUTO == visual_tokens.AUTO


@pytest.mark.parametrize(
    "value", ["", "few", "-9", "36.5", 36.5, math.inf, True, np.True_, [9], {"a": 9}, b"9", "9" * 5000, "nan"]
)
def test_anything_else_is_refused_by_its_name(value):
    with pytest.raises(ValueError, match=r"^--scales .*: give a number, as 36, or auto\.$") as refused:
        parse_number(value, "--scales")
    assert len(str(refused.value)) < 200


def test_lists():
    assert parse_numbers(" 9, 36 1,", "--scales") == [9, 36, 1]
    assert parse_numbers("auto", "--scales", may_be_auto=True) == [AUTO]
    for text in ("", ",", "9,few", "auto"):
        with pytest.raises(ValueError, match=rf"--scales '{text}': give numbers .*, as 9,36\.$"):
            parse_numbers(text, "--scales")
