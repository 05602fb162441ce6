"""`m3-train config.yaml [--name value ...]`: fine-tunes an M3 checkpoint.

The output folder holds the run's checkpoints, from the last of which the same command goes on, `trainer_state.json` with
the losses, and at the end `final`, the trained model as a folder for the Hub.
"""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate.utils import gather_object
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback, set_seed
from transformers.trainer import TRAINER_STATE_NAME

import modeling_m3  # noqa: F401 - registers the classes
from m3_conversion.original import local_folder

from .arguments import DataArguments, M3TrainingArguments, ModelArguments, parse
from .data import BadSampleError, Collator, LlavaDataset, Record, read_records
from .export import export
from .parameters import prepare_parameters
from .trainer import M3Trainer, OptimizerClass


logger = logging.getLogger(__name__)

_NAMES_IN_REPORT = 20


def finetune(
    model_arguments: ModelArguments,
    data_arguments: DataArguments,
    arguments: M3TrainingArguments,
    *,
    records: Sequence[Record] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    optimizer_class: OptimizerClass | None = None,
) -> Path:
    """Trains, going on from the last checkpoint in the output folder if there is one. Returns the final folder.

    Args:
        model_arguments, data_arguments, arguments: of the run.
        records: in place of a data file; see `LlavaDataset`.
        callbacks: of `Trainer`.
        optimizer_class: as in `M3Trainer`.

    Raises:
        ValueError: before training, for anything that is wrong with the arguments, the data file or the output folder;
            during it, for a bad record with `strict`.
    """
    trainer = _prepare(model_arguments, data_arguments, arguments, records, callbacks, optimizer_class)
    return _train(trainer, model_arguments, data_arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command. Returns its exit status: 0, or 1 where one line on stderr says what is wrong."""
    logging.basicConfig(format="%(asctime)s %(name)s: %(message)s", level=logging.INFO)
    try:
        model_arguments, data_arguments, training_arguments = parse(sys.argv[1:] if arguments is None else arguments)
        trainer = _prepare(model_arguments, data_arguments, training_arguments)
    except (ValueError, OSError) as error:
        return _fail(" ".join(str(error).split()))
    try:
        print(f"wrote {_train(trainer, model_arguments, data_arguments)}")
    except BadSampleError as error:
        return _fail(str(error).splitlines()[-1])  # what comes before, from a worker, is its traceback
    # Threads of gloo may hold the trainer's tensors while Python ends, and abort it (pytorch/pytorch#179291).
    del trainer
    gc.collect()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return 0


def _fail(message: str) -> int:
    print(f"m3-train: {message}", file=sys.stderr)
    return 1


def _prepare(
    model_arguments: ModelArguments,
    data_arguments: DataArguments,
    arguments: M3TrainingArguments,
    records: Sequence[Record] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    optimizer_class: OptimizerClass | None = None,
) -> M3Trainer:
    _last_checkpoint(Path(arguments.output_dir))
    name = model_arguments.model_name_or_path
    local_folder(name, weights=False)
    if records is None:
        if data_arguments.data_path is None:
            raise ValueError("data_path is missing: name a JSON file of records in LLaVA's format.")
        records = read_records(data_arguments.data_path)
    if not Path(data_arguments.image_folder).is_dir():
        raise ValueError(f"image_folder={data_arguments.image_folder} is no folder.")
    processor = AutoProcessor.from_pretrained(name, backend="pil")  # whose pixels are the original's
    scales = arguments.scales(processor.visual_token_scales)
    dataset = LlavaDataset(
        records,
        processor,
        image_folder=data_arguments.image_folder,
        template=data_arguments.template,
        max_length=data_arguments.model_max_length,
        strict=data_arguments.strict,
    )
    set_seed(arguments.seed)  # LoRA starts at random
    # In full precision, as the optimizer needs it: `bf16` computes in bfloat16, and the final folder is stored as the source.
    model = AutoModelForImageTextToText.from_pretrained(
        name, dtype=torch.float32, attn_implementation=model_arguments.attn_implementation
    )
    prepare_parameters(model, model_arguments)
    return M3Trainer(
        scales=scales,
        optimizer_class=optimizer_class,
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=Collator(processor.tokenizer.pad_token_id),
        processing_class=processor,
        callbacks=list(callbacks),
    )


def _train(trainer: M3Trainer, model_arguments: ModelArguments, data_arguments: DataArguments) -> Path:
    output = Path(trainer.args.output_dir)
    trainer.train(resume_from_checkpoint=_last_checkpoint(output))
    trainer.save_state()
    _report(trainer.train_dataset, trainer)
    export(trainer, output / "final", model_arguments, data_arguments)
    return output / "final"


def _last_checkpoint(folder: Path) -> str | None:
    """The checkpoint to go on from; None for a new run. One whose writing was interrupted does not count.

    Raises:
        ValueError: the folder holds a finished run, or anything that is not a run's.
    """
    if not folder.exists():
        return None
    if not folder.is_dir():
        raise ValueError(f"output_dir={folder} is a file: name a folder.")
    if (folder / "final").exists():
        raise ValueError(f"output_dir={folder} holds a finished run: name another folder, or remove it.")
    checkpoints = list(folder.glob("checkpoint-*"))
    whole = [checkpoint for checkpoint in checkpoints if (checkpoint / TRAINER_STATE_NAME).is_file()]  # written last
    if whole:
        return str(max(whole, key=lambda checkpoint: int(checkpoint.name.rsplit("-", 1)[1])))
    if set(folder.iterdir()) - set(checkpoints):
        raise ValueError(
            f"output_dir={folder} is not empty and holds no checkpoint to go on from: name another folder."
        )
    return None


def _report(dataset: LlavaDataset, trainer: M3Trainer) -> None:
    for what, indices in (("skipped", dataset.bad), ("without anything supervised", dataset.unsupervised)):
        indices = sorted(set(gather_object(indices)))
        if indices and trainer.accelerator.is_main_process:
            names = [dataset.name(index) for index in indices[:_NAMES_IN_REPORT]]
            names += ["..."] if len(indices) > len(names) else []
            logger.warning("%d of %d records were %s: %s", len(indices), len(dataset), what, ", ".join(names))


if __name__ == "__main__":
    sys.exit(main())
