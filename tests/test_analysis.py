"""m3-analyze: every figure of a report by hand, several runs, what a card gets, and what is refused."""

import json
import shutil

import pytest
from huggingface_hub import ModelCard
from PIL import Image

import modeling_m3
from m3_evaluation.analyze_command import app
from m3_evaluation.checkpoints import fingerprint
from m3_evaluation.paper_tables import printed
from m3_evaluation.runs import Run, Sample, Task, write_run, write_task


TINY = modeling_m3.default_checkpoint()
SCALES = [1, 9, 36]
# (answers, scores): right everywhere, only coarse, only fine, never; graded.
OUTCOMES = [
    (["a", "a", "a"], [1, 1, 1]),
    (["b", "c", "d"], [1, 0, 0]),
    (["<b>", "x|y", "e"], [0, 0, 1]),
    (["g", "g", "g"], [0, 0, 0.25]),
]


def make_run(folder, ids=("1", "2", "3", "4"), task="my", metric="anls", finger=None, **settings):
    samples = []
    (folder / "pictures").mkdir(parents=True)
    Image.new("RGB", (20, 10), "red").save(folder / "pictures" / "p.jpg")
    for name, (answers, scores) in zip(ids, OUTCOMES):
        samples.append(
            Sample(
                id=name,
                question=f"What is <script>alert({name})</script> | it?",
                target=["a", "z"],
                answers=answers,
                scores={metric: list(map(float, scores)), "other": [0.0, 1.0, 1.0]},
                visual_tokens=SCALES,
                text_tokens=10,
                answer_tokens=[1, 2, 3],
                pictures=["pictures/p.jpg"],
                subset="left" if name in ("1", "2") else "right",
                kind=None,
            )
        )
    config = json.loads((TINY / "config.json").read_text())
    run = Run("m3-tiny", finger or fingerprint(TINY), config, SCALES, [task], settings, {})
    write_run(folder, run)
    overall = {metric: [0.5, 0.25, 0.5625], "other": None}
    write_task(folder, Task(task, len(samples), metric, overall, dict.fromkeys(overall, True)), samples)
    return folder


def analyze(*arguments):
    app(list(map(str, arguments)), standalone_mode=False)


def test_every_figure_by_hand(tmp_path):
    analyze(make_run(tmp_path / "run"), "--output", tmp_path / "report")
    entry = json.loads((tmp_path / "report" / "results.json").read_text())["tasks"]["my"][str(tmp_path / "run")]
    assert [scale["score"] for scale in entry["scales"]] == [0.5, 0.25, 0.5625]
    assert [scale["difference_to_finest"] for scale in entry["scales"]] == [-0.0625, -0.3125, 0]
    assert [scale["answer_tokens"] for scale in entry["scales"]] == [1, 2, 3]
    oracle = entry["oracle"]
    assert (oracle["fewest"]["performance"], oracle["fewest"]["tokens"]) == (0.75, (1 + 1 + 36 + 1) / 4)
    assert (oracle["finest"]["performance"], oracle["finest"]["tokens"]) == (0.8125, (1 + 1 + 36 + 36) / 4)
    assert oracle["fewest"]["gap"] == {"1": 0.25, "9": 0.5, "36": 0.1875}
    share = (9.75 - 1) / 35
    assert entry["mix"]["corners"] == [[1, 0.5], [36, 0.5625]]
    assert entry["mix"]["at_oracle"]["performance"] == pytest.approx(0.5 + share * 0.0625)
    shares = entry["complexity"]
    assert shares["all"] == {"1": 0.5, "9": 0, "36": 0.25, "never": 0.25}
    assert shares["subset"]["left"] == {
        "samples": 2,
        "scores": [1, 0.5, 0.5],
        "shares": {"1": 1, "9": 0, "36": 0, "never": 0},
    }
    assert shares["subset"]["right"]["shares"] == {"1": 0, "9": 0, "36": 0.5, "never": 0.5}
    assert entry["coarse_right_fine_wrong"] == 1
    assert entry["agreement"] == [[1, 0.5, 0.5], [0.5, 1, 0.5], [0.5, 0.5, 1]]
    assert [len(samples) for samples in entry["gallery"].values()] == [2, 0, 1, 1]
    lines = (tmp_path / "report" / "report.md").read_text().splitlines()
    assert "| all | 4 | 50.0 | 0.0 | 25.0 | 25.0 |" in lines
    assert any(line.startswith("| 36 | 56.2 (") and "+0.0 (+0.0 to +0.0)" in line for line in lines)
    assert any("75.0 (" in line and "9.75 (" in line and "+25.0 | +50.0 | +18.8 |" in line for line in lines)
    assert len(list((tmp_path / "report").glob("*.png"))) == 3


def test_page_needs_no_file_and_runs_no_text_of_a_model(tmp_path):
    analyze(make_run(tmp_path / "run"), "--output", tmp_path / "report")
    page = (tmp_path / "report" / "report.html").read_text()
    assert "<script" not in page and "&lt;b&gt;" in page
    assert page.count('src="data:image/') == 3 + 4 and 'src="http' not in page


def test_threshold_and_metric(tmp_path):
    run = make_run(tmp_path / "run")
    analyze(run, "--output", tmp_path / "low", "--threshold", 0.2)
    analyze(run, "--output", tmp_path / "other", "--metric", "other")
    low, other = (
        json.loads((tmp_path / name / "results.json").read_text())["tasks"]["my"][str(run)] for name in ("low", "other")
    )
    assert low["complexity"]["all"]["never"] == 0
    assert [scale["score"] for scale in other["scales"]] == [0, 1, 1]


def test_runs_side_by_side(tmp_path):
    runs = [make_run(tmp_path / name, dtype=name) for name in ("float32", "nf4")]
    analyze(*runs, "--output", tmp_path / "report")
    found = json.loads((tmp_path / "report" / "results.json").read_text())["tasks"]["my"]
    assert list(found) == list(map(str, runs))
    assert (tmp_path / "report" / "report.md").read_text().count("| all | 4 |") == 2


def fails(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        app(list(map(str, arguments)))
    assert end.value.code == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("m3-analyze: ")
    return line


def test_bad_input(tmp_path, capsys):
    run, other = make_run(tmp_path / "run"), make_run(tmp_path / "other", ids=("1", "2", "5", "6"))
    report = tmp_path / "report"
    assert "is no run of m3-eval" in fails(capsys, tmp_path, "--output", report)
    assert "'f1': my has anls, other" in fails(capsys, run, "--output", report, "--metric", "f1")
    assert "are over different samples of my: see sample 5" in fails(capsys, run, other, "--output", report)
    (tmp_path / "file").touch()
    assert "is a file" in fails(capsys, run, "--output", tmp_path / "file")
    (other / "tasks" / "my" / "task.json").unlink()
    assert "is not complete: my not done" in fails(capsys, other, "--output", report)
    lines = (run / "tasks" / "my" / "samples.jsonl").read_text().splitlines()
    (run / "tasks" / "my" / "samples.jsonl").write_text(f"{lines[0]}\n{{\n")
    assert "samples.jsonl, line 2 is no sample" in fails(capsys, run, "--output", report)
    assert not report.exists()


def test_card_gets_results_beside_what_is_there(tmp_path, capsys):
    folder = tmp_path / "checkpoint"
    shutil.copytree(TINY, folder)
    before = ModelCard.load(folder / "README.md")
    run = make_run(tmp_path / "run")
    for _ in range(2):  # the second time replaces the same
        analyze(run, "--card", folder)
    card = ModelCard.load(folder / "README.md")
    assert card.text == before.text and card.data.tags == before.data.tags
    old = before.data.eval_results or []
    new = [result for result in card.data.eval_results if result.dataset_type == "my"]
    assert len(card.data.eval_results) == len(old) + 3
    assert [(result.metric_args["num_visual_tokens"], result.metric_value) for result in new] == [
        (1, 50),
        (9, 25),
        (36, 56.25),
    ]
    assert fingerprint(folder) == fingerprint(TINY)
    content = (folder / "README.md").read_bytes()
    foreign = make_run(tmp_path / "foreign", finger="0" * 64)
    assert "is a run of another checkpoint" in fails(capsys, foreign, "--card", folder)
    assert (folder / "README.md").read_bytes() == content


def test_the_papers_numbers_stand_beside_its_own_checkpoints_only():
    config = {"text_config": {"hidden_size": 4096, "num_hidden_layers": 32}, "trained_scales": [1, 9, 36, 144, 576]}
    assert printed(config, "pope") == {
        "table": 1,
        "scores": {"1": 78.4, "9": 83.4, "36": 85.5, "144": 87.0, "576": 87.4},
    }
    tiled = {**config, "image_grid_pinpoints": [[672, 672]]}
    assert printed(tiled, "textvqa_val")["oracle"] == {"performance": 70.51, "tokens": 31.39}
    assert printed(config, "textvqa_val") is None
    assert printed({**config, "trained_scales": [576]}, "pope") is None
    assert printed(json.loads((TINY / "config.json").read_text()), "pope") is None
