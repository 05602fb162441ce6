"""Questions as people write them, in commands and on the page. Not part of a checkpoint."""

import regex


# Spaces of every script, what is never shown (zero-width spaces, byte-order marks, fillers), and the blank of braille.
_BLANK = regex.compile(r"[\p{White_Space}\p{Default_Ignorable_Code_Point}\p{Cc}\p{Cf}\u2800]*")


def check_question(question: str | None) -> str:
    """The question. Raises `ValueError` for one without anything that can be seen, which would be answered with noise."""
    if question is None or _BLANK.fullmatch(question):
        raise ValueError("There is no question yet: write one first.")
    return question
