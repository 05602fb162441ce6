# Copyright 2026 The M3 for Hugging Face authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Pictures and text to model inputs: every `<image>` becomes as many placeholders as the image costs visual tokens."""

import copy
import inspect
import re
from typing import Any

import torch
from transformers.image_utils import ImageInput, make_flat_list_of_images
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.processing_utils import ImagesKwargs, MultiModalData, ProcessingKwargs, ProcessorMixin

from .chats import NUMBER, take_options, videos_as_images
from .configuration_m3 import check_name
from .pictures import open_pictures
from .video_processing_m3 import VIDEO_MARK, VideoProcessingMixin
from .visual_tokens import (
    AUTO,
    MERGE_TYPES,
    ONE_VIEW,
    ImageLayout,
    as_plain,
    ascending_scales,
    cat_tiles,
    check_choice,
    check_num_visual_tokens,
    check_pinpoints,
    check_scales,
    default_scales,
    keeps_class_token,
    tile_grid,
)


class M3LlavaImagesKwargs(ImagesKwargs, total=False):
    """
    num_visual_tokens (`int`, `"auto"` or a list of them, *optional*):
        Visual tokens per tile: one number for all images, or one per image in reading order. `"auto"`: the model chooses.
    image_grid_pinpoints (`list[list[int]]`, *optional*):
        (height, width) pairs in pixels that an image may be resized to before it is cut into tiles.
    image_mean, image_std (`float` or `list[float]`, *optional*):
        One number for all channels, or one for each.
    """

    num_visual_tokens: int | str | list | None
    image_grid_pinpoints: list | tuple | None
    image_mean: Any
    image_std: Any


class M3LlavaProcessorKwargs(ProcessingKwargs, total=False):
    images_kwargs: M3LlavaImagesKwargs


# Before 5.24 the defaults may be read here, and a TypedDict does not inherit them.
M3LlavaProcessorKwargs._defaults = {}

# Before 5.24 a user's text cannot be made plain, and templates' arguments may take the place of `processor_kwargs`.
MAKES_TEXT_PLAIN = "sanitize_control_tokens" in inspect.signature(ProcessorMixin.apply_chat_template).parameters


BESIDE = "numbers_beside_pictures"  # what `apply_chat_template` hands to a call, which the templates do not see


# trf-ignore: TRF057 - see configuration_m3.py
class _Tiles(torch.Tensor):
    """Pixels, (images, tiles, c, h, w), that `torch.cat` joins with those of images with another number of tiles.

    `pipeline(..., batch_size=n)` prepares prompts one by one and joins what comes of them so; nothing else of ours is asked.
    Copies on a device or of a type are the same. Whatever else is made of it is a plain tensor.
    """

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            result = (cat_tiles if function is torch.cat else function)(*args, **kwargs)
            return result.as_subclass(cls) if function is torch.Tensor.to else result

    def __deepcopy__(self, memo: dict) -> torch.Tensor:
        return copy.deepcopy(self.as_subclass(torch.Tensor), memo)

    def __reduce_ex__(self, protocol: int) -> Any:  # what is stored needs no class of ours
        return self.as_subclass(torch.Tensor).__reduce_ex__(protocol)


# trf-ignore: TRF057 - see configuration_m3.py
class M3LlavaProcessor(VideoProcessingMixin, ProcessorMixin):
    """
    Turns images and text into the inputs of [`M3LlavaForConditionalGeneration`].

    Args:
        image_processor (`M3LlavaImageProcessor`): Its `image_grid_pinpoints` decide whether images are cut into tiles.
        tokenizer (`PreTrainedTokenizerFast`): One that knows `image_token`.
        patch_size (`int`, *optional*, defaults to 14): Pixels along one side of a patch of the vision tower.
        visual_token_scales (`list[int]`, *optional*): The numbers of visual tokens a tile may cost; as in the model's
            configuration, ascending in whatever order they are given. By default the paper's, for the grid of patches.
        num_visual_tokens (`int` or `"auto"`, *optional*): What is used where a call gives none; the finest by default.
        patch_merge_type (`str`, *optional*, defaults to `"flat"`): As in the model's configuration.
        vision_feature_select_strategy (`str`, *optional*, defaults to `"default"`): As in the model's configuration.
        image_token (`str`, *optional*, defaults to `"<image>"`): The mark that stands for an image in a prompt.
        chat_template (`str`, *optional*): Jinja template for `apply_chat_template`.
    """

    valid_processor_kwargs = M3LlavaProcessorKwargs
    _auto_class = "AutoProcessor"  # saving copies the code along

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        patch_size: int = 14,
        visual_token_scales: list[int] | None = None,
        num_visual_tokens: int | str | None = None,
        patch_merge_type: str = "flat",
        vision_feature_select_strategy: str = "default",
        image_token: str = "<image>",
        chat_template: str | None = None,
        **kwargs: Any,
    ):
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        if not isinstance(patch_size, int) or patch_size < 1:
            raise ValueError(f"patch_size={patch_size!r} must be the side of the vision tower's patches in pixels.")
        check_choice("patch_merge_type", patch_merge_type, MERGE_TYPES)
        side = self._tile_size // patch_size
        with_class_token = keeps_class_token(vision_feature_select_strategy)
        if visual_token_scales is None:
            visual_token_scales = default_scales(side, with_class_token)
        visual_token_scales = ascending_scales(visual_token_scales)
        check_scales(visual_token_scales, side)
        if num_visual_tokens is not None:
            num_visual_tokens = as_plain(num_visual_tokens)
            check_num_visual_tokens([num_visual_tokens], visual_token_scales, num_images=1, may_be_auto=True)

        self.auto_map = {"AutoProcessor": "processing_m3.M3LlavaProcessor"}  # as saving would set it
        self.patch_size = patch_size
        self.visual_token_scales = visual_token_scales
        self.num_visual_tokens = num_visual_tokens
        self.patch_merge_type = patch_merge_type
        self.vision_feature_select_strategy = vision_feature_select_strategy
        self.image_token = getattr(tokenizer, "image_token", None) or image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, ascending_scales(value) if name == "visual_token_scales" else value)

    def to_dict(self) -> dict[str, Any]:
        """What is stored; a default that was set as numpy's or torch's number as Python's own."""
        return {**super().to_dict(), "num_visual_tokens": as_plain(self.num_visual_tokens)}

    # trf-ignore: TRF057 - see configuration_m3.py
    def __call__(
        self,
        images: ImageInput | None = None,
        text: str | list[str] | None = None,
        videos: Any = None,
        **kwargs: Any,
    ):
        """
        Prepares images, videos and text for the model.

        Args:
            images: One image, a list, or a list per prompt: PIL images, arrays, tensors, paths, URLs, bytes or open files.
                None in a list is no image.
            text: One prompt or a list, with one `<image>` per image and one `<video>` per video. Where the tokenizer begins prompts with a token, so do
                `input_ids`, once, whether or not the text is written with it.
            num_visual_tokens (`int` or `list[int]`, or numpy's or torch's, *optional*): What each image may cost, per tile: one of
                `visual_token_scales` for all images, or a list with one per image in reading order. "auto" in place of a number
                lays out the finest scale's placeholders and returns 0: `generate` chooses.
            image_grid_pinpoints (`list[list[int]]`, *optional*): Resolutions for this call, as (height, width).
            videos: One video, a list, or a list per prompt: paths, URLs, bytes or open files; lists of pictures; arrays or
                tensors of bytes, (frames, height, width, channels); what `encode_video` returned. Every frame is an image of
                one view, to the model and for `num_visual_tokens`, which may have one entry for each video too: a number for
                all of its frames, or a list with one for each.
            total_visual_tokens (`int`, *optional*): In place of `num_visual_tokens`, for each video: what its frames may cost
                together. See `share_visual_tokens`.
            num_frames, fps, video_start, video_end, when_short, video_fps (*optional*): Which frames; see `sample_video`.
            video_layout (`str`, *optional*, defaults to `"frames"`): Or `"collage"`: the frames in one image, as the authors
                do it, with their sentence.
            add_timestamps (`bool`, *optional*, defaults to `False`): Write before each frame when it is shown: `1.5s: `.
            kwargs: Anything the tokenizer and the image processor take: `return_tensors`, `padding`, ...

        Returns:
            `BatchFeature` with `input_ids` and `attention_mask` of shape (prompts, sequence length); where there are
            images, `pixel_values`, `num_visual_tokens` of shape (images,), `image_tile_grids` of shape (images, 2), the
            (rows, columns) that each is cut into, and for images cut into tiles `image_sizes` of shape (images, 2).

        Raises:
            ValueError: for a number of visual tokens this checkpoint does not offer, for texts that are none, for numbers
                of images and of `<image>` marks that differ, and where truncation would cut an image's placeholders.
        """
        if "matryoshka_vis_token_scale" in kwargs:
            raise ValueError("matryoshka_vis_token_scale is the authors' name: it is num_visual_tokens here.")
        # Before 5.24 the dicts that are handed on may be emptied: a caller's must survive for the next call.
        kwargs = {key: dict(value) if isinstance(value, dict) else value for key, value in kwargs.items()}
        for given in (kwargs, kwargs.get("images_kwargs", {})):  # transformers would refuse numpy's and torch's numbers
            for name in given.keys() & {"num_visual_tokens", "image_grid_pinpoints"}:
                given[name] = as_plain(given[name])
        beside = kwargs.pop(BESIDE, None)
        if any(given.get("return_text_replacement_offsets") for given in (kwargs, kwargs.get("text_kwargs", {}))):
            numbers = {**kwargs, **kwargs.get("images_kwargs", {})}.get("num_visual_tokens")
            kwargs["num_visual_tokens"] = self._number_for_an_engine(numbers)
            kwargs.get("images_kwargs", {}).pop("num_visual_tokens", None)
            self._number_for_an_engine(beside)
        if text is not None:
            text = _prompts(text)
        images, text = self.lay_out_videos(images, text, videos, kwargs, beside)
        images = None if images is None else open_pictures(images)
        if isinstance(images, list) and all(isinstance(group, list) and not group for group in images):
            images = None  # no image for any prompt
        if text is not None:
            text = self._begin_once(text, kwargs)
        return super().__call__(images=images, text=text, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As in transformers. Raises `ValueError` for what names nothing."""
        check_name(pretrained_model_name_or_path)
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    def tokenize_prompts(self, prompts: list[str]) -> list[list[int]]:
        """The token ids of prompts as a call makes them, but with one mark for each image in place of its placeholders."""
        kwargs: dict[str, Any] = {}
        prompts = self._begin_once(prompts, kwargs)
        return self.tokenizer(prompts, **kwargs)["input_ids"]

    def _begin_once(self, prompts: list[str], kwargs: dict[str, Any]) -> list[str]:
        """Has every prompt begin with the tokenizer's first token once; the rest is tokenized as if it stood alone."""
        prompts = _prompts(prompts)
        bos, tokenizer = self.tokenizer.bos_token, self.tokenizer
        if bos is None or tokenizer("")["input_ids"][:1] != [tokenizer.bos_token_id]:
            return prompts  # such tokenizers take prompts as they are
        bare = [re.sub(rf"\A(?:{re.escape(bos)})+", "", prompt) for prompt in prompts]
        reads_bos = tokenizer(f"{bos}a", add_special_tokens=False)["input_ids"] == tokenizer("a")["input_ids"]
        as_written = reads_bos and prompts == [bos + prompt for prompt in bare]
        text_kwargs = kwargs.get("text_kwargs", {})
        (text_kwargs if "add_special_tokens" in text_kwargs else kwargs)["add_special_tokens"] = not as_written
        return prompts if as_written else bare

    def apply_chat_template(
        self,
        conversation: list[dict[str, Any]] | list[list[dict[str, Any]]],
        chat_template: str | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As transformers' own, on every release, with numbers beside pictures, and for videos.

        `{"type": "image", "path": ..., "num_visual_tokens": 9}` is that picture's number, before that of `processor_kwargs`, where a
        list has an entry for each picture all the same. In `{"type": "video", "path": ..., "num_frames": 8}` path may be url or video
        too, and other options of a call may stand that are meant for this one alone. Videos stand where a template puts an
        image; what is not tokenized has `<video>` there, and can have nothing beside pictures and videos.

        Raises:
            ValueError: for a number that this checkpoint does not offer, or that cannot be carried.
        """
        conversation, options = take_options(conversation)
        conversation, is_video = videos_as_images(conversation)
        beside = [item for own in options for item in own.items()]
        if beside and not kwargs.get("tokenize"):
            name, value = beside[0]
            raise ValueError(
                f"{name}={value!r} stands beside a picture or a video, and a prompt that is not tokenized cannot carry it: pass "
                "tokenize=True and return_dict=True, or leave it out and give it in the processor's call."
            )
        numbers = [None if video else as_plain(own.get(NUMBER)) for own, video in zip(options, is_video)]
        for number in numbers:
            if number is not None:
                self._scales([number] if isinstance(number, list) else number, 1)
        if any(number is not None for number in numbers):
            processor_kwargs = {**(processor_kwargs or {}), BESIDE: numbers}
        if any(is_video) and kwargs.get("return_assistant_tokens_mask"):
            raise ValueError(
                "return_assistant_tokens_mask cannot be had with videos: give their frames as images, which it counts."
            )
        if not MAKES_TEXT_PLAIN and kwargs.keys() - inspect.signature(super().apply_chat_template).parameters:
            kwargs, processor_kwargs = {**(processor_kwargs or {}), **kwargs}, None
        rendered = super().apply_chat_template(
            conversation, chat_template=chat_template, processor_kwargs=processor_kwargs, **kwargs
        )
        if kwargs.get("tokenize") or not any(is_video):
            return rendered
        prompts = [rendered] if isinstance(rendered, str) else rendered
        if sum(prompt.count(self.image_token) for prompt in prompts) != len(is_video):
            raise ValueError(
                f"A text of this chat holds {self.image_token}: its images and videos cannot be told from it."
            )
        marks = iter([VIDEO_MARK if video else self.image_token for video in is_video])
        prompts = [re.sub(re.escape(self.image_token), lambda _: next(marks), prompt) for prompt in prompts]
        return prompts[0] if isinstance(rendered, str) else prompts

    def validate_inputs(self, images: ImageInput | None = None, text: Any = None, **kwargs: Any) -> None:
        """Checks what a caller passed before transformers' own type checks, whose messages name no allowed value."""
        num_images = 0 if images is None else len(make_flat_list_of_images(images))
        images_kwargs = {**kwargs.get("images_kwargs", {}), **kwargs}
        self._scales(images_kwargs.get("num_visual_tokens"), num_images)
        if images_kwargs.get("image_grid_pinpoints") is not None:
            check_pinpoints(images_kwargs["image_grid_pinpoints"], self._tile_size)
        if text is not None:
            marks = [prompt.count(self.image_token) for prompt in ([text] if isinstance(text, str) else text)]
            if sum(marks) != num_images:
                advice = f"Write one {self.image_token} in the prompt for each image."
                if MAKES_TEXT_PLAIN and sum(marks) > num_images:
                    advice += " What users wrote is made plain text by apply_chat_template(..., sanitize_control_tokens=True)."
                raise ValueError(
                    f"The total number of {self.image_token} tokens in the prompts should be the same as the number of images "
                    f"passed. Found total {sum(marks)} {self.image_token} tokens and {num_images} images. {advice}"
                )
            nested = isinstance(images, (list, tuple)) and images and isinstance(images[0], (list, tuple))
            if nested and [len(group) for group in images] != marks:
                raise ValueError(
                    f"The prompts have {marks} {self.image_token} mark(s), but the lists of images have "
                    f"{[len(group) for group in images]} entries. Give every prompt its own images."
                )
        super().validate_inputs(images=images, text=text, **kwargs)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        """The placeholders of one image."""
        scale = int(image_inputs["num_visual_tokens"][image_idx]) or max(self.visual_token_scales)
        return self.image_token * self.image_layout(image_inputs, image_idx).count(scale)

    def image_layout(self, image_inputs: dict, image_idx: int) -> ImageLayout:
        """How the model lays out one of the images that the image processor prepared."""
        if image_inputs.get("image_sizes") is None:
            return self._layout(None, None)
        return self._layout(*(image_inputs[name][image_idx] for name in ("image_tile_grids", "image_sizes")))

    def _process_images(
        self, images: ImageInput, num_visual_tokens: int | list[int] | None = None, **kwargs: Any
    ) -> tuple[dict, list[str]]:
        pictures = make_flat_list_of_images(images)
        scales = self._scales(num_visual_tokens, len(pictures))
        stands = [getattr(picture, "stands_for", None) for picture in pictures]
        if isinstance(stands[0], ImageLayout):  # encoded already, and then all are
            scale_of = [scale or max(self.visual_token_scales) for scale in scales]
            counts = [layout.count(scale) for layout, scale in zip(stands, scale_of)]
            return {"num_visual_tokens": scales}, [self.image_token * count for count in counts]
        if kwargs.get("image_grid_pinpoints") is None:  # to the image processor, None is a value of its own
            kwargs.pop("image_grid_pinpoints", None)
        if any(stands):
            image_inputs = self._prepare_pictures(pictures, self.image_processor, **kwargs)
        else:
            image_inputs = self.image_processor(images, **kwargs)
        view_size = tuple(image_inputs["pixel_values"][0].shape[-2:])
        if view_size != (self._tile_size, self._tile_size):
            raise ValueError(
                f"The images were prepared as views of {view_size} pixels, but the model sees views of "
                f"{(self._tile_size, self._tile_size)}. Do not override how images are resized, cropped or padded."
            )
        if isinstance(image_inputs["pixel_values"], torch.Tensor) and image_inputs["pixel_values"].ndim == 5:
            image_inputs["pixel_values"] = image_inputs["pixel_values"].as_subclass(_Tiles)
        image_inputs["num_visual_tokens"] = scales
        image_inputs.setdefault("image_tile_grids", [[0, 0]] * len(scales))  # CLIP's own image processor cuts none
        return image_inputs, [self.replace_image_token(image_inputs, index) for index in range(len(scales))]

    def _get_num_multimodal_tokens(
        self, image_sizes: list[tuple[int, int]] | None = None, **kwargs: Any
    ) -> MultiModalData:
        """What images of these (height, width) cost, for serving engines: placeholders, and one entry of pixels each."""
        if image_sizes is None:
            return MultiModalData()
        numbers = self._number_for_an_engine(kwargs.get("num_visual_tokens"))
        scales = self._scales(numbers, len(image_sizes))
        pinpoints = kwargs.get("image_grid_pinpoints")
        layouts = [self._picture_layout(size, pinpoints) for size in image_sizes]
        counts = [layout.count(scale) for layout, scale in zip(layouts, scales)]
        return MultiModalData(num_image_tokens=counts, num_image_patches=[1] * len(counts))

    @classmethod
    def _load_tokenizer_from_pretrained(
        cls, sub_processor_type: str, pretrained_model_name_or_path: Any, subfolder: str = "", **kwargs: Any
    ) -> Any:
        """What is said about loading, or to the image processor, is not the tokenizer's to keep and to store."""
        kwargs = {name: value for name, value in kwargs.items() if name not in ("backend", "use_fast")}
        tokenizer = super()._load_tokenizer_from_pretrained(
            sub_processor_type, pretrained_model_name_or_path, subfolder=subfolder, **kwargs
        )
        stored = get_tokenizer_config(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        tokenizer.init_kwargs = {name: value for name, value in tokenizer.init_kwargs.items() if name in stored}
        if tokenizer.is_fast:
            tokenizer.backend = "tokenizers"  # folders that were written before may name the image processor's
        return tokenizer

    @property
    def _tile_size(self) -> int:
        return self.image_processor.crop_size["height"]

    def _scales(self, num_visual_tokens: Any, num_images: int) -> list[int]:
        if num_visual_tokens is None:
            num_visual_tokens = self.num_visual_tokens
        return check_num_visual_tokens(num_visual_tokens, self.visual_token_scales, num_images, may_be_auto=True)

    def _number_for_an_engine(self, num_visual_tokens: Any) -> Any:
        """What a serving engine, which has its own `generate`, takes: a default of "auto" counts as the finest scale."""
        num_visual_tokens = as_plain(num_visual_tokens)
        if AUTO in (num_visual_tokens if isinstance(num_visual_tokens, list) else [num_visual_tokens]):
            raise ValueError(
                f"num_visual_tokens={num_visual_tokens!r}: only `generate` of transformers chooses by itself. Choose from "
                f"{self.visual_token_scales}."
            )
        if num_visual_tokens is None and self.num_visual_tokens == AUTO:
            return max(self.visual_token_scales)
        return num_visual_tokens

    def _pinpoints(self, asked: Any = None) -> Any:
        """The resolutions that pictures are cut into tiles at, those of a call first; None for one view."""
        return asked or getattr(self.image_processor, "image_grid_pinpoints", None)

    def _picture_layout(self, size: tuple[int, int], pinpoints: Any = None) -> ImageLayout:
        """How the model lays out a picture of (height, width)."""
        pinpoints = self._pinpoints(pinpoints)
        return self._layout(pinpoints and tile_grid(size, pinpoints, self._tile_size), size)

    def _layout(self, grid: Any, size: Any) -> ImageLayout:
        grid, size = (facts if facts is None else tuple(map(int, facts)) for facts in (grid, size))
        grid = None if grid == ONE_VIEW else grid
        return ImageLayout(grid, size, self.patch_merge_type, keeps_class_token(self.vision_feature_select_strategy))


def _prompts(text: Any) -> list[str]:
    prompts = [text] if isinstance(text, str) else text
    if not isinstance(prompts, (list, tuple)) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"text={text!r}: give one prompt, or a list with at least one.")
    return list(prompts)


__all__ = ["M3LlavaProcessor"]
