"""Videos: which frames are taken and what they cost, against independent formulas; what is read from files; bad input."""

import http.server
import io
import sys
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_processing import PINPOINTS, PROCESSORS, count, tiny_processor
from video_files import CLIP, decoded, moving_frames, turned, write_sound, write_video

from modeling_m3.video_processing_m3 import COLLAGE_SENTENCE, collage, share_visual_tokens
from modeling_m3.videos import frame_indices, sample_video


SCALES = (1, 9, 36, 144, 576)
MANY = settings(max_examples=500, deadline=None)


def frames_of_the_original(total, wanted):
    """IG-VLM's loop over all frames, as a rule: it keeps a frame whenever as many have passed as lie between two."""
    between, kept = total // wanted, []
    for number in range(total):
        if number == len(kept) * between:
            kept.append(number)
        if len(kept) == wanted:
            break
    return kept


@MANY
@given(total=st.integers(1, 5000), wanted=st.integers(1, 600))
def test_frames_are_those_of_the_original_and_of_what_was_chosen_for_short_videos(total, wanted):
    if wanted <= total:
        assert frame_indices(total, wanted) == frames_of_the_original(total, wanted)
    else:
        assert frame_indices(total, wanted) == list(range(total))
        repeated = frame_indices(total, wanted, "repeat")
        assert repeated == sorted(repeated) and len(repeated) == wanted and {*repeated} == {*range(total)}
        with pytest.raises(ValueError, match=f"num_frames={wanted}: there are only {total} frames"):
            frame_indices(total, wanted, "error")


@MANY
@given(
    total=st.integers(1, 60),
    rate=st.sampled_from([1, 5, 12, 24, 25, 29.97, 30]),
    asked=st.sampled_from([0.5, 1, 2, 3, 7.5, 30, 60]),
    part=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_a_rate_takes_what_is_shown_at_each_moment(total, rate, asked, part):
    start, end = sorted(round(share * total / rate, 2) for share in part)
    start = min(start, round((total - 0.5) / rate, 4))
    end = max(start, end)
    frames = [Image.new("L", (1, 1))] * total
    taken = sample_video(frames, fps=asked, video_start=start, video_end=end, video_fps=rate)
    moments, index = [], 0
    while start + index / asked < min(end, total / rate) - 1e-6 or index == 0:
        moments.append(start + index / asked)
        index += 1
    shown = [max(number for number in range(total) if number / rate <= moment + 1e-6) for moment in moments]
    assert taken.indices == shown
    assert taken.timestamps == [number / rate for number in shown]


@MANY
@given(n=st.integers(1, 300), total=st.integers(1, 4000))
def test_a_total_is_shared_as_far_as_it_goes(n, total):
    affordable = [scale for scale in SCALES if n * scale <= total]
    if not affordable:
        with pytest.raises(ValueError, match=f"total_visual_tokens={total} is less than {n} frames cost"):
            share_visual_tokens(total, n, SCALES)
        return
    expected = [max(affordable)] * n
    for index in range(n):
        raised = [scale for scale in SCALES if scale > expected[index]][:1]
        if raised and sum(expected) - expected[index] + raised[0] <= total:
            expected[index] = raised[0]
    assert share_visual_tokens(total, n, SCALES) == expected and sum(expected) <= total


@MANY
@given(n=st.integers(1, 30), width=st.integers(1, 9), height=st.integers(1, 9), seed=st.integers(0, 999))
def test_a_collage_is_the_authors_to_the_pixel(n, width, height, seed):
    frames = np.random.default_rng(seed).integers(0, 256, (n, height, width, 3), dtype=np.uint8)
    row = round(n**0.5)
    missing = -n % row
    padded = np.concatenate([frames, np.full((missing, height, width, 3), 255, np.uint8)])
    rows = [np.hstack(padded[start : start + row]) for start in range(0, len(padded), row)]
    made = collage([Image.fromarray(frame) for frame in frames])
    assert np.array_equal(np.asarray(made), np.vstack(rows))


def test_larger_frames_are_shrunk_between_their_nearest_pixels():
    large = np.random.default_rng(0).integers(0, 256, (11, 17, 3), dtype=np.uint8)
    small = np.zeros((5, 6, 3), np.uint8)
    made = np.asarray(collage([Image.fromarray(large), Image.fromarray(small)]))
    assert made.shape == (10, 6, 3)  # one a row: round(sqrt(2))

    def at(place, length):
        place = min(max(place, 0), length - 1)
        low = int(place)
        return low, min(low + 1, length - 1), place - low

    for y in range(5):
        for x in range(6):
            top, bottom, down = at((y + 0.5) * 11 / 5 - 0.5, 11)
            left, right, across = at((x + 0.5) * 17 / 6 - 0.5, 17)
            upper = large[top, left] * (1 - across) + large[top, right] * across
            lower = large[bottom, left] * (1 - across) + large[bottom, right] * across
            assert np.abs(made[y, x] - (upper * (1 - down) + lower * down)).max() <= 0.51


@MANY
@given(
    kind=st.sampled_from(sorted(PROCESSORS)),
    frames=st.integers(1, 12),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    wanted=st.integers(1, 12),
    layout=st.sampled_from(["frames", "collage"]),
    scale=st.sampled_from([1, 9, 36, 144]),
    total=st.one_of(st.none(), st.integers(12, 2000)),
)
def test_placeholders_are_what_formulas_say(kind, frames, size, wanted, layout, scale, total):
    processor = PROCESSORS[kind]
    clip = np.zeros((frames, *size, 3), np.uint8)
    options = {"num_frames": wanted, "video_layout": layout, "num_visual_tokens": scale}
    if total is not None:
        options = {"num_frames": wanted, "video_layout": layout, "total_visual_tokens": total}
    taken = min(frames, wanted)
    if layout == "collage":
        row = round(taken**0.5)
        picture = Image.new("RGB", (row * size[1], -(-taken // row) * size[0]))
        costs = {s: count(processor(images=picture, text="<image>", num_visual_tokens=s, return_tensors="pt"), processor)[0]
                 for s in processor.visual_token_scales}  # fmt: skip
        if total is not None and min(costs.values()) > total:
            return
        expected = costs[scale] if total is None else max(cost for cost in costs.values() if cost <= total)
    else:
        expected = taken * scale
        if total is not None:
            expected = sum(share_visual_tokens(total, taken, processor.visual_token_scales))
    inputs = processor(videos=clip, text="look <video>", return_tensors="pt", **options)
    assert count(inputs, processor) == [expected]
    assert len(inputs["num_visual_tokens"]) == len(inputs["pixel_values"]) == (1 if layout == "collage" else taken)


FORMATS = {
    "h264.mp4": {"codec": "libx264"},
    "h264.mov": {"codec": "libx264"},
    "h264.mkv": {"codec": "libx264"},
    "vp9.webm": {"codec": "libvpx-vp9"},
    "av1.mp4": {"codec": "libsvtav1"},
    "mpeg4.avi": {"codec": "mpeg4"},
    "moving.gif": {"codec": "gif", "pixels": "rgb8"},
}


@pytest.mark.parametrize("name", FORMATS)
def test_any_frames_of_any_file_are_those_that_pyav_decodes(name, tmp_path):
    path = write_video(tmp_path / name, moving_frames(70), **FORMATS[name])
    reference = decoded(path)
    assert len(reference) == 70
    for options in ({}, {"num_frames": "all"}, {"num_frames": 3, "video_start": 1.2}, {"fps": 2}, {"num_frames": 90},
                    {"num_frames": 90, "when_short": "repeat"}, {"video_start": 2.0, "video_end": 2.0}):  # fmt: skip
        taken = sample_video(path, **options)
        for _ in range(2):  # as often as asked
            pictures = [np.asarray(frame) for frame in taken]
            assert len(pictures) == len(taken)
            assert all(np.array_equal(reference[index], frame) for index, frame in zip(taken.indices, pictures))
    assert sample_video(path).indices == [0, 11, 22, 33, 44, 55]
    assert sample_video(path, fps=1).timestamps == pytest.approx([0, 1, 2])


def test_a_file_may_be_bytes_open_or_a_path(tmp_path):
    path = write_video(tmp_path / "a.mp4", moving_frames(20))
    expected = [np.asarray(frame) for frame in sample_video(str(path))]
    with open(path, "rb") as file:
        for video in (path, path.read_bytes(), io.BytesIO(path.read_bytes()), file):
            taken = sample_video(video)
            assert all(np.array_equal(a, np.asarray(b)) for a, b in zip(expected, taken, strict=True))


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4"])
def test_uneven_frames_are_taken_by_when_they_are_shown(name, tmp_path):
    times = [0, 10, 500, 520, 1000, 3000, 3100, 3200]
    path = write_video(tmp_path / name, moving_frames(8), times=times)
    taken = sample_video(path, fps=2)
    assert taken.indices[:7] == [0, 2, 4, 4, 4, 4, 5]
    assert taken.timestamps[:7] == pytest.approx([0, 0.5, 1, 1, 1, 1, 3])
    assert sample_video(path, video_start=0.6, video_end=3.0, num_frames="all").indices == [3, 4, 5]


def test_a_file_that_says_how_to_turn_it_is_turned(tmp_path):
    path = write_video(tmp_path / "a.mp4", moving_frames(6))
    upright = [np.asarray(frame) for frame in sample_video(turned(path, tmp_path / "b.mp4"))]
    for frame, shown in zip(decoded(path), upright, strict=True):
        assert shown.shape == (64, 48, 3)
        assert np.array_equal(shown, np.flip(frame.transpose(1, 0, 2), axis=1))  # the left column is the top row


@pytest.fixture
def server(tmp_path):
    write_video(tmp_path / "a.mp4", moving_frames(12))

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=tmp_path)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_an_address_is_read_as_the_file_there(server, tmp_path):
    expected = [np.asarray(frame) for frame in sample_video(tmp_path / "a.mp4")]
    taken = [np.asarray(frame) for frame in sample_video(f"{server}/a.mp4")]
    assert all(np.array_equal(a, b) for a, b in zip(expected, taken, strict=True))
    with pytest.raises(ValueError, match=r"Cannot load http://.*/none.mp4: File not found"):
        sample_video(f"{server}/none.mp4")


CLIP_OF = {
    "list": lambda frames, path: [Image.fromarray(frame) for frame in frames],
    "list of arrays": lambda frames, path: list(frames),
    "array": lambda frames, path: frames,
    "tensor": lambda frames, path: torch.from_numpy(frames).permute(0, 3, 1, 2),
    "file": lambda frames, path: path,
}


@pytest.mark.parametrize("kind", ["one view", "spatial_unpad"])
def test_the_same_frames_in_any_form_are_the_same_inputs(kind, tmp_path):
    frames = moving_frames(14)
    path = write_video(tmp_path / "a.mov", frames, codec="png", pixels="rgb24")  # without loss
    processor = PROCESSORS[kind]
    made = [
        processor(text="look <video> .", videos=form(frames, path), num_visual_tokens=9, return_tensors="pt")
        for form in CLIP_OF.values()
    ]
    assert count(made[0], processor) == [6 * 9]
    for other in made[1:]:
        assert made[0].keys() == other.keys() and all(torch.equal(made[0][name], other[name]) for name in other)


def cut(path, share):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return path


WRONG = {
    "no video": (lambda d: __file__, {}, "is no video that can be read"),
    "a playlist": (lambda d: playlist(d), {}, "is no video that can be read"),
    "missing": (lambda d: d / "none.mp4", {}, "There is no video at"),
    "cut mp4": (lambda d: cut(write_video(d / "a.mp4", moving_frames(40)), 0.5), {}, "can be read|is cut off"),
    "cut mkv": (lambda d: cut(write_video(d / "a.mkv", moving_frames(90)), 0.5), {}, "is cut off: it has"),
    "sound": (lambda d: write_sound(d / "a.mp4"), {}, "has no moving pictures but sound"),
    "no frames": (lambda d: [], {}, "video"),
    "an empty array": (lambda d: np.zeros((0, 4, 4, 3), np.uint8), {}, "A video without frames"),
    "fractions": (lambda d: np.zeros((2, 4, 4, 3)), {}, "whole numbers from 0 to 255"),
    "a number": (lambda d: 3, {}, "no video"),
    "no answer": (lambda d: "http://127.0.0.1:9/a.mp4", {}, "Cannot load http://127.0.0.1:9/a.mp4"),
    "too many frames": (lambda d: CLIP, {"num_frames": 49, "when_short": "error"}, "there are only 48 frames"),
    "no frame": (lambda d: CLIP, {"num_frames": 0}, "num_frames=0 must be"),
    "both": (lambda d: CLIP, {"num_frames": 2, "fps": 1}, "give one of them"),
    "a rate of nothing": (lambda d: moving_frames(3), {"fps": 1}, "video_fps=..."),
    "all there are, and again": (lambda d: CLIP, {"fps": 1e9}, "at most 1048576 are taken"),
    "after the end": (lambda d: CLIP, {"video_start": 9}, "the video lasts 4.000 seconds"),
    "before the start": (lambda d: CLIP, {"video_start": 2, "video_end": 1}, "the video lasts 4.000 seconds"),
    "too few tokens": (lambda d: CLIP, {"total_visual_tokens": 5}, "Take at most 5 frames"),
    "a total of none": (lambda d: CLIP, {"total_visual_tokens": 0}, "total_visual_tokens=0 must be"),
    "two budgets": (lambda d: CLIP, {"num_visual_tokens": [1, 9]}, r"\[1, 9\].*1 images and videos.*\[6\] pictures"),
    "no number": (lambda d: CLIP, {"num_visual_tokens": 100}, r"100 is not a number.*\[1, 9, 36, 144\]"),
    "two ways": (lambda d: CLIP, {"num_visual_tokens": 9, "total_visual_tokens": 60}, "give one of them"),
    "no layout": (lambda d: CLIP, {"video_layout": "grid"}, "video_layout='grid' must be one of 'frames', 'collage'"),
    "no times": (lambda d: moving_frames(3), {"add_timestamps": True}, "video_fps=..."),
    "an unknown option": (lambda d: CLIP, {"videos_kwargs": {"frames": 3}}, "videos_kwargs has frames"),
}


def playlist(folder):
    path = folder / "a.m3u8"
    path.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{CLIP}\n#EXT-X-ENDLIST\n")
    return path


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_in_one_line(case, tmp_path):
    make, options, message = WRONG[case]
    with pytest.raises(ValueError, match=message) as raised:
        PROCESSORS["one view"](text="look <video>", videos=make(tmp_path), **options)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("text", "options"), [
    ("look", {"videos": CLIP}),
    ("<video> <video>", {"videos": CLIP}),
    (["<video>", "look"], {"videos": [[], [CLIP]]}),
    (["<video>", "<video>"], {"videos": [[CLIP]]}),
    ("<image> <video>", {"videos": CLIP}),
    ("<video>", {"videos": CLIP, "images": Image.new("RGB", (9, 9))}),
])  # fmt: skip
def test_marks_that_are_not_the_videos_are_refused(text, options):
    with pytest.raises(ValueError, match="marks <image> and <video>|lists of images or videos"):
        PROCESSORS["one view"](text=text, **options)


def test_the_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r'pip install av, or "\.\[video\]"'):
        PROCESSORS["one view"](text="<video>", videos=CLIP)
    assert count(PROCESSORS["one view"](text="<video>", videos=moving_frames(3), return_tensors="pt", num_visual_tokens=1),
                 PROCESSORS["one view"]) == [3]  # fmt: skip


@pytest.mark.parametrize("size", [(1, 1), (4320, 7680)])
def test_frames_of_one_pixel_and_of_8k(size):
    processor = tiny_processor()
    inputs = processor(
        text="<video>", videos=np.zeros((2, *size, 3), np.uint8), num_visual_tokens=1, return_tensors="pt"
    )
    assert inputs["pixel_values"].shape == (2, 3, 24, 24)


def test_the_sentence_of_a_collage_stands_where_the_text_begins(loaded):
    _, processor = loaded["llava15-m3"]
    question = "Question: what is it? \nASSISTANT:"
    inputs = processor(text=f"USER: <video>\n{question}", videos=CLIP, video_layout="collage", return_tensors="pt")
    picture = collage(list(sample_video(CLIP)))
    # The authors' prompt, in `IG-VLM/eval_llava_multiplechoice.py`
    by_hand = processor(text=f"USER: <image>\n{COLLAGE_SENTENCE} {question}", images=picture, return_tensors="pt")
    assert all(torch.equal(inputs[name], by_hand[name]) for name in by_hand) and inputs.keys() == by_hand.keys()


def test_timestamps_stand_before_frames(loaded):
    _, processor = loaded["llava15-m3"]
    inputs = processor(text="<video>\nLook.", videos=CLIP, num_frames=3, add_timestamps=True, num_visual_tokens=1)
    text = "0.0s: <image>\n1.3s: <image>\n2.7s: <image>\nLook."
    by_hand = processor(text=text, images=list(sample_video(CLIP, num_frames=3)), num_visual_tokens=1)
    assert inputs["input_ids"] == by_hand["input_ids"]


def test_frames_among_tiles_are_one_view():
    processor = tiny_processor("spatial_unpad", PINPOINTS)
    frames, picture = moving_frames(2), Image.new("RGB", (70, 30))
    alone = processor(text="<image>", images=picture, num_visual_tokens=9, return_tensors="pt")
    inputs = processor(text="<video> <image>", videos=frames, images=picture, num_visual_tokens=9, return_tensors="pt")
    assert count(inputs, processor) == [2 * 9 + count(alone, processor)[0]]
    tiles = alone["pixel_values"].shape[1]
    assert inputs["pixel_values"].shape[:2] == (3, tiles) and torch.equal(
        inputs["pixel_values"][2], alone["pixel_values"][0]
    )
    assert inputs["image_tile_grids"].tolist() == [[-1, -1], [-1, -1], alone["image_tile_grids"][0].tolist()]
    assert not inputs["pixel_values"][:2, 1:].any()


def test_one_video_may_stand_in_two_places():
    processor, frames = PROCESSORS["one view"], sample_video(moving_frames(9), num_frames=3)
    inputs = processor(text="<video> <video>", videos=[frames, frames], num_visual_tokens=1, return_tensors="pt")
    assert count(inputs, processor) == [6]
    assert torch.equal(inputs["pixel_values"][:3], inputs["pixel_values"][3:])
