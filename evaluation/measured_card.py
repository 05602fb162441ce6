"""Measured results in a checkpoint's card, as the `model-index` that the Hub reads."""

import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, metadata_save

from m3_conversion.whole_files import replacing

from .checkpoints import fingerprint


def write_card(result: dict[str, Any], folder: Path) -> int:
    """Adds the scores of every run of this checkpoint to its README.md; equal measures are replaced, all else stays.

    Returns:
        How many results the runs gave.

    Raises:
        ValueError: there is no README.md, or a run is of another checkpoint.
    """
    card_file = folder / "README.md"
    if not card_file.is_file():
        raise ValueError(f"--card {folder}: there is no README.md to write to.")
    own = {fingerprint(folder), fingerprint(folder, with_choice=True)}
    for name, run in result["runs"].items():
        if run["fingerprint"] not in own:
            raise ValueError(f"--card {folder}: {name} is a run of another checkpoint, {run['checkpoint']}.")
    new = [
        EvalResult(
            task_type="image-text-to-text",
            dataset_type=task,
            dataset_name=task,
            metric_type=entry["metric"],
            metric_name=f"{entry['metric']} at {scale['num_visual_tokens']} visual tokens",
            metric_args={"num_visual_tokens": scale["num_visual_tokens"]},
            metric_value=round(100 * scale["score"], 2),
        )
        for task, entries in result["tasks"].items()
        for entry in entries.values()
        for scale in entry["scales"]
    ]
    data = ModelCard.load(card_file).data
    kept = [
        old for old in data.eval_results or [] if not any(old.unique_identifier == add.unique_identifier for add in new)
    ]
    data.eval_results = [*kept, *new]
    data.model_name = data.model_name or folder.resolve().name
    with replacing(card_file) as part:
        shutil.copyfile(card_file, part)
        metadata_save(part, data.to_dict())
    return len(new)
