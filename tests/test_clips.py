"""The generated clips of m3-tiny's video recipe: what is asked about them is true, and files show the same."""

import json
from itertools import groupby

import numpy as np
import pytest
from transformers import AutoModelForImageTextToText
from video_files import decoded

from m3_training.m3_tiny.clips import FRAMES, FRAMES_PER_SECOND, clip, write_clips
from m3_training.m3_tiny.video import train
from modeling_m3 import default_checkpoint
from modeling_m3.videos import sample_video


CLIPS = [clip(f"check {seed}", take=seed) for seed in range(40)]


def of_kind(kind):
    return [(made, question) for made in CLIPS for question in made.questions if question.kind == kind]


def test_answers_are_what_the_frames_show():
    assert {len(made.order) for made in CLIPS} == {FRAMES}
    for made, question in of_kind("blinks"):
        runs = [picture for picture, _ in groupby(made.order)]
        assert runs[0] == runs[-1] == 1 and runs.count(0) == int(question.answer)
    for made, question in of_kind("when"):
        assert made.order.index(1) // FRAMES_PER_SECOND == int(question.answer) and made.order[0] == 0
    for made, question in of_kind("first"):
        assert made.order == sorted(made.order) and {*made.order} == {0, 1, 2}
        assert question.answer in question.text
        # Only the first shape is in the picture of the middle: its colour is not in the one before.
        before, after = (np.asarray(picture, int) for picture in made.pictures[:2])
        assert (np.abs(before - after).sum(-1) > 60).mean() > 0.02
    assert all(of_kind(kind) for kind in ("blinks", "when", "first", "code", "shape", "color"))


def test_a_take_shows_the_same_pictures_at_other_times():
    one, other = clip("a", take=1), clip("a", take=2)
    assert all(np.array_equal(a, b) for a, b in zip(one.pictures, other.pictures, strict=True))
    assert one.order != other.order and clip("a", take=1).order == one.order
    assert clip("b").questions != one.questions


def test_files_show_what_the_clips_do(tmp_path):
    data = write_clips(tmp_path, 2)
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    for number in range(2):
        made = clip(f"test {number}", fonts=("cmss10",))
        file = tmp_path / f"clip-{number:04}.mp4"
        asked = [(line["question"], line["answer"]) for line in lines if line["video"] == file.name]
        assert asked == [(question.text, question.answer) for question in made.questions]
        frames = decoded(file)
        assert len(frames) == FRAMES and sample_video(file, fps=1).indices == list(range(0, FRAMES, FRAMES_PER_SECOND))
        for frame, picture in zip(frames, made.order):
            assert np.abs(frame.astype(int) - np.asarray(made.pictures[picture], int)).mean() < 4


@pytest.mark.slow
def test_the_recipe_goes_on_to_a_folder_like_any_other(tmp_path):
    final = train(tmp_path, steps=2)
    assert train(tmp_path, steps=2) == final  # which is not run again
    model = AutoModelForImageTextToText.from_pretrained(final, trust_remote_code=True)
    before = AutoModelForImageTextToText.from_pretrained(default_checkpoint(), trust_remote_code=True)
    same = {name: weight.equal(before.state_dict()[name]) for name, weight in model.state_dict().items()}
    assert all(same[name] for name in same if "vision_tower" in name or "projector" in name)
    assert not all(same.values())
