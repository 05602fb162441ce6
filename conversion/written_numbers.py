"""Numbers of visual tokens as people and tools write them: the one parser of the project. Imports nothing that takes time."""

import re
from decimal import Decimal
from numbers import Real
from typing import Any


AUTO = "auto"  # as modeling_m3.visual_tokens has it, which brings torch


def is_missing(value: Any) -> bool:
    """Whether a value is None or NaN, which pandas writes for what is not there."""
    return value is None or (isinstance(value, (Real, Decimal)) and value != value)


def parse_number(value: Any, name: str = "num_visual_tokens") -> int | str | None:
    """A number of visual tokens, "auto", or None for what is missing; whether a checkpoint offers it is not asked.

    Args:
        value: 36, 36.0, as tools write whole numbers beside missing ones, numpy's numbers, "36", "auto", None or NaN.
        name: what it is called where it is refused.

    Raises:
        ValueError: it is none of these.
    """
    if is_missing(value):
        return None
    if isinstance(value, str):
        text = value.strip()
        if text == AUTO:
            return AUTO
        if found := re.fullmatch(r"(\d{1,18})(\.0*)?", text):
            return int(found[1])
    elif isinstance(value, (Real, Decimal)) and not isinstance(value, bool) and value % 1 == 0:
        return int(value)
    raise ValueError(f"{name} {repr(value)[:80]}: give a number, as 36, or auto.")


def parse_numbers(text: str, name: str, may_be_auto: bool = False) -> list[int | str]:
    """Numbers of visual tokens that are joined by commas or spaces. Raises `ValueError` where one is none, or there is none."""
    try:
        numbers = [parse_number(part) for part in re.split(r"[\s,]+", text.strip(" ,"))]
    except ValueError:
        numbers = []
    if not numbers or (AUTO in numbers and not may_be_auto):
        or_auto = ", or auto" if may_be_auto else ""
        raise ValueError(f"{name} {text!r}: give numbers of visual tokens joined by commas, as 9,36{or_auto}.")
    return numbers
