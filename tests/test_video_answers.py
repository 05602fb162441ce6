"""Videos and the model: answers from chats, batches and one encoding are those of single calls; long videos take little memory."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import picture, tiny_config
from PIL import Image
from test_ask import run
from test_generation import answer
from test_one_encoding import vision_calls  # noqa: F401 - a fixture
from test_processing import PINPOINTS, count, tiny_processor
from transformers import pipeline
from video_files import CLIP, moving_frames

from modeling_m3 import M3LlavaForConditionalGeneration
from modeling_m3.outputs_m3 import CACHE_NAME, M3LlavaEncodedImages
from modeling_m3.processing_m3 import MAKES_TEXT_PLAIN
from modeling_m3.videos import sample_video


QUESTION = {"type": "text", "text": "What is this?"}


def tiny(kind="flat", **overrides):
    """A small model with random weights, and a processor for it."""
    torch.manual_seed(0)
    facts = {} if kind == "flat" else {"image_grid_pinpoints": PINPOINTS, "patch_merge_type": kind}
    model = M3LlavaForConditionalGeneration(tiny_config(**facts, **overrides)).eval()
    model.generation_config.suppress_tokens = [98]
    return model, tiny_processor(kind, facts.get("image_grid_pinpoints"))


def chat(*content, role="user"):
    return [{"role": role, "content": [*content, QUESTION]}]


def prepared(processor, messages, **options):
    return processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=options,
    )


@pytest.mark.parametrize("key", ["video", "path", "url"])
def test_a_video_of_a_chat_is_its_frames_in_place_of_an_image(key, loaded):
    model, processor = loaded["llava15-m3"]
    frames = list(sample_video(CLIP))
    inputs = prepared(processor, chat({"type": "video", key: str(CLIP)}), num_visual_tokens=9)
    text = processor.apply_chat_template(chat({"type": "image"}), add_generation_prompt=True)
    by_hand = processor(
        text=text.replace("<image>", "<image>" * 6), images=frames, num_visual_tokens=9, return_tensors="pt"
    )
    assert inputs.keys() == by_hand.keys() and all(torch.equal(inputs[name], by_hand[name]) for name in inputs)
    rendered = processor.apply_chat_template(chat({"type": "video"}), add_generation_prompt=True)
    assert rendered == text.replace("<image>", "<video>")
    asked = processor(text=rendered, videos=CLIP, num_visual_tokens=9, return_tensors="pt")
    assert torch.equal(answer(model, asked), answer(model, by_hand))


def test_chats_keep_what_was_given_and_each_video_has_its_own_options(loaded):
    _, processor = loaded["llava15-m3"]
    messages = chat(
        {"type": "video", "path": str(CLIP), "num_frames": 2, "num_visual_tokens": 36},
        {"type": "image", "image": picture("photo_400x266.png")},
        {"type": "video", "video": list(moving_frames(9)), "total_visual_tokens": 70, "num_frames": 3},
    )
    before = copy.copy(messages[0]["content"])
    inputs = prepared(processor, messages, num_visual_tokens=1)
    assert messages[0]["content"] == before
    assert inputs["num_visual_tokens"].tolist() == [36, 36, 1, 36, 9, 9]
    with pytest.raises(ValueError, match="A video of a chat has .*'frames'"):
        prepared(processor, chat({"type": "video", "path": str(CLIP), "frames": 3}))
    with pytest.raises(ValueError, match="return_assistant_tokens_mask"):
        processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)


@pytest.mark.skipif(not MAKES_TEXT_PLAIN, reason="text is made plain from 5.24 on")
def test_marks_in_what_users_wrote_are_text(loaded):
    _, processor = loaded["llava15-m3"]
    messages = [{"role": "user", "content": [{"type": "video", "path": str(CLIP)},
                                             {"type": "text", "text": "Is <image> or <video> written?"}]}]  # fmt: skip
    inputs = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", sanitize_control_tokens=True,
        processor_kwargs={"num_visual_tokens": 1},
    )  # fmt: skip
    assert count(inputs, processor) == [6]
    assert "<video>" in processor.decode(inputs["input_ids"][0])


def test_the_pipeline_answers_about_a_video(loaded):
    model, processor = loaded["llava15-m3"]
    messages = chat({"type": "video", "path": str(CLIP)})
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    [found] = pipe(
        text=messages,
        processor_kwargs={"total_visual_tokens": 100},
        max_new_tokens=8,
        do_sample=False,
        return_full_text=False,
    )
    inputs = prepared(processor, messages, total_visual_tokens=100)
    assert inputs["num_visual_tokens"].tolist() == [36, 9, 9, 9, 9, 9]  # 81; a second would make it 108
    assert found["generated_text"] == processor.decode(answer(model, inputs)[0], skip_special_tokens=True)


@pytest.mark.parametrize(
    "numbers",
    [
        9,
        [9] * 64 + [1] * 256 + [36],
        *(pytest.param(numbers, marks=pytest.mark.slow) for numbers in ([9, 1, 36], [[9] * 64, 1, 36])),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["flat", "spatial_unpad"])
def test_long_videos_images_and_text_in_one_batch_are_single_calls(kind, numbers):
    model, processor = tiny(kind)
    clips = [moving_frames(64), moving_frames(256, width=9, height=7)]
    image = Image.fromarray(moving_frames(40)[39])
    texts = ["look <video> .", "<video> look look", "<image>", "look ."]
    together = processor(
        text=texts,
        videos=[[clips[0]], [clips[1]], [], []],
        images=[[], [], [image], []],
        num_frames="all",
        num_visual_tokens=numbers if numbers != 9 else [9, 1, 36],
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    singles = [
        processor(text=texts[0], videos=clips[0], num_frames="all", num_visual_tokens=9, return_tensors="pt"),
        processor(text=texts[1], videos=clips[1], num_frames="all", num_visual_tokens=1, return_tensors="pt"),
        processor(text=texts[2], images=image, num_visual_tokens=36, return_tensors="pt"),
        processor(text=texts[3], return_tensors="pt"),
    ]
    assert count(together, processor) == [n for single in singles for n in count(single, processor)]
    assert count(together, processor)[:2] == [64 * 9, 256]
    alone = torch.cat([answer(model, single, eos_token_id=None) for single in singles])
    assert torch.equal(answer(model, together, eos_token_id=None), alone)
    assert len({tuple(row) for row in alone.tolist()}) == 4


def test_videos_kwargs_are_for_videos_alone():
    _, processor = tiny()
    image = Image.new("RGB", (9, 9))
    inputs = processor(
        text="<image> <video>",
        images=image,
        videos=moving_frames(3),
        images_kwargs={"num_visual_tokens": 36},
        videos_kwargs={"num_visual_tokens": [1, 9, 9], "num_frames": 3},
    )
    assert inputs["num_visual_tokens"] == [36, 1, 9, 9]


@pytest.mark.parametrize("kind", ["flat", "spatial_unpad"])
@pytest.mark.parametrize("frames_at_once", [1, 7, 64])
def test_one_encoding_answers_at_every_budget(kind, frames_at_once, vision_calls):  # noqa: F811
    model, processor = tiny(kind)
    clip = moving_frames(20)
    whole = model.encode_video(processor.stream_video(clip, frames_at_once, num_frames=16))
    reduced = model.encode_video(
        processor(videos=clip, num_frames=16, return_tensors="pt")["pixel_values"], 9, frames_at_once
    )
    assert whole.tile_features.shape == (16, 144, 32) and reduced.tile_features.shape == (16, 9, 32)
    calls = len(vision_calls)
    for encoded, numbers in ((whole, (1, 9, 36)), (reduced, (1, 9))):
        for number in numbers:
            inputs = processor(text="look <video>", videos=encoded, num_visual_tokens=number, return_tensors="pt")
            assert "pixel_values" not in inputs and count(inputs, processor) == [16 * number]
            found = answer(model, inputs, encoded_images=encoded)
            assert len(vision_calls) == calls
            asked = processor(
                text="look <video>", videos=clip, num_frames=16, num_visual_tokens=number, return_tensors="pt"
            )
            assert torch.equal(found, answer(model, asked))
            calls = len(vision_calls)
    inputs = processor(text="look <video>", videos=reduced, num_visual_tokens=36, return_tensors="pt")
    with pytest.raises(ValueError, match=r"Tiles of 9 tokens cannot be pooled to 36: choose from \[1, 9\]"):
        model.generate(**inputs, encoded_images=reduced)
    with pytest.raises(ValueError, match="sampled already"):
        model.get_visual_tokens(reduced, 1, "spatial")


def test_encoded_frames_equal_encoded_images():
    model, processor = tiny()
    pixels = processor(videos=moving_frames(150), num_frames="all", return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        in_parts = model.encode_images(pixels)  # more than go through the tower together
    at_once = model.encode_images(pixels)
    assert at_once.tile_features.requires_grad and not in_parts.tile_features.requires_grad
    for encoded in (in_parts, model.encode_video(pixels, frames_at_once=32)):
        torch.testing.assert_close(encoded.tile_features, at_once.tile_features.detach(), rtol=0, atol=1e-5)
    torch.testing.assert_close(in_parts.last_hidden_state, at_once.last_hidden_state.detach(), rtol=0, atol=1e-5)


def test_frames_are_added_to_a_chat_without_encoding_the_old_ones_again(vision_calls):  # noqa: F811
    model, processor = tiny()
    frames = moving_frames(12)
    old = model.encode_video(processor.stream_video(frames[:8], num_frames="all"))
    inputs = processor(text="look <video>", videos=old, num_visual_tokens=9, return_tensors="pt")
    output = model.generate(
        **inputs, encoded_images=old, max_new_tokens=4, return_dict_in_generate=True, eos_token_id=None
    )
    new = model.encode_video(processor.stream_video(frames[8:], num_frames="all"))
    calls = len(vision_calls)
    more = processor(text="<video> look", videos=new, num_visual_tokens=1, return_tensors="pt")
    ids = torch.cat([output.sequences, more["input_ids"]], dim=1)
    both = {"encoded_images": M3LlavaEncodedImages.cat([old, new]), "num_visual_tokens": [9] * 8 + [1] * 4}
    whole = answer(model, {"input_ids": ids}, **both, eos_token_id=None)
    for images in (both, {"encoded_images": new, "num_visual_tokens": 1}):
        cache = copy.deepcopy(getattr(output, CACHE_NAME))
        assert torch.equal(answer(model, {"input_ids": ids}, **images, **{CACHE_NAME: cache}, eos_token_id=None), whole)
    assert len(vision_calls) == calls
    with pytest.raises(ValueError, match=r"kept at \[9, 144\] visual tokens"):
        M3LlavaEncodedImages.cat([old, model.encode_video(processor.stream_video(frames), 9)])


def test_timestamps_stay_with_what_is_encoded(loaded):
    model, processor = loaded["llava15-m3"]
    encoded = model.encode_video(processor.stream_video(CLIP, num_frames=3), 1)
    options = {"add_timestamps": True, "num_visual_tokens": 1}
    from_encoded = processor(text="<video>", videos=encoded, **options)
    assert from_encoded["input_ids"] == processor(text="<video>", videos=CLIP, num_frames=3, **options)["input_ids"]


@pytest.mark.parametrize("is_encoded", [False, True])
def test_what_does_not_fit_the_context_is_refused_with_what_would(is_encoded):
    model, processor = tiny()  # of 1,024 tokens
    clip = moving_frames(30)
    given = model.encode_video(processor.stream_video(clip, num_frames=30)) if is_encoded else clip
    images = {"encoded_images": given} if is_encoded else {}
    inputs = processor(text="look <video>", videos=given, num_frames=30, num_visual_tokens=36, return_tensors="pt")
    with pytest.raises(
        ValueError, match=r"1081 tokens, 1080 of them visual.*context of 1024. At num_visual_tokens=9 .* 271"
    ):
        model.generate(**inputs, **images)
    model.config.text_config.max_position_embeddings = 20
    with pytest.raises(ValueError, match="30 pictures do not fit even at 1 each"):
        model.generate(**inputs, **images)


def test_what_is_encoded_is_not_mixed_with_what_is_not():
    model, processor = tiny()
    encoded = model.encode_video(processor.stream_video(moving_frames(3)))
    with pytest.raises(ValueError, match="encode all of them, or none"):
        processor(text="<video> <video>", videos=[encoded, moving_frames(3)])
    with pytest.raises(ValueError, match="Encode the collage instead"):
        processor(text="<video>", videos=encoded, video_layout="collage")
    for wrong, message in ((torch.zeros(2, 3), "expected .frames, channels"), ([], "There are no frames")):
        with pytest.raises(ValueError, match=message):
            model.encode_video(wrong)


def test_the_command_answers_about_a_clip(converted, loaded):
    model, processor = loaded["llava15-m3"]
    command = (CLIP, "What is this?", "--model", converted["llava15-m3"], "--max-new-tokens", 6)
    messages = chat({"type": "video", "path": str(CLIP)})
    for options, asked in (
        ((), {"total_visual_tokens": 576}),
        (("--num-visual-tokens", 9, "--num-frames", 3), {"num_visual_tokens": 9, "num_frames": 3}),
        (("--video-layout", "collage", "--video-start", 1), {"video_layout": "collage", "video_start": 1, "total_visual_tokens": 576}),
        (("--timestamps", "--fps", 1, "--num-visual-tokens", 1), {"add_timestamps": True, "fps": 1, "num_visual_tokens": 1}),
    ):  # fmt: skip
        result = run(*command, *options)
        expected = answer(model, prepared(processor, messages, **asked), max_new_tokens=6)
        assert result.exit_code == 0, result.output
        assert result.stdout.strip() == processor.decode(expected[0], skip_special_tokens=True).strip()
    compared = run(*command, "--compare", "--num-frames", 8)
    assert [row.split()[0] for row in compared.stdout.splitlines()[2:7]] == ["8", "72", "288", "1152", "4608"]
    assert "more than the language model's context of 4096" in compared.stdout
    refused = run(picture("photo_400x266.png").filename, "?", "--fps", 1)
    assert refused.exit_code == 1 and "is a picture: fps are for videos" in refused.output


@pytest.mark.slow
def test_an_hour_is_encoded_in_little_memory_and_answered():
    """3,600 frames of a file, one a second, at 1 and at 9 tokens each."""
    script = Path(__file__).with_name("an_hour_of_video.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    grown, *tokens = map(int, done.stdout.split())
    assert tokens == [3600, 32400] and grown < 2 * 1024**3
