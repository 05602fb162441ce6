"""Answers questions about pictures and videos at several numbers of visual tokens, and encodes every picture once for all of them.

A picture is prepared and encoded alone, and kept, up to a number of bytes, for further questions about it. So what is answered
does not depend on what was asked before: a run that goes on after it was stopped finds the same answers.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence

from modeling_m3 import M3LlavaForConditionalGeneration, M3LlavaProcessor
from modeling_m3.chats import ChatVideo, videos_as_images
from modeling_m3.outputs_m3 import M3LlavaEncodedImages
from modeling_m3.pictures import open_pictures
from modeling_m3.video_processing_m3 import decoded
from modeling_m3.videos import sample_video
from modeling_m3.visual_tokens import AUTO, AUTO_NUMBER, ImageLayout, check_num_visual_tokens, expand_placeholders

from .signals import known


KEPT_BYTES = 2 * 10**9

Chat = list[dict[str, Any]]


def pictures_of(chat: Chat) -> list[Image.Image]:
    """The pictures of a chat, opened, in reading order; of a video the first frame."""
    return [
        next(iter(sample_video(entry.video, num_frames=1))) if isinstance(entry, ChatVideo) else open_pictures(entry)
        for entry in _media_of(videos_as_images(chat)[0])
    ]


def _media_of(chat: Chat) -> list[Any]:
    return [
        part["image"]
        for message in chat
        if not isinstance(message["content"], str)
        for part in message["content"]
        if part["type"] == "image"
    ]


def settings_of(
    model: M3LlavaForConditionalGeneration,
    processor: M3LlavaProcessor,
    quantize: str | None,
    image_grid_pinpoints: list[list[int]] | None = None,
    visual_token_sampling: str | None = None,
) -> dict[str, Any]:
    """What answers depend on beside the checkpoint and the question, by the names that a run has for it."""
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantize": quantize,
        "image_grid_pinpoints": image_grid_pinpoints,
        "image_backend": processor.image_processor.backend,
        "visual_token_sampling": visual_token_sampling or model.config.visual_token_sampling,
    }


@dataclass(frozen=True)
class Answer:
    """What was answered at one scale.

    Attributes:
        text: without special tokens, and nothing around it.
        visual_tokens: of all pictures in the prompt; where the model chose, of all passes.
        text_tokens: of the rest of the prompt.
        answer_tokens: before the end of the turn.
        known: what the model knew, where that is kept; see `signals.known`.
    """

    text: str
    visual_tokens: int
    text_tokens: int
    answer_tokens: int
    known: dict[str, Any] | None = None


@dataclass(frozen=True)
class Likelihood:
    """How likely a continuation is at one scale: the sum of its tokens' log-probabilities, and whether it is the greedy one."""

    log_probability: float
    is_greedy: bool
    visual_tokens: int
    text_tokens: int


@dataclass(frozen=True)
class _Prompt:
    ids: list[int]  # with one mark per picture, or frame
    layouts: list[ImageLayout]
    features: list[torch.Tensor]  # (all tiles, tokens per tile, d) of each picture
    continuation: int = 0  # how many of the ids are to be judged

    def visual_tokens(self, scale: int) -> int:
        return sum(layout.count(scale) for layout in self.layouts)

    def text_tokens(self) -> int:
        return len(self.ids) - len(self.layouts) - self.continuation


class Answerer:
    """A model that is asked in batches.

    Args:
        model, processor: as `modeling_m3.load` returns them.
        image_grid_pinpoints: (height, width) pairs that pictures are cut into tiles by; the checkpoint's by default.
        visual_token_sampling: the checkpoint's by default.
        kept_bytes: how many bytes of encoded pictures are kept in memory.
        keep_signals: whether greedy answers come with what the model knew.
        video: options of videos, as the processor takes them: num_frames, fps, video_layout, ...
    """

    def __init__(
        self,
        model: M3LlavaForConditionalGeneration,
        processor: M3LlavaProcessor,
        image_grid_pinpoints: list[list[int]] | None = None,
        visual_token_sampling: str | None = None,
        kept_bytes: int = KEPT_BYTES,
        keep_signals: bool = False,
        video: dict[str, Any] | None = None,
    ):
        self.video = {name: value for name, value in (video or {}).items() if value is not None}
        self.keep_signals = keep_signals
        self.model, self.processor = model.eval(), processor
        self.pinpoints = {} if image_grid_pinpoints is None else {"image_grid_pinpoints": image_grid_pinpoints}
        self.sampling, self.kept_bytes = visual_token_sampling, kept_bytes
        self.encodings = 0  # pictures that the vision tower saw
        self._kept: OrderedDict[str, tuple[ImageLayout, torch.Tensor]] = OrderedDict()
        self._held = 0  # bytes

    def scales(self, wanted: Sequence[int | str] | None = None) -> list[int]:
        """The scales to answer at, ascending; all that the checkpoint offers by default, and `AUTO_NUMBER` alone for ["auto"].

        Raises `ValueError` for others.
        """
        offered = self.processor.visual_token_scales
        if wanted == [AUTO]:
            return check_num_visual_tokens([AUTO], offered, 1, may_be_auto=True)
        return sorted(set(check_num_visual_tokens(list(wanted or offered), offered, len(wanted or offered))))

    @torch.no_grad()
    def answer(self, chats: Sequence[Chat], scales: Sequence[int | str], **generation: Any) -> list[list[Answer]]:
        """Answers of one batch.

        Args:
            chats: messages of each prompt, as `apply_chat_template` takes them, with the pictures in them.
            scales: visual tokens per tile, or "auto".
            generation: arguments of `generate`.

        Returns:
            For each chat, an answer at each scale.
        """
        if self.keep_signals:
            _check_greedy(generation)
            generation |= {"output_hidden_states": True, "output_logits": True}
        prompts = [self._prompt(chat) for chat in chats]
        ends = self.model.generation_config.eos_token_id
        ends = {*(ends if isinstance(ends, list) else [ends]), self.processor.tokenizer.pad_token_id} - {None}
        answers: list[list[Answer]] = [[] for _ in prompts]
        for asked in scales:
            automatic = asked in (AUTO, AUTO_NUMBER)
            scale = max(self.processor.visual_token_scales) if automatic else int(asked)
            rows = [torch.tensor(self._expanded(prompt, scale)) for prompt in prompts]
            inputs = self._inputs(rows, "left")
            images, spent = self._images(prompts), [prompt.visual_tokens(scale) for prompt in prompts]
            if images:
                numbers = [AUTO_NUMBER if automatic else scale] * len(images["encoded_images"].layouts)
                images |= {"num_visual_tokens": numbers, "visual_token_sampling": self.sampling}
            output = self.model.generate(**inputs, **images, **generation, return_dict_in_generate=True)
            if images and automatic:
                spent = output.visual_tokens_spent.tolist()
            sequences = output.sequences[:, inputs["input_ids"].shape[1] :]
            told = known(output, ends, sequences) if self.keep_signals else [None] * len(prompts)
            for prompt, row, visual_tokens, found, knew in zip(prompts, sequences.tolist(), spent, answers, told):
                length = next((index for index, token in enumerate(row) if token in ends), len(row))
                text = self.processor.decode(row, skip_special_tokens=True).strip()
                found.append(Answer(text, visual_tokens, prompt.text_tokens(), length, knew))
        return answers

    @torch.no_grad()
    def likelihoods(
        self, chats: Sequence[Chat], continuations: Sequence[str], scales: Sequence[int]
    ) -> list[list[Likelihood]]:
        """How likely each continuation is as the answer to its chat, at each scale; shapes as in `answer`."""
        if AUTO_NUMBER in scales or AUTO in scales:
            raise NotImplementedError(
                "This task compares likelihoods of given answers, by which no number of visual tokens can be chosen: give numbers."
            )
        prompts = [self._prompt(chat, continuation) for chat, continuation in zip(chats, continuations)]
        found: list[list[Likelihood]] = [[] for _ in prompts]
        for scale in scales:
            rows = [torch.tensor(self._expanded(prompt, scale)) for prompt in prompts]
            inputs, images = self._inputs(rows, "right"), self._images(prompts)
            if images:
                images |= {"num_visual_tokens": scale, "visual_token_sampling": self.sampling}
            hidden = self.model.model(**inputs, **images, use_cache=False).last_hidden_state
            for index, (prompt, row) in enumerate(zip(prompts, rows)):
                wanted = row[len(row) - prompt.continuation :].to(hidden.device)
                before = hidden[index, len(row) - prompt.continuation - 1 : len(row) - 1]
                scores = self.model.get_logits(before).float().log_softmax(-1)
                value = scores.gather(-1, wanted[:, None]).sum().item()
                greedy = bool((scores.argmax(-1) == wanted).all())
                found[index].append(Likelihood(value, greedy, prompt.visual_tokens(scale), prompt.text_tokens()))
        return found

    @staticmethod
    def key_of(picture: Image.Image) -> str:
        """Of what the picture shows: equal pictures have equal keys."""
        key = hashlib.sha256(f"{picture.mode} {picture.size} {picture.getpalette()}".encode())
        key.update(picture.tobytes())
        return key.hexdigest()

    def _prompt(self, chat: Chat, continuation: str = "") -> _Prompt:
        chat, is_video = videos_as_images(chat)
        media = _media_of(chat)
        text = self.processor.apply_chat_template(chat, add_generation_prompt=True)
        if any(is_video):
            [media], [text] = self.processor.lay_out_videos([media], [text], None, dict(self.video))
        pictures = [(open_pictures(picture), is_frame) for picture, is_frame in decoded(media)]
        [ids] = self.processor.tokenize_prompts([text])
        judged = 0
        if continuation:
            [longer] = self.processor.tokenize_prompts([text + continuation])
            shared = next((i for i, (a, b) in enumerate(zip(ids, longer)) if a != b), len(ids))
            ids, judged = longer, len(longer) - shared
        marks = ids.count(self.processor.image_token_id)
        if marks != len(pictures):
            raise ValueError(
                f"A prompt has {marks} {self.processor.image_token} for {len(pictures)} picture(s): its text must not "
                "contain that mark."
            )
        encoded = [self._encode(*picture) for picture in pictures]
        return _Prompt(ids, [layout for layout, _ in encoded], [kept for _, kept in encoded], judged)

    def _expanded(self, prompt: _Prompt, scale: int) -> list[int]:
        counts = [layout.count(scale) for layout in prompt.layouts]
        sources = expand_placeholders(prompt.ids, self.processor.image_token_id, counts)
        return [prompt.ids[source] for source in sources]

    def _inputs(self, rows: list[torch.Tensor], side: str) -> dict[str, torch.Tensor]:
        pad = self.processor.tokenizer.pad_token_id
        ids = pad_sequence(rows, batch_first=True, padding_value=0 if pad is None else pad, padding_side=side)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side)
        return {"input_ids": ids.to(self.model.device), "attention_mask": mask.to(self.model.device)}

    def _images(self, prompts: list[_Prompt]) -> dict[str, Any]:
        layouts = [layout for prompt in prompts for layout in prompt.layouts]
        if not layouts:
            return {}
        features = torch.cat([kept for prompt in prompts for kept in prompt.features]).to(self.model.device)
        return {"encoded_images": M3LlavaEncodedImages(tile_features=features, layouts=layouts)}

    def _encode(self, picture: Image.Image, is_frame: bool) -> tuple[ImageLayout, torch.Tensor]:
        one_view = is_frame and getattr(self.processor.image_processor, "image_grid_pinpoints", None) is not None
        key = f"{self.key_of(picture)}{' in one view' if one_view else ''}"
        if (found := self._kept.get(key)) is not None:
            self._kept.move_to_end(key)
            return found
        pinpoints = {"image_grid_pinpoints": None} if one_view else self.pinpoints
        inputs = self.processor.image_processor([picture], return_tensors="pt", **pinpoints)
        encoded = self.model.encode_images(
            inputs["pixel_values"].to(self.model.device), inputs.get("image_sizes"), inputs.get("image_tile_grids")
        )
        self.encodings += 1
        result = encoded.layouts[0], encoded.tile_features.cpu()
        self._kept[key] = result
        self._held += result[1].nbytes
        while self._held > self.kept_bytes and len(self._kept) > 1:
            _, (_, oldest) = self._kept.popitem(last=False)
            self._held -= oldest.nbytes
        return result


def _check_greedy(generation: dict[str, Any]) -> None:
    if generation.get("do_sample") or generation.get("num_beams", 1) > 1:
        raise ValueError("This task samples, or searches by beams: signals are kept of greedy answers only.")
