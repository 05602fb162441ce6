"""Who answers in `m3-batch`: vLLM in this process where it is installed, `generate` of transformers where it is not."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Protocol

import torch
from PIL import Image
from transformers import GenerationConfig

import modeling_m3
from modeling_m3.any_checkpoint import find
from modeling_m3.visual_tokens import AUTO, check_num_visual_tokens

from .batch_input import Row
from .engine import check_engine, installed_engine


GENERATE, VLLM = "generate", "vllm"
READERS = 4  # threads that open pictures while others are answered
VLLM_AT_ONCE = 64  # prompts; their pictures are in memory, and as many for the next


@dataclass(frozen=True)
class EngineSettings:
    """What answers depend on.

    Attributes:
        model: a folder, or an id on the Hub.
        engine: "vllm" or "generate".
        num_visual_tokens: per tile, of rows that name none; the checkpoint's default if None.
        max_new_tokens: of an answer.
        batch_size: prompts at once; vLLM decides by itself.
        loading: of `modeling_m3.load`.
        options: of vLLM's `LLM`.
    """

    model: str
    engine: str
    num_visual_tokens: int | str | None = None
    max_new_tokens: int = 128
    batch_size: int = 8
    loading: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Result:
    """What came of a row; all but the error are None where it could not be answered."""

    answer: str | None = None
    num_visual_tokens: int | None = None
    visual_tokens: int | None = None
    prompt_tokens: int | None = None
    answer_tokens: int | None = None
    finish_reason: str | None = None
    error: str | None = None


@dataclass
class _Prompt:
    index: int
    number: int | str
    ids: list[int]  # with one mark per picture
    text: str
    pictures: list[Image.Image]
    visual_tokens: int


class Engine(Protocol):
    """Answers prompts that fit."""

    processor: modeling_m3.M3LlavaProcessor
    context: int

    def answer(self, prompts: list[_Prompt]) -> list[Result]: ...


def choose_engine(wanted: str) -> str:
    """Of "auto", "vllm" and "generate". Raises `ValueError` where vLLM is asked for and cannot run."""
    if wanted == VLLM or (wanted == "auto" and installed_engine() is not None):
        check_engine()
        return VLLM
    return GENERATE


def make_engine(settings: EngineSettings) -> Engine:
    return (VllmEngine if settings.engine == VLLM else GenerateEngine)(settings)


def answer_rows(
    engine: Engine, settings: EngineSettings, rows: Sequence[Row], told: Callable[[int], Any]
) -> list[Result]:
    """What comes of rows, in their order; one that cannot be answered says why.

    Args:
        told: how many more are done.
    """
    results = [Result() for _ in rows]
    with ThreadPoolExecutor(READERS) as readers:
        size = VLLM_AT_ONCE if settings.engine == VLLM else settings.batch_size
        ahead = [readers.submit(_prepared, engine, settings, row) for row in rows[: 2 * size]]
        for start in range(0, len(rows), size):
            found = [future.result() for future in ahead[:size]]
            del ahead[:size]
            later = rows[start + 2 * size : start + 3 * size]
            ahead += [readers.submit(_prepared, engine, settings, row) for row in later]
            prompts = []
            for index, prepared in enumerate(found, start=start):
                if isinstance(prepared, _Prompt):
                    prepared.index = index
                    prompts.append(prepared)
                else:
                    results[index] = prepared
            prompts.sort(key=lambda prompt: str(prompt.number))
            for _, alike in groupby(prompts, key=lambda prompt: str(prompt.number)):
                together = list(alike)
                for prompt, result in zip(together, engine.answer(together), strict=True):
                    results[prompt.index] = result
            told(len(found))
    return results


def _prepared(engine: Engine, settings: EngineSettings, row: Row) -> _Prompt | Result:
    if row.error is not None:
        return Result(error=row.error)
    processor = engine.processor
    try:
        number = row.num_visual_tokens if row.num_visual_tokens is not None else settings.num_visual_tokens
        number = number if number is not None else processor.num_visual_tokens or max(processor.visual_token_scales)
        may_be_auto = settings.engine == GENERATE
        check_num_visual_tokens(number, processor.visual_token_scales, 1, may_be_auto=may_be_auto)
        if processor.image_token in row.question:
            raise ValueError(f"The question contains {processor.image_token}, which stands for a picture.")
    except ValueError as error:
        return _refused(error)
    try:
        pictures = row.opened()
    except Exception as error:  # file systems have errors of their own; it is told in the row
        return _refused(error)
    content = [{"type": "image"}] * len(pictures) + [{"type": "text", "text": row.question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    [ids] = processor.tokenize_prompts([text])
    counted = max(processor.visual_token_scales) if number == AUTO else number
    sizes = [(picture.height, picture.width) for picture in pictures]
    costs = processor._get_num_multimodal_tokens(sizes, num_visual_tokens=counted).num_image_tokens
    length, room = len(ids) - len(pictures) + sum(costs), engine.context - settings.max_new_tokens
    if length > room:
        return Result(
            error=f"The prompt has {length} tokens at num_visual_tokens={number}; {room} fit, of a context of {engine.context} "
            f"and {settings.max_new_tokens} for the answer."
        )
    return _Prompt(0, number, ids, text, pictures, sum(costs))


def _refused(error: Exception) -> Result:
    return Result(error=" ".join(str(error).split()) or type(error).__name__)


def _ends(generation: GenerationConfig) -> set[int]:
    ends = generation.eos_token_id
    return {*(ends if isinstance(ends, list) else [ends])}


class GenerateEngine:
    """`generate`, greedily, in batches of one number of visual tokens."""

    def __init__(self, settings: EngineSettings):
        self.settings = settings
        self.model, self.processor = modeling_m3.load(settings.model, **settings.loading)
        self.model.eval()
        self.context = self.model.config.text_config.max_position_embeddings
        self.ends = _ends(self.model.generation_config)

    @torch.no_grad()
    def answer(self, prompts: list[_Prompt]) -> list[Result]:
        inputs = self.processor(
            images=[prompt.pictures for prompt in prompts],
            text=[prompt.text for prompt in prompts],
            num_visual_tokens=prompts[0].number,
            padding=True,
            padding_side="left",
            return_tensors="pt",
        ).to(self.model.device, self.model.dtype)
        output = self.model.generate(
            **inputs,
            max_new_tokens=self.settings.max_new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
        )
        answers = output.sequences[:, inputs["input_ids"].shape[1] :].tolist()
        automatic, results, first = prompts[0].number == AUTO, [], 0
        for index, (prompt, tokens) in enumerate(zip(prompts, answers)):
            number, spent = prompt.number, prompt.visual_tokens
            if automatic:
                number, spent = int(output.num_visual_tokens[first]), int(output.visual_tokens_spent[index])
            first += len(prompt.pictures)
            results.append(_result(self.processor, prompt, tokens, self.ends, number, spent))
        return results


class VllmEngine:
    """vLLM, greedily; it puts together prompts of any number of visual tokens."""

    def __init__(self, settings: EngineSettings):
        from vllm import LLM, SamplingParams

        checkpoint = find(settings.model, revision=settings.loading.get("revision"))
        self.processor = modeling_m3.M3LlavaProcessor.from_pretrained(checkpoint.folder)
        options = {
            "limit_mm_per_prompt": {"image": 8},
            "mm_processor_cache_gb": 0,  # pictures do not come again
            "dtype": settings.loading.get("dtype") or "auto",
            **settings.options,
        }
        self.llm = LLM(model=str(checkpoint.folder), trust_remote_code=True, **options)
        self.context = self.llm.llm_engine.model_config.max_model_len
        self.sampling = SamplingParams(temperature=0, max_tokens=settings.max_new_tokens)
        self.ends = _ends(GenerationConfig.from_pretrained(checkpoint.folder))

    def answer(self, prompts: list[_Prompt]) -> list[Result]:
        asked = [
            {
                "prompt_token_ids": prompt.ids,
                "multi_modal_data": {"image": prompt.pictures},
                "mm_processor_kwargs": {"num_visual_tokens": prompt.number},
            }
            for prompt in prompts
        ]
        found = self.llm.generate(asked, self.sampling, use_tqdm=False)
        return [
            _result(
                self.processor, prompt, list(one.outputs[0].token_ids), self.ends, prompt.number, prompt.visual_tokens
            )
            for prompt, one in zip(prompts, found)
        ]


def _result(
    processor: modeling_m3.M3LlavaProcessor, prompt: _Prompt, tokens: list[int], ends: set[int], number: Any, spent: int
) -> Result:
    length = next((index for index, token in enumerate(tokens) if token in ends), None)
    return Result(
        answer=processor.decode(tokens[:length], skip_special_tokens=True).strip(),
        num_visual_tokens=number,
        visual_tokens=spent,
        prompt_tokens=len(prompt.ids) - len(prompt.pictures) + prompt.visual_tokens,
        answer_tokens=len(tokens) if length is None else length,
        finish_reason="length" if length is None else "stop",
    )
