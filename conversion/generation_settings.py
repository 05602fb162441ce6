"""How a new checkpoint generates: as its source says, in settings that transformers stores and generates with."""

import logging
import math
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from .original import ConversionError


logger = logging.getLogger(__name__)

# Settings that sampling alone reads, each with its largest value; the smallest is 0, of some a number above it.
SAMPLING = {
    **{"temperature": math.inf, "top_k": math.inf},
    **dict.fromkeys(("top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"), 1.0),
}
_ABOVE_0 = ("top_h", "typical_p")
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def token_ids(given: dict[str, Any], tokenizer: PreTrainedTokenizerBase, rows: int, file: Path) -> dict[str, Any]:
    """Ids that begin, end and pad; the tokenizer's where a source names none that is a row of the embedding.

    Args:
        given: of a source.
        tokenizer: of the new checkpoint.
        rows: of its embedding.
        file: where the settings are from, to name in a notice.
    """
    ids = {}
    for name in _IDS:
        several = given.get(name) if isinstance(given.get(name), list) else [given.get(name)]
        known = [number for number in several if type(number) is int and 0 <= number < rows]
        for number in several:
            if number is not None and number not in known:
                logger.warning("%s: %s %r is no token of the model, and is left out", file, name, number)
        ids[name] = (known if isinstance(given.get(name), list) else known[0]) if known else getattr(tokenizer, name)
    return ids


def sampling(given: dict[str, Any], file: Path) -> dict[str, Any]:
    """Whether to sample, and how. A temperature of 0 means not to, which transformers says by `do_sample` alone.

    To be greedy is written down because `pipeline` samples where a checkpoint says nothing. Settings of sampling have no effect
    without it, and transformers refuses to save them.

    Raises:
        ConversionError: for a value that nothing generates with, by its name.
    """

    def refuse(name: str, expected: str) -> ConversionError:
        return ConversionError(f"{file}: {name} is {given[name]!r}: it must be {expected}")

    if given.get("do_sample") not in (None, False, True):
        raise refuse("do_sample", "true or false")
    if not given.get("do_sample"):
        return {"do_sample": False}
    kept: dict[str, Any] = {"do_sample": True}
    for name, largest in SAMPLING.items():
        value = given.get(name)
        if value is None:
            continue
        if name == "top_k" and value == -1:  # as engines say that there is no such limit
            value = 0
        kind = "whole number" if name == "top_k" else "number"
        is_number = type(value) in (int, float) and math.isfinite(value) and (name != "top_k" or value == int(value))
        if not is_number or not 0 <= value <= largest or (value == 0 and name in _ABOVE_0):
            smallest = "above 0 and up" if name in _ABOVE_0 else "from 0"
            raise refuse(name, f"a {kind} {smallest}{'' if math.isinf(largest) else f' to {largest:g}'}")
        kept[name] = int(value) if name == "top_k" else float(value)
    is_greedy = 0 in (kept.get("temperature"), kept.get("top_p"))
    return {"do_sample": False} if is_greedy else kept


def storable(given: dict[str, Any], file: Path) -> GenerationConfig:
    """A configuration of all settings but those that transformers refuses to store, as one of beams without beams."""
    kept = {name: value for name, value in given.items() if name in (*SAMPLING, *_IDS, "do_sample")}
    left = {name: value for name, value in given.items() if name not in kept}
    for _ in range(2):  # what one setting needs may come after it
        for name in list(left):
            if _is_stored({**kept, name: left[name]}):
                kept[name] = left.pop(name)
    for name, value in left.items():
        logger.warning("%s: %s %r has no effect beside the other settings, and is left out", file, name, value)
    return GenerationConfig(**kept)


def _is_stored(settings: dict[str, Any]) -> bool:
    try:
        GenerationConfig(**settings).validate(strict=True)
    except (ValueError, TypeError):
        return False
    return True
