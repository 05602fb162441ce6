"""Questions as people write them, in commands and on the page. Not part of a checkpoint."""

import regex


# Spaces of every script, what is never shown (zero-width spaces, byte-order marks, fillers), and the blank of braille.
_BLANK = regex.compile(r"[\p{White_Space}\p{Default_Ignorable_Code_Point}\p{Cc}\p{Cf}\u2800]*")


def check_question(question: str | None, name: str = "The question") -> str:
    """The question.

    Args:
        name: what it is called where it is refused.

    Raises:
        ValueError: nothing in it can be seen, so that it would be answered with noise; or it is no text that can be encoded, as
            JSON's half of an escaped character, or what a shell gives that is not in UTF-8.
    """
    if is_blank(question):
        raise ValueError("There is no question yet: write one first.")
    try:
        question.encode()
    except UnicodeEncodeError as error:
        half = f"U+{ord(question[error.start]):04X}"
        raise ValueError(f"{name} holds {half}, half of a character, which is no text.") from None
    return question


def is_blank(question: str | None) -> bool:
    """Whether there is no question, or nothing in it that can be seen."""
    return question is None or _BLANK.fullmatch(question) is not None
