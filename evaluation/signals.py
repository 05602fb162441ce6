"""What the model knew when it answered: what `m3-budget` fits a choice on, beside a finished task of a run folder."""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from transformers.generation.utils import GenerateDecoderOnlyOutput

from m3_conversion.whole_files import replacing
from modeling_m3.automatic_budget_m3 import Confidence, read_signals


PROBE_TOKENS = 8  # of an answer, that are looked at before it is kept
SIGNALS_FILE = "signals.safetensors"


def known(output: GenerateDecoderOnlyOutput, ends: set[int], new_tokens: torch.Tensor) -> list[dict[str, Any]]:
    """Of greedy answers, for each: what was known before it and how sure its beginning was, as JSON holds it.

    Args:
        output: of `generate`, with hidden states and logits.
        ends: tokens that end an answer.
        new_tokens: (b, n) that were answered.
    """
    signals = read_signals(output.hidden_states[0]).half().cpu().numpy()
    confidence = Confidence(len(new_tokens), new_tokens.device)
    going = torch.ones(len(new_tokens), dtype=torch.bool, device=new_tokens.device)
    ending = torch.tensor(sorted(ends), device=new_tokens.device)
    for logits, token in zip(output.logits[:PROBE_TOKENS], new_tokens.T):
        confidence.add(logits, going)
        going = going & ~torch.isin(token, ending)
    return [
        {"signals": base64.b64encode(row.tobytes()).decode(), "confidence": sure}
        for row, sure in zip(signals, confidence.values().tolist())
    ]


def gather(entries: Sequence[dict[str, Any]]) -> dict[str, np.ndarray] | None:
    """The signals (n, s, w), confidences (n, s, c) and keys of pictures of a record's n entries; None where none were kept."""
    if not entries or entries[0]["results"][0].get("known") is None:
        return None
    told = [[result["known"] for result in entry["results"]] for entry in entries]
    signals = [[np.frombuffer(base64.b64decode(one["signals"]), np.float16) for one in row] for row in told]
    groups = "\n".join(" ".join(entry["keys"]) for entry in entries)
    return {
        "signals": np.array(signals),
        "confidences": np.array([[one["confidence"] for one in row] for row in told], dtype=np.float32),
        "groups": np.frombuffer(groups.encode(), dtype=np.uint8),
    }


def write_signals(folder: Path, gathered: dict[str, np.ndarray]) -> None:
    """Into the folder of a task."""
    with replacing(folder / SIGNALS_FILE) as part:
        save_file(gathered, part)


def read_task_signals(folder: Path) -> dict[str, np.ndarray] | None:
    """As `gather`, with texts as groups; None where the task keeps none."""
    if not (folder / SIGNALS_FILE).is_file():
        return None
    stored = load_file(folder / SIGNALS_FILE)
    return stored | {"groups": np.array(stored["groups"].tobytes().decode().split("\n"))}
