"""`m3-train config.yaml [--name value ...]`: fine-tunes an M3 checkpoint.

The output folder holds the run's checkpoints, from the last of which the same command goes on, `trainer_state.json` with
the losses, and at the end `final`, the trained model as a folder for the Hub. With `train: projector` there is also
`mm_projector.bin`, the projector alone.
"""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import gather_object
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback, set_seed

from m3_conversion.original import local_folder
from modeling_m3 import M3LlavaProcessor
from modeling_m3.checkpoint import check_checkpoint

from .arguments import DataArguments, M3TrainingArguments, ModelArguments, parse
from .data import BadSampleError, EvaluationDataset, LlavaDataset, Record, read_records
from .export import export
from .options import check_options
from .parameters import prepare_parameters
from .projector import read_projector
from .run_folder import RunFolder
from .run_record import describe_run
from .shown import CLOSES, OPENS, shown
from .stopping import Stopper, UndisturbedCollator
from .trainer import M3Trainer, OptimizerClass
from .usage import CountedCollator, CountedDataset


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
        records: in place of a data file; see `LlavaDataset`. Where they are no list, a text `fingerprint` of theirs may say
            which they are; else a run that goes on compares their number and some of their texts.
        callbacks: of `Trainer`.
        optimizer_class: as in `M3Trainer`.

    Raises:
        ValueError: before training, for anything that is wrong with the arguments, the data file or the output folder, which
            may hold another run; during it, for a bad record with `strict`.
    """
    with RunFolder(arguments.output_dir) as folder:
        trainer = _prepare(folder, model_arguments, data_arguments, arguments, records, callbacks, optimizer_class)
        return _train(folder, trainer, model_arguments, data_arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command. Returns its exit status: 0, or 1 where one line on stderr says what is wrong; 130 or 143 where
    Ctrl-C or SIGTERM ended it."""
    logging.basicConfig(format="%(asctime)s %(name)s: %(message)s", level=logging.INFO)
    with Stopper() as stopper, ExitStack() as held:
        try:
            parsed = parse(sys.argv[1:] if arguments is None else arguments)
            if parsed[1].show:
                return _show(_data(*parsed)[1], parsed[1].show)
            folder = held.enter_context(RunFolder(parsed[2].output_dir))
            trainer = _prepare(folder, *parsed, callbacks=[stopper])
        except (ValueError, OSError, ImportError, RuntimeError) as error:
            return _fail(" ".join(str(error).split()))
        except KeyboardInterrupt as stop:
            _fail("stopped before the first step")
            return 128 + stop.args[0]
        try:
            final = _train(folder, trainer, *parsed[:2], stopper)
        except BadSampleError as error:
            return _fail(str(error).splitlines()[-1])  # what comes before, from a worker, is its traceback
        except ImportError as error:  # of what an optimizer needs, which is made as training begins
            return _fail(" ".join(str(error).split()))
        except KeyboardInterrupt as stop:
            return _stopped(folder, trainer, stop.args[0])
        if final is None:
            return _stopped(folder, trainer, stopper.signum)
        print(f"wrote {final}")
    # Threads of gloo may hold the trainer's tensors while Python ends, and abort it (pytorch/pytorch#179291).
    del trainer
    gc.collect()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return 0


def _stopped(folder: RunFolder, trainer: M3Trainer, signum: int) -> int:
    checkpoint = folder.last_checkpoint()
    where = f"the same command goes on from {checkpoint}"
    if checkpoint is None:
        where = "there is no checkpoint yet, and the same command begins anew"
    if trainer.accelerator.is_main_process:
        _fail(f"stopped after step {trainer.state.global_step}: {where}")
    return 128 + signum


def _fail(message: str) -> int:
    print(f"m3-train: {message}", file=sys.stderr)
    return 1


def _prepare(
    folder: RunFolder,
    model_arguments: ModelArguments,
    data_arguments: DataArguments,
    arguments: M3TrainingArguments,
    records: Sequence[Record] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    optimizer_class: OptimizerClass | None = None,
) -> M3Trainer:
    check_options(arguments)
    folder.last_checkpoint()
    processor, train_dataset, eval_dataset = _data(model_arguments, data_arguments, arguments, records)
    name = model_arguments.model_name_or_path
    scales = arguments.scales(processor.visual_token_scales)
    facts = partial(describe_run, model_arguments, data_arguments, arguments, processor=processor)
    eval_records = None if eval_dataset is None else eval_dataset.records
    facts = partial(facts, records=train_dataset.records, eval_records=eval_records, optimizer_class=optimizer_class)
    folder.claim(arguments, facts)
    if eval_dataset is not None:
        eval_dataset.first_encoded()
    _say_how_records_are_read(train_dataset, arguments)
    set_seed(arguments.seed)  # LoRA starts at random
    # In full precision, as the optimizer needs it: `bf16` computes in bfloat16, and the final folder is stored as the source.
    model = AutoModelForImageTextToText.from_pretrained(
        name, dtype=torch.float32, attn_implementation=model_arguments.attn_implementation
    )
    if model_arguments.projector_weights is not None:
        read_projector(model, Path(model_arguments.projector_weights))
    prepare_parameters(model, model_arguments)
    trainer = M3Trainer(
        scales=scales,
        optimizer_class=optimizer_class,
        model=model,
        args=arguments,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=UndisturbedCollator(CountedCollator(processor.tokenizer.pad_token_id)),
        processing_class=processor,
        callbacks=list(callbacks),
    )
    folder.check_unrecorded(trainer)
    return trainer


def _data(
    model_arguments: ModelArguments,
    data_arguments: DataArguments,
    arguments: M3TrainingArguments,
    records: Sequence[Record] | None = None,
) -> tuple[M3LlavaProcessor, CountedDataset, EvaluationDataset | None]:
    """What a run reads, before anything of the model is loaded."""
    name = model_arguments.model_name_or_path
    config = check_checkpoint(local_folder(name, weights=False))
    if config.get("quantization_config"):
        raise ValueError(
            f"{name} is stored in 4 or 8 bits, which m3-train does not train: start from the checkpoint in full precision, or "
            "train adapters with peft (docs/lora.md)."
        )
    if records is None:
        if data_arguments.data_path is None:
            raise ValueError("data_path is missing: name a JSON file of records in LLaVA's format.")
        records = read_records(data_arguments.data_path)
    if not Path(data_arguments.image_folder).is_dir():
        raise ValueError(f"image_folder={data_arguments.image_folder} is no folder.")
    processor = AutoProcessor.from_pretrained(name, backend="pil")  # whose pixels are the original's
    samples = {
        "processor": processor,
        "image_folder": data_arguments.image_folder,
        "template": data_arguments.template,
        "max_length": data_arguments.model_max_length,
        "strict": data_arguments.strict,
    }
    eval_dataset = None
    if data_arguments.eval_data_path is not None:
        multiple = arguments.world_size * arguments.eval_batch_size
        eval_dataset = EvaluationDataset(read_records(data_arguments.eval_data_path), multiple=multiple, **samples)
    return processor, CountedDataset(records, **samples), eval_dataset


def _say_how_records_are_read(dataset: LlavaDataset, arguments: M3TrainingArguments) -> None:
    """Ends a run that cannot use its first records."""
    first = dataset.first_encoded()
    if arguments.process_index:
        return
    if first.adds_end:
        end = dataset.processor.tokenizer.eos_token
        logger.warning("the chat template writes no end of a turn: %s is added after each answer, and supervised", end)
    text = shown(dataset[0], dataset.processor)
    logger.info("a record as the model sees it, with what is supervised in %s %s:\n%s", OPENS, CLOSES, text)


def _show(dataset: LlavaDataset, count: int) -> int:
    """Shows the first records. Returns 1 where none of them can be used, else 0."""
    used = 0
    for index in range(min(count, len(dataset))):
        try:
            print(f"{dataset.name(index)}:\n{shown(dataset.sample(index), dataset.processor)}\n")
            used += 1
        except BadSampleError as error:
            print(f"{error}. It is skipped.\n")
    return int(not used)


def _train(
    folder: RunFolder,
    trainer: M3Trainer,
    model_arguments: ModelArguments,
    data_arguments: DataArguments,
    stopper: Stopper | None = None,
) -> Path | None:
    """Trains and writes the final folder, which it returns; None where a signal ended training before."""
    trainer.train(resume_from_checkpoint=folder.begin(trainer.accelerator))
    if stopper is not None and stopper.signum:
        return None
    if trainer.eval_dataset is not None:
        trainer.evaluate()
    trainer.save_state()
    _report(trainer.train_dataset, trainer)
    if trainer.eval_dataset is not None:
        _report(trainer.eval_dataset, trainer)
    if (
        stopper is not None and not trainer.usage.state()["answer_tokens"]
    ):  # a program that calls has the notes to look at
        raise BadSampleError(
            "No token of an answer was trained on in any step: nothing was learnt, and there is no final folder."
        )
    final = folder.folder / "final"
    export(trainer, final, model_arguments, data_arguments)
    return final


def _report(dataset: LlavaDataset, trainer: M3Trainer) -> None:
    for what, indices in dataset.notes.items():
        indices = sorted(set(gather_object(indices)))
        if indices and trainer.accelerator.is_main_process:
            names = [dataset.name(index) for index in indices[:_NAMES_IN_REPORT]]
            names += ["..."] if len(indices) > len(names) else []
            logger.warning("%d of %d records were %s: %s", len(indices), len(dataset.records), what, ", ".join(names))


if __name__ == "__main__":
    sys.exit(main())
