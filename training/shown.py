"""A sample as a person reads it: what the model sees, and which of it is supervised."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from modeling_m3 import M3LlavaProcessor

from .conversations import IGNORE_INDEX
from .data import Sample, rows_of


OPENS, CLOSES = "\u27e6", "\u27e7"  # double brackets, which texts hardly hold


def shown(sample: Sample, processor: M3LlavaProcessor) -> str:
    """Return the text of a sample, with what is supervised in \u27e6 \u27e7, and of an image's placeholders one and their number.

    Sequences stand below each other.
    """
    rows = zip(rows_of(sample, "input_ids"), rows_of(sample, "labels"))
    return "\n--\n".join(_shown(ids.tolist(), labels.tolist(), processor) for ids, labels in rows)


def _shown(input_ids: Sequence[int], labels: Sequence[int], processor: M3LlavaProcessor) -> str:
    tokenizer, image_token_id = processor.tokenizer, processor.image_token_id

    def kind(index: int) -> tuple[bool, bool]:
        return input_ids[index] == image_token_id, labels[index] != IGNORE_INDEX

    text, read = "", ""
    for (is_image, supervised), run in groupby(range(len(input_ids)), kind):
        run = list(run)
        before, read = read, tokenizer.decode(input_ids[: run[-1] + 1])  # a token alone may lose the space before it
        if is_image:
            text += f"{processor.image_token}*{len(run)}"
        else:
            new = (
                read.removeprefix(before) if read.startswith(before) else tokenizer.decode([input_ids[i] for i in run])
            )
            text += f"{OPENS}{new}{CLOSES}" if supervised else new
    return text
