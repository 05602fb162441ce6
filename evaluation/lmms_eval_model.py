"""M3 for lmms-eval, by its entry point: `python -m lmms_eval --model m3 --model_args pretrained=DIR,num_visual_tokens=36`.

Generation tasks use the chat interface; lmms-eval's likelihood tasks have the simple one, which `--force_simple` chooses.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from tqdm import tqdm

import modeling_m3

from .answering import KEPT_BYTES, Answer, Answerer, Chat
from .pinpoints import parse_pinpoints


# Of `generate`, what tasks set; the rest of their settings is ours to follow ("until") or says nothing here.
GENERATION = ("max_new_tokens", "temperature", "top_p", "top_k", "num_beams", "do_sample", "repetition_penalty")
MAX_NEW_TOKENS = 1024  # where a task says nothing


def manifest() -> ModelManifest:
    """What lmms-eval reads from the entry point."""
    return ModelManifest("m3", simple_class_path=f"{__name__}.M3Simple", chat_class_path=f"{__name__}.M3")


class M3(lmms):
    """An M3, or any LLaVA, at one number of visual tokens.

    Args:
        pretrained: a folder or a Hub id, as `modeling_m3.load` takes it.
        num_visual_tokens: per tile, or "auto"; the checkpoint's default if left out.
        image_grid_pinpoints: HEIGHTxWIDTH in pixels, several joined by "+"; the checkpoint's if left out.
        visual_token_sampling: the checkpoint's if left out.
        batch_size: prompts at once.
        dtype: as "bfloat16"; as stored if left out.
        device, device_map: where the model runs. In several processes, each has a device of its own.
        load_in_4bit, load_in_8bit: the language model's layers, by bitsandbytes.
        attn_implementation, revision: of `from_pretrained`.
        kept_bytes: of encoded pictures that are kept for further questions about them.
        num_frames, fps, video_layout, add_timestamps: of videos, as the processor takes them. `num_visual_tokens` is then for
            each frame.

    Raises:
        ValueError: for an argument that is none of these, and for a number that the checkpoint does not offer.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        num_visual_tokens: int | str | None = None,
        image_grid_pinpoints: str | None = None,
        visual_token_sampling: str | None = None,
        batch_size: int | str | None = 1,
        dtype: str | None = None,
        device: str | None = None,
        device_map: str | None = None,
        load_in_4bit: bool = False,
        load_in_8bit: bool = False,
        attn_implementation: str | None = None,
        revision: str | None = None,
        kept_bytes: int = KEPT_BYTES,
        num_frames: int | None = None,
        fps: float | None = None,
        video_layout: str | None = None,
        add_timestamps: bool | None = None,
        max_batch_size: int | None = None,
        trust_remote_code: bool = True,
        **unknown: Any,
    ):
        super().__init__()
        if unknown:
            raise ValueError(f"{', '.join(unknown)}: no argument of the model m3 in lmms-eval.")
        if not str(batch_size or 1).isdecimal() or int(batch_size or 1) < 1:
            raise ValueError(f"batch_size={batch_size!r} must be a number of prompts from 1.")
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if device_map is None and (self._world_size > 1 or device is None):
            device_map = self.accelerator.device
        quantize = "nf4" if load_in_4bit else "int8" if load_in_8bit else None
        attention = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
        model, processor = modeling_m3.load(
            pretrained,
            quantize=quantize,
            dtype=None if dtype == "auto" else dtype,
            revision=revision,
            device_map=device_map or device,
            **attention,
        )
        pinpoints = parse_pinpoints(image_grid_pinpoints)
        video = {"num_frames": num_frames, "fps": fps, "video_layout": video_layout, "add_timestamps": add_timestamps}
        self.answerer = Answerer(model, processor, pinpoints, visual_token_sampling, int(kept_bytes), video=video)
        default = processor.num_visual_tokens or max(processor.visual_token_scales)
        [self.scale] = self.answerer.scales([num_visual_tokens or default])
        self.batch_size = int(batch_size or 1)

    @property
    def device(self) -> torch.device:
        return self.answerer.model.device

    @property
    def config(self) -> modeling_m3.M3LlavaConfig:
        return self.answerer.model.config

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        results: dict[int, GenerationResult] = {}
        for batch, settings in self._batches(requests):
            answers = self.answerer.answer(
                [self.chat(requests[i]) for i in batch], [self.scale], **generation(settings)
            )
            for index, [answer] in zip(batch, answers):
                results[index] = as_result(answer, settings)
        return [results[index] for index in range(len(requests))]

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        results: list[GenerationResult] = []
        for batch, _ in self._batches(requests):
            chats, continuations = zip(*(self.likelihood_chat(requests[index]) for index in batch))
            found = self.answerer.likelihoods(chats, continuations, [self.scale])
            results += [as_likelihood(asdict(likelihood)) for [likelihood] in found]
        return results

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError(f"{requests[0].task_name} asks in several rounds, which the model m3 cannot yet.")

    def chat(self, request: Instance) -> Chat:
        """The messages of a generation request, pictures as they are."""
        _, doc_to_messages, _, doc_id, task, split = request.args
        messages = doc_to_messages(self.task_dict[task][split][doc_id])
        return [{"role": m["role"], "content": [_content(part) for part in m["content"]]} for m in messages]

    def likelihood_chat(self, request: Instance) -> tuple[Chat, str]:
        """The messages of a likelihood request, and the continuation that it asks about."""
        context, continuation, *rest = request.args
        if not rest:  # asked without the document
            return [{"role": "user", "content": [{"type": "text", "text": context}]}], continuation
        doc_to_visual, doc_id, task, split = rest
        doc = self.task_dict[task][split][doc_id]
        if callable(continuation):
            continuation = continuation(doc)
        return self._simple_chat(context, doc_to_visual(doc)), str(continuation)

    def _simple_chat(self, context: str, pictures: Sequence[Any]) -> Chat:
        """Pictures stand where the text has marks for them; before it, where it has not as many."""
        mark = self.answerer.processor.image_token
        parts = context.split(mark)
        if len(parts) - 1 != len(pictures) or not pictures:
            parts = [*[""] * len(pictures), context.replace(mark, "")]
        content = [{"type": "text", "text": parts[0]}]
        for picture, text in zip(pictures, parts[1:]):
            kind = "video" if isinstance(picture, str) else "image"  # lmms-eval names the files of videos
            content += [{"type": kind, kind: picture}, {"type": "text", "text": text}]
        return [{"role": "user", "content": [part for part in content if part.get("text") != ""]}]

    def _batches(self, requests: list[Instance]) -> Iterator[tuple[list[int], dict[str, Any]]]:
        return batches([settings_of(request) for request in requests], self.batch_size, disable=self.rank != 0)


class M3Simple(M3):
    """The same through lmms-eval's simple interface, for likelihood tasks."""

    is_simple = True

    def chat(self, request: Instance) -> Chat:
        context, _, doc_to_visual, doc_id, task, split = request.args
        return self._simple_chat(context, doc_to_visual(self.task_dict[task][split][doc_id]))


def batches(
    settings: Sequence[dict[str, Any]], size: int, disable: bool = False, desc: str | None = None
) -> Iterator[tuple[list[int], dict[str, Any]]]:
    """Indices of requests with equal settings, `size` at most, in their order; and the settings. Shows progress."""
    keys = [json.dumps(entry, sort_keys=True, default=str) for entry in settings]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    progress = tqdm(total=len(keys), desc=desc or "m3", unit="question", disable=disable or None)
    for _, group in groupby(order, key=keys.__getitem__):
        indices = list(group)
        for start in range(0, len(indices), size):
            batch = indices[start : start + size]
            yield batch, settings[batch[0]]
            progress.update(len(batch))
    progress.close()


def settings_of(request: Instance) -> dict[str, Any]:
    """What a task sets for generation; nothing for a likelihood."""
    return next((dict(argument) for argument in request.args if isinstance(argument, dict)), {})


def generation(settings: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `generate`: greedy unless a task asks for a temperature or to sample."""
    asked = {name: settings[name] for name in GENERATION if settings.get(name) is not None}
    samples = bool(asked.pop("do_sample", False) or asked.get("temperature", 0) > 0)
    if not samples:
        asked = {name: value for name, value in asked.items() if name not in ("temperature", "top_p", "top_k")}
    return {"max_new_tokens": MAX_NEW_TOKENS, **asked, "do_sample": samples}


def cut(text: str, settings: dict[str, Any]) -> str:
    """The text before the first of the strings that a task ends answers at."""
    until = settings.get("until") or []
    for end in [until] if isinstance(until, str) else until:
        if end:
            text = text.split(end)[0]
    return text.strip()


def as_likelihood(found: dict[str, Any]) -> GenerationResult:
    """In lmms-eval 0.7.3 a pair of numbers is only left what it is where it is wrapped like a text; else it becomes one."""
    return GenerationResult((found["log_probability"], found["is_greedy"]))


def as_result(answer: Answer, settings: dict[str, Any]) -> GenerationResult:
    counts = TokenCounts(answer.visual_tokens + answer.text_tokens, answer.answer_tokens)
    return GenerationResult(cut(answer.text, settings), counts)


def _content(part: dict[str, Any]) -> dict[str, Any]:
    kind = part["type"]
    if kind in ("image", "video"):
        return {"type": kind, kind: part.get("url", part.get(kind))}
    if part["type"] == "text":
        return {"type": "text", "text": part["text"]}
    raise ValueError(f"A task asks about {part['type']}: the model m3 sees pictures and videos only.")
