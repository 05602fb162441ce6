"""`m3-batch --ray`: the same shards on many machines, each answered by an actor that holds a model of its own."""

import logging
import os
from typing import Any

import torch
from tqdm import tqdm

from m3_conversion.signals import handling_signals, interrupt

from .batch_engines import EngineSettings, answer_rows, make_engine
from .batch_input import Source
from .batch_output import Output


class Worker:
    """An actor: one process, on one GPU where there are GPUs."""

    def __init__(self, settings: EngineSettings, source: Source, output: str, threads: int | None):
        if threads is not None:
            torch.set_num_threads(threads)
        self.settings, self.source, self.output = settings, source, Output(output)
        self.engine = make_engine(settings)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Answers shards, writes them, and returns how many rows they were, and how many of these failed."""
        answered, failed = [], []
        for index in batch["item"].tolist():
            rows = self.source.rows(self.source.shards[index])
            failed.append(self.output.write(index, rows, answer_rows(self.engine, self.settings, rows, int)))
            answered.append(len(rows))
        return {"rows": answered, "failed": failed}


def run(
    address: str,
    workers: int | None,
    settings: EngineSettings,
    source: Source,
    output: str,
    missing: list[int],
    progress: tqdm,
) -> int:
    """Answers the missing shards on a cluster. Returns how many rows failed.

    Args:
        address: of the cluster, as `ray.init` takes it, or "local".
        workers: actors; one for every GPU of the cluster, or every CPU of one without, if None.
        progress: is told of every row.

    Raises:
        ValueError: Ray is not installed.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ValueError("--ray needs Ray: pip install '.[serve]' in the clone.") from error
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # it calls every actor with arguments an error
    ray.init(
        address=None if address == "local" else address,
        ignore_reinit_error=True,
        log_to_driver=False,
        logging_level="ERROR",
    )
    try:
        with handling_signals(interrupt):  # Ray has set handlers of its own
            return _run(ray, workers, settings, source, output, missing, progress)
    finally:
        ray.shutdown()


def _run(
    ray: Any,
    workers: int | None,
    settings: EngineSettings,
    source: Source,
    output: str,
    missing: list[int],
    progress: tqdm,
) -> int:
    resources = ray.cluster_resources()
    has_gpus = resources.get("GPU", 0) > 0
    count = workers or max(1, int(resources["GPU" if has_gpus else "CPU"]))
    each = {"num_gpus": 1} if has_gpus else {"num_cpus": 1}
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    shards = ray.data.from_items(missing, override_num_blocks=len(missing))
    answered = shards.map_batches(
        Worker,
        fn_constructor_args=(settings, source, output, None if has_gpus else 1),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(count, len(missing)), max_tasks_in_flight_per_actor=2),
        **each,
    )
    failed = 0
    for rows in answered.iter_batches(batch_size=1, prefetch_batches=0):
        progress.update(int(rows["rows"].sum()))
        failed += int(rows["failed"].sum())
    return failed
