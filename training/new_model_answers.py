"""What the model of `python -m m3_training.new_model` answers: about scenes it never saw, and about the world."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from m3_conversion.json_files import read_json
from modeling_m3 import M3LlavaForConditionalGeneration, M3LlavaProcessor

from .new_model_lessons import facts, held_out, questions_about


SCENES = {9: 100, 1: 60, 36: 40, 144: 12, 576: 8}  # by scale; fine ones take long
GENERAL_QUESTIONS = (
    "What is the capital of France?",
    "What is the capital of Germany?",
    "Who wrote Romeo and Juliet?",
    "What color is the sky on a clear day?",
    "What is two plus three?",
    "Name an animal that can fly.",
)
EXAMPLES, EXAMPLE_SCALE = 10, 9
ROWS_AT_ONCE = 20
_NEW_TOKENS = 24


def measure(folder: Path, created: Path, scenes: dict[int, int] = SCENES) -> dict[str, Any]:
    """Counts of right answers by scale and by what was asked for, ten answers, and what is said of the world before and after.

    An answer counts where greedy generation gives the right sentence to the letter and ends.

    Args:
        folder: of the trained checkpoint.
        created: of the checkpoint before training.
        scenes: how many to ask about at each scale.
    """
    model, processor = _load(folder)
    counts: dict[str, dict[str, Any]] = {}
    examples = []
    for scale, number in scenes.items():
        made = [held_out(index) for index in range(number)]
        right = {}
        for turn, kind in enumerate(("shape", "color", "named")):
            asked = [questions_about(*facts(each))[kind] for each in made]
            pictures = [each.picture for each in made]
            answers = ask(model, processor, [question for question, _ in asked], pictures, scale)
            right[kind] = sum(answer == expected for answer, (_, expected) in zip(answers, asked))
            if scale == EXAMPLE_SCALE:  # each scene with one of the questions
                rows = [
                    {"scene": index, "question": question, "answer": answer, "expected": expected}
                    for index, ((question, expected), answer) in enumerate(zip(asked, answers))
                ]
                examples += rows[turn:EXAMPLES:3]
        counts[str(scale)] = {"scenes": number, "right": right}
        print(f"{scale} visual tokens: {right} of {number} scenes each", flush=True)
    after = ask(model, processor, GENERAL_QUESTIONS)
    before = ask(*_load(created), GENERAL_QUESTIONS)
    world = [dict(zip(("question", "before", "after"), row)) for row in zip(GENERAL_QUESTIONS, before, after)]
    counts = {str(scale): counts[str(scale)] for scale in sorted(scenes)}
    return {"scenes": counts, "examples": sorted(examples, key=lambda row: row["scene"]), "world": world}


@torch.no_grad()
def ask(
    model: M3LlavaForConditionalGeneration,
    processor: M3LlavaProcessor,
    questions: Sequence[str],
    pictures: Sequence[Any] = (),
    scale: int | None = None,
) -> list[str]:
    """The greedy answer to each question, about its picture at `scale` visual tokens if there are pictures."""
    answers = []
    at_once = ROWS_AT_ONCE if (scale or 0) < 100 else 4
    for first in range(0, len(questions), at_once):
        some, seen = questions[first : first + at_once], list(pictures[first : first + at_once])
        chats = [
            [{"role": "user", "content": [*([{"type": "image"}] if seen else []), {"type": "text", "text": question}]}]
            for question in some
        ]
        prompts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
        given = {"images": [[picture] for picture in seen], "num_visual_tokens": scale} if seen else {}
        inputs = processor(text=prompts, **given, padding=True, padding_side="left", return_tensors="pt").to(
            model.device
        )
        written = model.generate(**inputs, max_new_tokens=_NEW_TOKENS, do_sample=False)
        ends = written[:, inputs["input_ids"].shape[1] :]
        answers += [text.strip() for text in processor.batch_decode(ends, skip_special_tokens=True)]
    return answers


def plot_losses(folder: Path, stages: Sequence[str], file: Path) -> None:
    """Draws the losses of training on words and of the stages in a run's folder, one beside the other.

    Args:
        folder: of the run.
        stages: names of their folders in it.
        file: a PNG to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 1 + len(stages), figsize=(3 * (1 + len(stages)), 2.6), dpi=80)
    words = read_json(folder / "words" / "final" / "losses.json")
    axes[0].plot(range(1, len(words) + 1), words, linewidth=1)
    axes[0].set(title="words", xlabel="step", ylabel="loss", yscale="log")
    for axis, name in zip(axes[1:], stages):
        state = read_json(folder / name / "trainer_state.json")
        scales = sorted({key for entry in state["log_history"] for key in entry if key.startswith("loss_at_")}, key=len)
        for key in scales:
            points = [(entry["step"], entry[key]) for entry in state["log_history"] if key in entry]
            axis.plot(*zip(*points), marker=".", markersize=3, linewidth=1, label=key.removeprefix("loss_at_"))
        axis.set(title=name, xlabel="step", yscale="log")
        axis.legend(title="visual tokens", fontsize=6, title_fontsize=6)
    figure.tight_layout()
    figure.savefig(file)
    pyplot.close(figure)


def _load(folder: Path) -> tuple[M3LlavaForConditionalGeneration, M3LlavaProcessor]:
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(folder, backend="pil")
