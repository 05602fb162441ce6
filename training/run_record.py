"""What a run depends on, as it is stored beside its checkpoints: the run goes on as it was begun, or not at all.

An argument is a part of the run unless it is known to be harmless. Of files the contents count, not where they lie.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image

from m3_conversion.json_files import read_json
from m3_conversion.original import local_folder
from m3_evaluation.checkpoints import fingerprint
from modeling_m3 import M3LlavaProcessor

from .arguments import DataArguments, M3TrainingArguments, ModelArguments
from .data import Record, _images
from .options import DECIDED_BY_EVALUATION, HARMLESS


Facts = dict[str, Any]

_SAMPLED = 64  # records: their pictures are looked at, and the texts of records that a program makes
_OF_THE_FOLDER = ("output_dir", "local_rank")
_SPLIT = ("per_device_train_batch_size", "gradient_accumulation_steps", "processes")
_LENGTH = ("max_steps", "num_train_epochs")
_FORM = {  # of what is compared otherwise than as a whole
    **dict.fromkeys(_SPLIT, int),
    **dict.fromkeys(_LENGTH, (int, float)),
    "data_path": {"records": int, "print": str},
    "image_folder": {"path": str, "bytes": dict},
}
_OF_ONE_PROCESS = "whole"
_VERSIONS = ("m3-hf", "transformers", "torch")


@dataclass(frozen=True)
class Change:
    """Something that is not as it was when the run was begun. `harmless`: what is trained does not depend on it."""

    name: str
    then: Any
    now: Any
    harmless: bool

    def __str__(self) -> str:
        return f"{self.name} {_shown(self.now)}, was {_shown(self.then)}"


def describe_run(
    model_arguments: ModelArguments,
    data_arguments: DataArguments,
    arguments: M3TrainingArguments,
    *,
    records: Sequence[Record],
    eval_records: Sequence[Record] | None,
    processor: M3LlavaProcessor,
    optimizer_class: Any = None,
) -> Facts:
    """All that a run depends on, by name, ready for JSON: its arguments, and prints of the contents that they name.

    Args:
        model_arguments, data_arguments, arguments: of the run.
        records, eval_records: what the data files hold, or what took their place.
        processor: of the checkpoint that the run starts from.
        optimizer_class: as of `finetune`.

    Raises:
        ValueError: the checkpoint's weights are not in safetensors.
    """
    facts = asdict(model_arguments) | asdict(data_arguments) | arguments.to_dict()
    facts = {name: value for name, value in facts.items() if name not in _OF_THE_FOLDER}
    if isinstance(arguments.deepspeed, str):
        facts["deepspeed"] = read_json(arguments.deepspeed)
    name, projector = model_arguments.model_name_or_path, model_arguments.projector_weights
    facts |= {
        "model_name_or_path": {"path": name, "print": fingerprint(local_folder(name))},
        "data_path": _data(data_arguments.data_path, records),
        "image_folder": {"path": data_arguments.image_folder, "bytes": _sizes(data_arguments.image_folder, records)},
        "matryoshka_scales": arguments.scales(processor.visual_token_scales),
        "chat template": {"print": _print([json.dumps(processor.chat_template, sort_keys=True)])},
        "processes": arguments.world_size,
        "precision of the launcher": arguments.mixed_precision,
        "checkpoints": _way_to_store(arguments),
        "optimizer_class": getattr(optimizer_class, "__qualname__", None),
        "m3-hf": version("m3-hf"),
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }
    if projector is not None and Path(projector).is_file():
        content = hashlib.sha256(Path(projector).read_bytes())
        facts["projector_weights"] = {"path": projector, "print": content.hexdigest()}
    if eval_records is not None:
        facts["eval_data_path"] = _data(data_arguments.eval_data_path, eval_records)
    return json.loads(json.dumps(facts, default=str))


def read_run(file: Path) -> Facts:
    """What `describe_run` gave when the run was begun.

    Raises:
        ValueError: a file that holds anything else.
    """
    facts = read_json(file)
    if not _holds(facts, _FORM):
        raise ValueError(f"{file} does not hold what a run depends on: name another output_dir, or remove it.")
    return facts


def compare(then: Mapping[str, Any], now: Facts, planned_steps: int) -> list[Change]:
    """What changed since a run was begun.

    Args:
        then, now: of `describe_run`.
        planned_steps: that the run was to take, as its last checkpoint says.
    """
    harmless = {*HARMLESS, *_VERSIONS}
    if now["load_best_model_at_end"] or now["lr_scheduler_type"] in ("reduce_lr_on_plateau", "greedy"):
        harmless -= DECIDED_BY_EVALUATION
    changes = [_split(then, now), _length(then, now, planned_steps), _pictures(then, now)]
    for name in sorted({*then, *now} - {*_SPLIT, *_LENGTH, "image_folder"}):
        if name not in now:  # this release of transformers does not have it
            before, after = then[name], None
            same = not before
        else:
            after = now[name]
            before = then.get(name, _default(name, after))
            same = before == after
        if not same:
            moved = _has_print(before) and _has_print(after) and before["print"] == after["print"]
            changes.append(Change(name, before, after, moved or name in harmless))
    return [change for change in changes if change is not None]


def _holds(value: Any, form: Any) -> bool:
    """Whether a value is of a type, or a dictionary that holds values of types by their names, and any others."""
    if not isinstance(form, dict):
        return isinstance(value, form)
    return isinstance(value, dict) and all(_holds(value.get(name), inner) for name, inner in form.items())


def _split(then: Mapping[str, Any], now: Facts) -> Change | None:
    """Batches of a step are the same however they are split, where every one is whole."""
    before, after = ([facts[name] for name in _SPLIT] for facts in (then, now))
    if before == after:
        return None
    batches = [batch * accumulated * processes for batch, accumulated, processes in (before, after)]
    whole = now["group_by_modality_length"] or now["data_path"]["records"] % batches[1] == 0
    readable = now["checkpoints"] == _OF_ONE_PROCESS or before[2] == after[2]
    shown = [" x ".join(map(str, split)) for split in (before, after)]
    return Change(" x ".join(_SPLIT), *shown, batches[0] == batches[1] and whole and readable)


def _length(then: Mapping[str, Any], now: Facts, planned_steps: int) -> Change | None:
    """A run may become longer. Where `max_steps` is given, epochs do not count."""
    (steps, epochs), (new_steps, new_epochs) = ([facts[name] for name in _LENGTH] for facts in (then, now))
    if steps <= 0 and new_steps <= 0:
        return None if epochs == new_epochs else Change("num_train_epochs", epochs, new_epochs, new_epochs > epochs)
    if steps == new_steps:
        return None
    return Change("max_steps", steps, new_steps, new_steps >= (steps if steps > 0 else planned_steps))


def _pictures(then: Mapping[str, Any], now: Facts) -> Change | None:
    """A picture that was missing may be there now. One that was there is the same, as far as its size says."""
    before, after = then["image_folder"], now["image_folder"]
    if then["data_path"]["print"] == now["data_path"]["print"]:
        for name, size in before["bytes"].items():
            new = after["bytes"].get(name)
            if new != size:
                shown = (f"{folder['path']} ({name}: {_bytes(n)})" for folder, n in ((before, size), (after, new)))
                return Change("image_folder", *shown, harmless=False)
    if before["path"] == after["path"]:
        return None
    return Change("image_folder", before["path"], after["path"], harmless=True)


def _data(path: str | None, records: Sequence[Record]) -> dict[str, Any]:
    """Of `records` that are no list, which may be made anew whenever they are read, some texts, or their own `fingerprint`."""
    if isinstance(records, list):
        texts: Iterable[str] = map(_text, records)
    elif isinstance(given := getattr(records, "fingerprint", None), str):
        texts = [given]
    else:
        lengths = list(getattr(records, "modality_lengths", None) or ())
        some = [(record.get("id"), record.get("conversations")) for record in _some(records)]
        texts = map(_text, [lengths, *some])
    return {"path": path, "records": len(records), "print": _print(texts)}


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=_without_pixels)


def _without_pixels(value: Any) -> str:
    if isinstance(value, Image.Image):
        return f"{value.mode} {value.size}"
    return os.fspath(value) if isinstance(value, os.PathLike) else type(value).__name__


def _print(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(f"{text}\n".encode())
    return digest.hexdigest()


def _some(records: Sequence[Record]) -> list[Record]:
    return [records[index] for index in range(0, len(records), -(-len(records) // _SAMPLED))]


def _sizes(folder: str, records: Sequence[Record]) -> dict[str, int]:
    """The sizes of some pictures that are there, by name: 600,000 would be too many to ask for."""
    images = [image for record in _some(records) for image in _images(record)]
    names = [os.fspath(image) for image in images if isinstance(image, (str, os.PathLike))]
    files = {name: os.path.join(folder, name) for name in names}
    return {name: os.path.getsize(file) for name, file in files.items() if os.path.isfile(file)}


def _way_to_store(arguments: M3TrainingArguments) -> str:
    """By what checkpoints are written, where another way to train could not read them."""
    if arguments.deepspeed_plugin is not None:
        return f"DeepSpeed, ZeRO stage {arguments.deepspeed_plugin.zero_stage}"
    if arguments.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in (
        "true",
        "1",
    ):  # by `accelerate launch`
        given = arguments.fsdp_plugin_args or {}
        number = given.get("fsdp_version", os.environ.get("FSDP_VERSION", "1"))
        return f"FSDP{number}, {given.get('state_dict_type', os.environ.get('FSDP_STATE_DICT_TYPE', 'by default'))}"
    return _OF_ONE_PROCESS


def _default(name: str, otherwise: Any) -> Any:
    """What an argument was before there was one; `otherwise` for what is none."""
    for field in [*fields(ModelArguments), *fields(DataArguments), *fields(M3TrainingArguments)]:
        if field.name == name:
            return field.default if field.default_factory is MISSING else field.default_factory()
    return otherwise


def _has_print(value: Any) -> bool:
    return _holds(value, {"print": str})


def _shown(value: Any) -> str:
    if not _has_print(value):
        return str(value)
    where = f"{value['path'] or 'made by a program'}, " if "path" in value else ""
    records = f"{value['records']} records, " if "records" in value else ""
    return f"({where}{records}print {value['print'][:12]})"


def _bytes(number: int | None) -> str:
    return "missing" if number is None else f"{number} bytes"
