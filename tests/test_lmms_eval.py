"""M3 in lmms-eval, unforked: the plug-in, our tasks, its own tasks' schemas, and m3-eval over them."""

import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from conftest import commands_on_path
from PIL import Image
from test_signals import start, until
from video_files import CLIP

import modeling_m3
from m3_evaluation.runs import read_run, read_samples, read_task


pytestmark = [
    pytest.mark.lmms_eval,
    pytest.mark.skipif(find_spec("lmms_eval") is None, reason="needs lmms-eval (CI has a stage for it)"),
]

TINY = modeling_m3.default_checkpoint()
SCALES = [1, 9, 36, 144, 576]
LIMIT = 24  # questions


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """The folder of our tasks, with a few pictures."""
    from m3_evaluation.own_tasks import make

    folder = tmp_path_factory.mktemp("tasks")
    make(folder, pictures=6)
    return folder


def m3_eval(*arguments):
    from m3_evaluation.eval_command import app

    app([str(TINY), *map(str, arguments)], standalone_mode=False)


def plugin(tasks, *names, limit=LIMIT, **arguments):
    """What lmms-eval's own evaluator logs of our model: samples by task."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    force_simple = arguments.pop("force_simple", False)
    batch_size = arguments.pop("batch_size", 8)
    cache = arguments.pop("use_cache", None)
    given = ",".join(f"{name}={value}" for name, value in {"pretrained": TINY, **arguments}.items())
    return simple_evaluate(
        model="m3",
        model_args=given,
        tasks=list(names),
        task_manager=TaskManager("ERROR", include_path=str(tasks), model_name="m3"),
        limit=limit,
        batch_size=batch_size,
        force_simple=force_simple,
        use_cache=cache,
        bootstrap_iters=0,
    )["samples"]


def answers(samples):
    return [sample["filtered_resps"][0] for sample in samples]


@pytest.fixture(scope="module")
def run(tasks, tmp_path_factory):
    """A run of m3-eval over both of our tasks, that keeps signals."""
    folder = tmp_path_factory.mktemp("run") / "run"
    asked = ["--tasks", "m3_scenes,m3_easy_vqa", "--include_path", tasks, "--limit", LIMIT]
    m3_eval(*asked, "--signals", "--output", folder)
    return folder


def test_signals_of_both_tasks_are_what_m3_budget_reads(run):
    from m3_evaluation.checkpoints import fingerprint
    from m3_training.budget_samples import samples_of_run

    found = samples_of_run(run, SCALES, fingerprint(TINY))
    recorded = [sample for name in ("m3_scenes", "m3_easy_vqa") for sample in read_samples(run, name)]
    assert found.scores.tolist() == [sample.scores["exact_match"] for sample in recorded]
    assert found.signals.shape == (2 * LIMIT, 5, 384) and found.confidences.shape == (2 * LIMIT, 5, 6)
    assert (found.confidences[:, :, 0] < 0).all()  # log-probabilities
    for task, kinds in (("m3_scenes", 7), ("m3_easy_vqa", 1)):
        assert len({kind for kind in found.kinds if kind.startswith(task)}) <= kinds


def test_right_and_wrong_as_the_recipe_counts(run):
    from m3_training.m3_tiny.data import held_out_easy_vqa, held_out_scenes
    from m3_training.m3_tiny.evaluate import evaluate

    model, processor = modeling_m3.load(TINY, dtype="float32")
    for task, made in (("m3_scenes", held_out_scenes(6)), ("m3_easy_vqa", itertools.islice(held_out_easy_vqa(), 6))):
        counted = evaluate(model, processor, made, SCALES)["average"].correct[:LIMIT]
        found = np.array([sample.scores["exact_match"] for sample in read_samples(run, task)])
        assert found.tolist() == counted.astype(float).tolist()
        assert read_task(run, task).overall["exact_match"] == counted.mean(0).tolist()


@pytest.mark.parametrize(("scale", "batch_size"), [(9, 8), (9, 1), (576, 8)])
def test_plugin_answers_as_m3_eval_records(scale, batch_size, tasks, run):
    found = plugin(tasks, "m3_scenes", num_visual_tokens=scale, batch_size=batch_size)["m3_scenes"]
    recorded = [sample.answers[SCALES.index(scale)] for sample in read_samples(run, "m3_scenes")]
    assert answers(found) == recorded
    counts = found[0]["token_counts"][0]
    assert counts["input_tokens"] == scale + next(read_samples(run, "m3_scenes")).text_tokens


def test_simple_interface_answers_the_same(tasks, run):
    found = plugin(tasks, "m3_scenes", num_visual_tokens=36, force_simple=True)["m3_scenes"]
    assert answers(found) == [sample.answers[2] for sample in read_samples(run, "m3_scenes")]


@pytest.mark.parametrize("force_simple", [False, True])
def test_videos_are_answered_as_by_m3_eval(force_simple, tmp_path):
    from m3_evaluation.video_tasks import make

    rows = [["", "video_name", "question", "answer", "a0", "a1"], ["0", "clip", "Is there a star", "B", "no", "yes"]]
    (tmp_path / "choice.csv").write_text("\n".join(map(",".join, rows)))
    (tmp_path / "open.jsonl").write_text(
        json.dumps({"video": "clip.mp4", "question": "What color is it?", "answer": "blue"})
    )
    for name in ("choice.csv", "open.jsonl"):
        assert make(tmp_path / "tasks", tmp_path / name, CLIP.parent, name.partition(".")[0]) == 1
    ways = {"num_frames": 3, "video_layout": "collage"}
    found = plugin(tmp_path / "tasks", "choice", "open", num_visual_tokens=36, force_simple=force_simple, **ways)
    asked = ["--tasks", "choice,open", "--include_path", tmp_path / "tasks", "--scales", "9,36"]
    m3_eval(*asked, "--num_frames", 3, "--video_layout", "collage", "--output", tmp_path / "run")
    for name in ("choice", "open"):
        [sample] = read_samples(tmp_path / "run", name)
        assert answers(found[name]) == [sample.answers[1]] and sample.visual_tokens == [9, 36]
    assert "A:no. B:yes." in next(read_samples(tmp_path / "run", "choice")).question


@pytest.mark.parametrize(
    "way",
    [
        {"load_in_4bit": True, "num_visual_tokens": 9},
        {"image_grid_pinpoints": "336x672+672x336", "num_visual_tokens": 9},
        {"num_visual_tokens": "auto"},
    ],
    ids=["4bit", "tiles", "auto"],
)
def test_as_generate_answers(way, tasks, converted):
    """In four bits, with other tiles than the checkpoint's, at chosen numbers: as each question answered alone by `generate`."""
    from m3_training.m3_tiny.data import held_out_scenes

    name = converted["llava-next-m3" if "image_grid_pinpoints" in way else "llava15-m3"]
    name = TINY if way["num_visual_tokens"] == "auto" else name
    found = plugin(tasks, "m3_scenes", limit=7, pretrained=name, batch_size=3, **way)["m3_scenes"]
    model, processor = modeling_m3.load(name, quantize="nf4" if "load_in_4bit" in way else None)
    tiles = {"image_grid_pinpoints": [[336, 672], [672, 336]]} if "image_grid_pinpoints" in way else {}
    [(picture, questions)] = held_out_scenes(1)
    spent = set()
    for question, sample, answer in zip(questions, found, answers(found), strict=True):
        content = [{"type": "image", "image": picture}, {"type": "text", "text": question.text}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"num_visual_tokens": way["num_visual_tokens"], **tiles},
        )
        output = model.generate(
            **inputs.to(model.device), max_new_tokens=16, do_sample=False, return_dict_in_generate=True
        )
        new = output.sequences[0, inputs["input_ids"].shape[1] :]
        assert processor.decode(new, skip_special_tokens=True).strip() == answer
        if way["num_visual_tokens"] == "auto":
            text_tokens = (inputs["input_ids"] != processor.image_token_id).sum()
            assert sample["token_counts"][0]["input_tokens"] == output.visual_tokens_spent.item() + text_tokens
            spent.add(output.visual_tokens_spent.item())
    assert way["num_visual_tokens"] != "auto" or len(spent) > 1


def test_a_cached_run_goes_on(tasks, tmp_path, monkeypatch):
    from m3_evaluation.answering import Answerer

    first = plugin(tasks, "m3_scenes", limit=8, num_visual_tokens=9, use_cache=str(tmp_path))["m3_scenes"]
    asked, answer = [], Answerer.answer
    monkeypatch.setattr(
        Answerer, "answer", lambda self, chats, *a, **k: asked.extend(chats) or answer(self, chats, *a, **k)
    )
    again = plugin(tasks, "m3_scenes", limit=12, num_visual_tokens=9, use_cache=str(tmp_path))["m3_scenes"]
    assert answers(again)[:8] == answers(first)
    assert len(asked) == 4


def test_two_processes_answer_as_one(tasks, run, tmp_path):
    environment = {**os.environ, "PATH": commands_on_path(), "OMP_NUM_THREADS": "1"}
    output = tmp_path / "run"
    launch = ["accelerate", "launch", "--cpu", "--num_processes", "2", "-m"]
    arguments = [TINY, "--tasks", "m3_scenes", "--include_path", tasks, "--limit", LIMIT, "--output", output]
    command = [*launch, "m3_evaluation.eval_command", *map(str, arguments)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert [vars(sample) for sample in read_samples(output, "m3_scenes")] == [
        vars(sample) for sample in read_samples(run, "m3_scenes")
    ]
    model = f"pretrained={TINY},num_visual_tokens=9"
    place = [
        "--include_path",
        str(tasks),
        "--limit",
        str(LIMIT),
        "--output_path",
        str(tmp_path / "lmms"),
        "--log_samples",
    ]
    command = [*launch, "lmms_eval", "--model", "m3", "--model_args", model, "--tasks", "m3_scenes", *place]
    result = subprocess.run([*command, "--batch_size", "8"], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    [file] = (tmp_path / "lmms").rglob("*samples_m3_scenes.jsonl")
    logged = {entry["doc_id"]: entry["filtered_resps"] for entry in map(json.loads, file.open())}
    assert logged == {int(sample.id): sample.answers[1] for sample in read_samples(run, "m3_scenes")}


def test_killed_it_goes_on_to_the_same(tasks, run, tmp_path):
    environment = {**os.environ, "PATH": commands_on_path()}
    output = tmp_path / "run"
    asked = ["--tasks", "m3_scenes,m3_easy_vqa", "--include_path", tasks, "--limit", LIMIT]
    arguments = [*asked, "--signals", "--output", output]
    process = subprocess.Popen(["m3-eval", str(TINY), *map(str, arguments)], env=environment, stderr=subprocess.DEVNULL)
    record = output / "tasks" / "m3_scenes" / "answers.0.jsonl"
    while process.poll() is None and not record.exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    m3_eval(*arguments)
    for file in (
        "run.json",
        "tasks/m3_scenes/samples.jsonl",
        "tasks/m3_scenes/task.json",
        "tasks/m3_scenes/signals.safetensors",
        "tasks/m3_easy_vqa/samples.jsonl",
    ):
        assert (output / file).read_bytes() == (run / file).read_bytes(), file


# A process of m3-eval that comes to its second batch, and waits there.
WAITS = """
import sys, time
import m3_commands
from m3_evaluation import record
added = []
def add(file, batch):
    added.append(batch)
    if len(added) == 2:
        print("at a batch", file=sys.stderr, flush=True)
        time.sleep(60)
    add_line(file, batch)
add_line, record.add_line = record.add_line, add
sys.exit(m3_commands.evaluate())
"""


@pytest.mark.parametrize(
    ("number", "launched"),
    [
        (signal.SIGINT, []),
        (signal.SIGTERM, ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]),
    ],
)
def test_stopped_it_says_how_it_goes_on(number, launched, tasks, run, tmp_path, monkeypatch):
    if launched:
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    (tmp_path / "waits.py").write_text(WAITS)
    asked = ["--tasks", "m3_scenes", "--include_path", tasks, "--limit", LIMIT, "--output", tmp_path / "run"]
    command = [sys.executable, *launched, tmp_path / "waits.py", TINY, *asked, "--batch_size", 4]
    process = start(command, start_new_session=True)
    until(process, "at a batch")
    os.killpg(process.pid, number)  # as a terminal or a scheduler does; a launcher hands it on, too
    _, error = process.communicate(timeout=120)
    assert error.count("m3-eval: stopped; the same command goes on") == 1
    if not launched:
        assert process.returncode == 128 + number
        assert error.strip().splitlines()[-1] == "m3-eval: stopped; the same command goes on"
    place = Path("tasks", "m3_scenes")
    with (tmp_path / "run" / place / "answers.5.jsonl").open("wb") as other:
        other.write(b'{"0/0": {"results": [{"te')  # of another process, when there were more
    m3_eval(*asked, "--batch_size", 4)
    assert {file.name for file in (tmp_path / "run" / place).iterdir()} == {"samples.jsonl", "task.json"}
    for name in ("samples.jsonl", "task.json"):
        assert (tmp_path / "run" / place / name).read_bytes() == (run / place / name).read_bytes()


def test_what_a_task_catches_is_not_taken_for_done(tasks, run, tmp_path, monkeypatch):
    """Code of tasks is anyone's: it may score an answer as wrong, or ask without its picture, where it was interrupted."""
    from m3_evaluation import benchmark_tasks

    chat = benchmark_tasks.AllScales.chat

    def catches(self, request):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt:
            return [{"role": "user", "content": [{"type": "text", "text": "What?"}]}]
        return chat(self, request)

    asked = ["--tasks", "m3_scenes", "--include_path", tasks, "--limit", LIMIT, "--signals", "--output", tmp_path]
    with monkeypatch.context() as patched, pytest.raises(SystemExit) as end:
        patched.setattr(benchmark_tasks.AllScales, "chat", catches)
        m3_eval(*asked)
    assert end.value.code == 143
    m3_eval(*asked)
    for name in ("samples.jsonl", "task.json", "signals.safetensors"):
        file = Path("tasks", "m3_scenes", name)
        assert (tmp_path / file).read_bytes() == (run / file).read_bytes()


@pytest.mark.parametrize("limit", [0.11, 1e-9])
def test_a_limit_means_the_same_with_tasks_and_with_data(limit, tasks, tmp_path):
    import datasets

    lines = len(datasets.Dataset.from_parquet(str(tasks / "m3_scenes.parquet"), cache_dir=str(tmp_path / "cache")))
    (tmp_path / "data.jsonl").write_text((json.dumps({"question": "What?", "answer": "this"}) + "\n") * lines)
    common = ["--limit", limit, "--scales", 1, "--output"]
    m3_eval("--tasks", "m3_scenes", "--include_path", tasks, *common, tmp_path / "tasks")
    m3_eval("--data", tmp_path / "data.jsonl", *common, tmp_path / "data")
    found = read_task(tmp_path / "tasks", "m3_scenes").samples, read_task(tmp_path / "data", "data").samples
    assert found[0] == found[1] >= 1


def picture(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 60, 3), dtype=np.uint8))


MULTIPLE = {"A": "red", "B": "blue", "C": "green", "D": "gray"}
MMBENCH = {"hint": "nan", "category": "color", "L2-category": "looks", "source": "made", "split": "dev", **MULTIPLE}
# lmms-eval's task file, its split, a record without its picture, and what all metrics are that score single samples.
SCHEMAS = {
    "textvqa/textvqa_val": (
        {"question_id": 1, "question": "what color is it?", "answers": ["red"] * 10, "ocr_tokens": ["A"]},
        {"exact_match"},
    ),
    "pope/pope": (
        {"question_id": "1", "question": "Is there a dog?", "answer": "no", "category": "random"},
        {"pope_accuracy"},
    ),
    "mmbench/mmbench_en_dev_static": (
        {"index": 1, "question": "Which color?", "answer": "A", **MMBENCH},
        {"gpt_eval_score"},
    ),
    "chartqa/chartqa": ({"type": "human_test", "question": "How many?", "answer": "4"}, {"relaxed_overall"}),
    "docvqa/docvqa_val": ({"questionId": "1", "question": "What is it?", "answers": ["a", "b"]}, {"anls"}),
    "scienceqa/scienceqa_img": (
        {"question": "Which is red?", "choices": ["this", "that"], "answer": 0, "hint": "", "task": "closed choice"},
        {"exact_match"},
    ),
    "mmmu/mmmu_val": (
        {
            "id": "validation_Art_1",
            "question": "What is <image 1> and <image 2>?",
            "options": "['red', 'blue']",
            "question_type": "multiple-choice",
            "answer": "A",
            "subfield": "Art",
        },
        {"mmmu_acc"},
    ),
    "ai2d/ai2d": ({"question": "Which?", "options": ["a", "b", "c", "d"], "answer": "1"}, {"exact_match"}),
    "vizwiz_vqa/vizwiz_vqa_val": (
        {"question_id": "1", "question": "what is it?", "answers": ["red"] * 10, "category": "other"},
        {"exact_match"},
    ),
    "seedbench/seedbench": (
        {
            "question_id": "1",
            "question": "Which?",
            **{f"choice_{letter}": letter for letter in "abcd"},
            "answer": "A",
            "data_type": "image",
        },
        {"seed_all"},
    ),
    "gqa/gqa": ({"id": "1", "imageId": "7", "question": "Is it red?", "answer": "yes"}, {"exact_match"}),
}


def local(folder, schema, record, lines=""):
    """A task file that includes lmms-eval's own and reads three records from a parquet here; the name of the task."""
    import datasets
    import lmms_eval.tasks
    import yaml

    source = Path(lmms_eval.tasks.__file__).parent / f"{schema}.yaml"
    name = f"local_{Path(schema).name}"
    images = {"image": picture(0)}
    if schema.startswith("mmmu"):
        images = {f"image_{number}": picture(number) for number in range(1, 8)}
    elif schema.startswith("seed"):
        images = {"image": [picture(0), picture(1)]}
    elif schema.startswith("gqa"):
        images = {}
    records = [{**record, **images} for _ in range(3)]
    file = folder / f"{name}.parquet"
    datasets.Dataset.from_list(records).to_parquet(str(file))

    class Loader(yaml.SafeLoader):
        """Reads past the functions that a task file names."""

    Loader.add_constructor("!function", lambda loader, node: node.value)
    config = yaml.load(source.read_text(), Loader)
    split = config.get("test_split") or config["validation_split"]
    text = f"include: {source}\ntask: {name}\ndataset_path: parquet\ndataset_name: null\ntag: []\n"
    (folder / f"{name}.yaml").write_text(f"{text}dataset_kwargs:\n  data_files:\n    {split}: {file}\n{lines}")
    return name


def test_its_own_tasks_run_unchanged(tmp_path, monkeypatch):
    import datasets

    load = datasets.load_dataset
    pictures = [{"id": "7", "image": picture(7)}]

    def without_the_hub(path, *arguments, **options):
        return pictures if path == "lmms-lab-encoder/GQA" else load(path, *arguments, **options)

    monkeypatch.setattr(datasets, "load_dataset", without_the_hub)
    names = {local(tmp_path, schema, record): metrics for schema, (record, metrics) in SCHEMAS.items()}
    output = tmp_path / "run"
    scales = ["--scales", "1,9", "--output", output]
    m3_eval("--tasks", ",".join(names), "--include_path", tmp_path, *scales)
    assert read_run(output).tasks == list(names)
    for name, metrics in names.items():
        task, samples = read_task(output, name), list(read_samples(output, name))
        assert metrics <= task.overall.keys() and task.metric in task.overall, name
        assert [sample.id for sample in samples] == ["0", "1", "2"]
        for sample in samples:
            assert len(sample.answers) == 2 and sample.question and sample.target
            assert all(0 <= score <= 1 for score in sample.scores[task.metric])
            assert sample.visual_tokens[1] == 9 * max(1, sample.visual_tokens[0])


def test_likelihood_tasks(tmp_path):
    """seedbench's own likelihood task, which lmms-eval asks through the simple interface."""
    record, _ = SCHEMAS["seedbench/seedbench"]
    name = local(tmp_path, "seedbench/seedbench_ppl", record)
    m3_eval("--tasks", name, "--include_path", tmp_path, "--scales", "1,9", "--output", tmp_path / "run")
    samples = list(read_samples(tmp_path / "run", name))
    assert len(samples) == 3 and {answer for sample in samples for answer in sample.answers} <= {*"ABCD"}
    logged = plugin(tmp_path, name, num_visual_tokens=9, force_simple=True)[name]
    best = [
        chr(ord("A") + int(np.argmax([float(choice[0]) for choice in sample["filtered_resps"]]))) for sample in logged
    ]
    assert best == [sample.answers[1] for sample in samples]


def fails(capsys, *arguments):
    from m3_evaluation.eval_command import app

    with pytest.raises(SystemExit) as end:
        app([str(TINY), *map(str, arguments)])
    assert end.value.code == 1
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("m3-eval:")]
    return line


def test_what_cannot_be_run_is_told_before_anything_runs(tmp_path, capsys, monkeypatch):
    for key in ("OPENAI_API_KEY", "AZURE_API_KEY"):
        monkeypatch.delenv(key, raising=False)
    output = tmp_path / "run"
    assert "knows no such task. Did you mean" in fails(capsys, "--tasks", "textvqa_vall", "--output", output)
    judged = local(tmp_path, "mmbench/mmbench_en_dev", {"index": 1, "question": "Which?", "answer": "A", **MMBENCH})
    told = fails(capsys, "--tasks", judged, "--include_path", tmp_path, "--output", output)
    assert "graded by a model behind an API" in told
    assert not output.exists()


def test_wrong_arguments_of_the_model(tasks):
    with pytest.raises(ValueError, match="100 is not a number of visual tokens"):
        plugin(tasks, "m3_scenes", num_visual_tokens=100)
    with pytest.raises(ValueError, match="tokens: no argument of the model m3"):
        plugin(tasks, "m3_scenes", tokens=9)
    with pytest.raises(ValueError, match="give HEIGHTxWIDTH"):
        plugin(tasks, "m3_scenes", image_grid_pinpoints="672")


def test_commands_say_what_they_run_on(tmp_path):
    command = [sys.executable, "-m", "m3_evaluation.own_tasks", str(tmp_path), "--pictures", "1"]
    subprocess.run(command, check=True, capture_output=True)
    assert {file.name for file in tmp_path.iterdir()} == {
        "m3_easy_vqa.parquet",
        "m3_easy_vqa.yaml",
        "m3_scenes.parquet",
        "m3_scenes.yaml",
        "m3_task_functions.py",
    }


def test_what_the_page_shows_runs(tmp_path, monkeypatch, converted):
    """The commands of docs/evaluation.md that need lmms-eval; test_docs.py runs the others."""
    page = (Path(__file__).parent.parent / "docs" / "evaluation.md").read_text(encoding="utf-8")
    commands = [command for block in re.findall(r"```sh\n(.*?)```", page, re.DOTALL) for command in block.splitlines()]
    assert len(commands) >= 3
    (tmp_path / "m3-demo").symlink_to(converted["llava15-m3"])
    environment = {**os.environ, "PATH": commands_on_path(), "HF_HOME": str(tmp_path / "home")}
    for command in commands:
        result = subprocess.run(shlex.split(command), cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, f"{command}\n{result.stderr}"
