"""lmms-eval's tasks at every scale: it makes prompts and scores; answers to all scales come from one pass over the questions."""

import contextlib
import difflib
import inspect
import os
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.task import Task as BenchmarkTask
from lmms_eval.evaluator import evaluate
from lmms_eval.tasks import TaskManager, get_task_dict
from loguru import logger

from m3_conversion.signals import interrupting

from .answering import Answerer, Chat
from .asking import ask_all
from .lmms_eval_model import M3, as_likelihood, cut, generation, settings_of
from .record import Record
from .runs import Sample, Task
from .signals import gather


# What documents of lmms-eval's data sets call the part they are in, and the kind of their question.
SUBSETS = ("subset", "split", "L2-category", "subfield", "subject", "task")
KINDS = ("kind", "question_type", "type", "category", "topic")
JUDGES = ("lmms_eval.llm_judge", "openai", "anthropic", "requests")
KEYS = ("OPENAI_API_KEY", "AZURE_API_KEY")


def find_tasks(names: Sequence[str], include_path: list[str] | None = None) -> dict[str, BenchmarkTask]:
    """The tasks of these names, and those of groups, by name.

    Raises:
        ValueError: for a name that lmms-eval does not know, and a task that no one here can grade.
    """
    logger.remove()
    logger.add(sys.stderr, level="WARNING")
    manager = TaskManager("WARNING", include_path=include_path, model_name="m3")
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, 3)
            advice = f" Did you mean {' or '.join(near)}?" if near else ""
            raise ValueError(f"--tasks {name}: lmms-eval knows no such task.{advice} One's own need --include_path.")
    tasks: dict[str, BenchmarkTask] = {}
    for name in names:
        try:
            found = get_task_dict([name], manager, "chat")
        except FileNotFoundError as error:
            raise ValueError(f"--tasks {name}: {' '.join(str(error).split())}") from error
        for leaf, task in _leaves(found):
            if "likelihood" in str(task.OUTPUT_TYPE) or task.OUTPUT_TYPE == "multiple_choice":
                [(leaf, task)] = _leaves(get_task_dict([leaf], manager, "simple"))
            elif task.OUTPUT_TYPE != "generate_until":
                raise ValueError(f"--tasks {name}: {leaf} asks by {task.OUTPUT_TYPE}, which m3-eval cannot.")
            check_grader(leaf, task)
            if task.config.num_fewshot is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=1234)
            tasks[leaf] = task
    return tasks


def check_grader(name: str, task: BenchmarkTask) -> None:
    """Raises `ValueError` for a task that only a paid model, or only its authors' server, can grade."""
    graders = {metric: task.aggregation()[metric] for metric in task.aggregation() if metric != "submission"}
    if not graders:
        raise ValueError(f"--tasks {name}: its answers are graded by its authors' server only. Use another split.")
    judged = [metric for metric, grader in graders.items() if asks_a_judge(grader)]
    process = task.config.process_results
    if callable(process) and asks_a_judge(process):
        judged = list(graders)
    if len(judged) == len(graders) and not any(os.environ.get(key) for key in KEYS):
        static = f"{name}_static"
        raise ValueError(
            f"--tasks {name}: its answers are graded by a model behind an API. Set {' or '.join(KEYS)}, or use a task that is "
            f"graded here, such as {static if name.startswith('mmbench') else 'those of docs/evaluation.md'}."
        )


def asks_a_judge(function: Any, seen: set | None = None) -> bool:
    """Whether what a task grades by can reach a model behind an API, as far as its code tells."""
    seen = set() if seen is None else seen
    function = inspect.unwrap(getattr(function, "func", function))
    code = getattr(function, "__code__", None)
    if code is None or code in seen:
        return False
    seen.add(code)
    names = set(code.co_names)
    if "openai" in code.co_consts:  # the argument by which MMBench's evaluator asks its judge
        return True
    for name in names:
        found = function.__globals__.get(name)
        origin = found.__name__ if isinstance(found, types.ModuleType) else getattr(found, "__module__", None)
        if (origin or "").startswith(JUDGES):
            return True
        if inspect.isfunction(found) and found.__module__.startswith("lmms_eval.tasks") and asks_a_judge(found, seen):
            return True
    return False


class AllScales(M3):
    """M3 as lmms-eval scores it at one scale after the other: the first answers at all, the others read the record."""

    def __init__(self, answerer: Answerer, scales: Sequence[int], batch_size: int, run_folder: Path, accelerator: Any):
        super(M3, self).__init__()
        self.answerer, self.scales, self.batch_size, self.run_folder = answerer, list(scales), batch_size, run_folder
        self.accelerator = accelerator
        self._rank, self._world_size = accelerator.process_index, accelerator.num_processes
        self.scale = self.scales[0]
        self.record: Record

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        questions = [(key_of(request), generation(settings_of(request))) for request in requests]
        self._ask(questions, lambda index: self.chat(requests[index]), requests)
        results = []
        for request in requests:
            found = self.record.results[key_of(request)]["results"][self.scales.index(self.scale)]
            counts = TokenCounts(found["visual_tokens"] + found["text_tokens"], found["answer_tokens"])
            results.append(GenerationResult(cut(found["text"], settings_of(request)), counts))
        return results

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        questions = [(key_of(request), {}) for request in requests]
        self._ask(
            questions,
            lambda index: self.likelihood_chat(requests[index])[0],
            requests,
            lambda index: self.likelihood_chat(requests[index])[1],
        )
        found = [self.record.results[key]["results"][self.scales.index(self.scale)] for key, _ in questions]
        return [as_likelihood(result) for result in found]

    def _ask(
        self, questions: list, chat_of: Callable, requests: list[Instance], continuation_of: Callable | None = None
    ) -> None:
        quiet = self.rank != 0 or self.scale != self.scales[0]
        name = requests[0].task_name

        def chat(index: int) -> Chat:
            with interrupting():  # a task may catch what ends it, and make a prompt without its pictures
                return chat_of(index)

        place = self.record, self.run_folder, self.batch_size, name, continuation_of, quiet
        ask_all(self.answerer, self.scales, questions, chat, *place)


Outcome = tuple[Task, list[Sample], dict[str, np.ndarray] | None]  # with signals, where those are kept


def run_task(name: str, task: BenchmarkTask, model: AllScales, limit: float | None) -> Outcome | None:
    """Asks and scores one task at every scale; None in all processes but the first."""
    folder = model.run_folder / "tasks" / name
    folder.mkdir(parents=True, exist_ok=True)
    model.record = Record(folder / f"answers.{model.rank}.jsonl")
    model.task_dict[name] = task.dataset
    arguments = SimpleNamespace(process_with_media=True, output_path=str(folder), log_samples=True, tasks=name)
    found = []
    for scale in model.scales:
        model.scale = scale
        with _silence(also_stderr=scale != model.scales[0]):
            found.append(evaluate(model, {name: task}, limit=limit, bootstrap_iters=0, cli_args=arguments))
    if model.rank != 0:
        return None
    model.record.refresh()
    with _silence():
        return _outcome(name, task, model, found, arguments)


def _outcome(
    name: str, task: BenchmarkTask, model: AllScales, found: list[dict[str, Any]], arguments: SimpleNamespace
) -> Outcome:
    filters = [ensemble.name for ensemble in task._filters] if getattr(task, "_filters", None) else ["none"]
    logged = [_by_filter(results["samples"][name], filters) for results in found]
    scores: dict[str, np.ndarray] = {}
    for metric, grader in task.aggregation().items():
        for filter_name in filters:
            rows = [
                [_score(sample[metric], grader, arguments) for sample in of_scale[filter_name] if metric in sample]
                for of_scale in logged
            ]
            if all(len(row) == len(logged[0][filter_name]) and None not in row for row in rows):
                label = metric if len(filters) == 1 else f"{metric},{filter_name}"
                scores[label] = np.array(rows, dtype=float)
    if not scores:
        raise ValueError(
            f"--tasks {name}: none of its metrics ({', '.join(task.aggregation())}) scores single samples."
        )
    samples, entries = [], []
    for index, sample in enumerate(logged[0][filters[0]]):
        asked = model.record.results[f"{sample['doc_id']}/0"]
        entries.append(asked)
        samples.append(
            Sample(
                id=str(sample["doc_id"]),
                question=_question(sample),
                target=_target(sample),
                answers=[_answer(of_scale[filters[0]][index]) for of_scale in logged],
                scores={label: values[:, index].tolist() for label, values in scores.items()},
                visual_tokens=[result["visual_tokens"] for result in asked["results"]],
                text_tokens=asked["results"][0]["text_tokens"],
                answer_tokens=[result.get("answer_tokens", 0) for result in asked["results"]],
                pictures=asked["pictures"],
                subset=_label(sample["doc"], SUBSETS),
                kind=_label(sample["doc"], KINDS),
            )
        )
    overall, better = {}, task.higher_is_better()
    for label in scores:
        metric, _, filter_name = label.partition(",")
        values = [results["results"][name].get(f"{metric},{filter_name or filters[0]}") for results in found]
        overall[label] = [float(value) for value in values] if all(_is_number(value) for value in values) else None
    metric = next(iter(scores))
    higher = {label: bool(better.get(label.partition(",")[0], True)) for label in scores}
    return Task(name, len(samples), metric, overall, higher), samples, gather(entries)


def key_of(request: Instance) -> str:
    """Of a request in its task: document ids are unique there, and a document may have several requests."""
    return f"{request.doc_id}/{request.idx}"


def _leaves(found: dict[str, Any]) -> Iterator[tuple[str, BenchmarkTask]]:
    for name, task in found.items():
        if isinstance(task, dict):
            yield from _leaves(task)
        else:
            task = task[1] if isinstance(task, tuple) else task
            if task is not None:
                yield str(name), task


def _by_filter(samples: list[dict[str, Any]], filters: list[str]) -> dict[str, list[dict[str, Any]]]:
    """lmms-eval logs a document once for every filter; processes one after the other, each with its filters in order."""
    seen: dict[Any, int] = {}
    result: dict[str, list[dict[str, Any]]] = {name: [] for name in filters}
    for sample in samples:
        which = seen.get(sample["doc_id"], 0)
        seen[sample["doc_id"]] = which + 1
        result[filters[which]].append(sample)
    for entries in result.values():
        entries.sort(key=lambda sample: sample["doc_id"])
    return result


def _score(value: Any, grader: Callable, arguments: SimpleNamespace) -> float | None:
    """A sample's own score: what is stored, or what the task's grader makes of this sample alone."""
    if isinstance(value, dict) and _is_number(value.get("score")):
        value = value["score"]
    if _is_number(value):
        return float(value)
    if asks_a_judge(grader) or not callable(grader) or "submission" in getattr(grader, "__name__", ""):
        return None
    takes = inspect.signature(grader).parameters
    value = grader([value], args=arguments) if "args" in takes else grader([value])
    return float(value) if _is_number(value) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, str) and value == value


def _question(sample: dict[str, Any]) -> str:
    texts = (argument for argument in sample["arguments"] if isinstance(argument, str) and argument)
    return next(texts, str(sample["doc"].get("question", "")))


def _target(sample: dict[str, Any]) -> str | list[str]:
    accepted = sample["doc"].get("answers")
    if isinstance(accepted, list) and accepted and all(isinstance(entry, str) for entry in accepted):
        return accepted
    target = sample["target"]
    return [str(entry) for entry in target] if isinstance(target, (list, tuple)) else str(target)


def _answer(sample: dict[str, Any]) -> str:
    answers = sample["filtered_resps"]
    if len(answers) > 1 and all(isinstance(answer, (list, tuple)) for answer in answers):  # likelihoods of choices
        return chr(ord("A") + int(np.argmax([answer[0] for answer in answers])))
    answer = answers[0]
    return str(answer[0] if isinstance(answer, (list, tuple)) else answer)


def _label(doc: dict[str, Any], names: Sequence[str]) -> str | None:
    return next((doc[name] for name in names if isinstance(doc.get(name), str) and doc[name]), None)


@contextlib.contextmanager
def _silence(also_stderr: bool = False) -> Iterator[None]:
    """Tasks print their details, and lmms-eval its progress, for every scale; those that matter are in the run folder."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        with contextlib.redirect_stderr(nowhere) if also_stderr else contextlib.nullcontext():
            yield
