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
from modeling_m3.any_checkpoint import M3Checkpoint, find
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

    def find(self) -> M3Checkpoint:
        """The checkpoint, converted where it is no M3 yet: once, as it is loaded."""
        names = ("revision",) if self.engine == VLLM else ("revision", "dtype", "quantize")  # vLLM has its own dtype
        return find(self.model, **{name: value for name, value in self.loading.items() if name in names})


@dataclass
class Result:
    """What came of a row; all but the error are None where it could not be answered.

    `num_visual_tokens` is None too where pictures of the row have several numbers, or there is none.
    """

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
    numbers: list[int | str]  # of visual tokens, one per picture
    ids: list[int]  # with one mark per picture
    text: str
    pictures: list[Image.Image]
    visual_tokens: int

    @property
    def kind(self) -> int | str | None:
        """What prompts that are answered together have in common: their number, where all pictures have one."""
        return None if not self.numbers else self.numbers[0] if len({*self.numbers}) == 1 else str(self.numbers)

    @property
    def number(self) -> int | str | None:
        return self.kind if self.kind in self.numbers else None


class Engine(Protocol):
    """Answers prompts that fit."""

    processor: modeling_m3.M3LlavaProcessor
    context: int | None

    def answer(self, prompts: list[_Prompt]) -> list[Result]: ...


def choose_engine(wanted: str) -> str:
    """Of "auto", "vllm" and "generate". Raises `ValueError` where vLLM is asked for and cannot run."""
    if wanted == VLLM or (wanted == "auto" and installed_engine() is not None):
        check_engine()
        return VLLM
    return GENERATE


def make_engine(settings: EngineSettings, checkpoint: M3Checkpoint | None = None) -> Engine:
    """Loads the checkpoint, which is found by the settings where it is not given."""
    return (VllmEngine if settings.engine == VLLM else GenerateEngine)(settings, checkpoint)


def answer_rows(
    engine: Engine, settings: EngineSettings, rows: Sequence[Row], told: Callable[[int], Any]
) -> list[Result]:
    """What comes of rows, in their order; one that cannot be answered says why.

    Threads open pictures; all that tokenizes is done by this one, since a tokenizer's padding is a state of its own.

    Args:
        told: how many more are done.
    """
    results = [Result() for _ in rows]
    size = VLLM_AT_ONCE if settings.engine == VLLM else settings.batch_size
    readers = ThreadPoolExecutor(READERS)
    try:
        ahead = [readers.submit(_read, engine, settings, row) for row in rows[: 2 * size]]
        for start in range(0, len(rows), size):
            found = [future.result() for future in ahead[:size]]
            del ahead[:size]
            later = rows[start + 2 * size : start + 3 * size]
            ahead += [readers.submit(_read, engine, settings, row) for row in later]
            prompts = []
            for index, read in enumerate(found, start=start):
                prepared = read if isinstance(read, Result) else _prepared(engine, settings, rows[index], *read)
                if isinstance(prepared, _Prompt):
                    prepared.index = index
                    prompts.append(prepared)
                else:
                    results[index] = prepared
            prompts.sort(key=lambda prompt: str(prompt.kind))
            for _, alike in groupby(prompts, key=lambda prompt: str(prompt.kind)):
                together = list(alike)
                for prompt, result in zip(together, _answered(engine, together), strict=True):
                    results[prompt.index] = result
            told(len(found))
    finally:
        readers.shutdown(cancel_futures=True)
    return results


def _read(engine: Engine, settings: EngineSettings, row: Row) -> tuple[list[int | str], list[Image.Image]] | Result:
    """A row's numbers of visual tokens and its pictures."""
    if row.error is not None:
        return Result(error=row.error)
    try:
        numbers = _numbers(engine.processor, settings, row)
        if engine.processor.image_token in row.question:
            raise ValueError(f"The question contains {engine.processor.image_token}, which stands for a picture.")
        return numbers, row.opened()
    except Exception as error:  # file systems have errors of their own; it is told in the row
        return _refused(error)


def _numbers(processor: modeling_m3.M3LlavaProcessor, settings: EngineSettings, row: Row) -> list[int | str]:
    """One per picture: its own, the row's, the command's or the checkpoint's. A row's is checked without pictures too."""
    scales, may_be_auto = processor.visual_token_scales, settings.engine == GENERATE
    default = next((n for n in (row.num_visual_tokens, settings.num_visual_tokens) if n is not None), None)
    numbers = [default if number is None else number for number in row.numbers or [None] * len(row.pictures)]
    found = []
    for number in [default, *numbers]:
        if not may_be_auto:
            number = processor._number_for_an_engine(number)
        if number is None:
            number = processor.num_visual_tokens or max(scales)
        check_num_visual_tokens(number, scales, 1, may_be_auto=may_be_auto)
        found.append(number)
    numbers = found[1:]
    if not may_be_auto and len({*numbers}) > 1:
        raise ValueError(f"num_visual_tokens={numbers}: vLLM has one number for all pictures of a row.")
    return numbers


def _prepared(
    engine: Engine, settings: EngineSettings, row: Row, numbers: list[int | str], pictures: list[Image.Image]
) -> _Prompt | Result:
    processor = engine.processor
    try:
        content = [{"type": "image"}] * len(pictures) + [{"type": "text", "text": row.question}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        [ids] = processor.tokenize_prompts([text])
        counted = [max(processor.visual_token_scales) if number == AUTO else number for number in numbers]
        sizes = [(picture.height, picture.width) for picture in pictures]
        spent = sum(processor._get_num_multimodal_tokens(sizes, num_visual_tokens=counted).num_image_tokens)
    except Exception as error:  # of this row's question or pictures; it is told in the row
        return _refused(error)
    length = len(ids) - len(pictures) + spent
    prompt = _Prompt(0, numbers, ids, text, pictures, spent)
    if engine.context is not None and length > (room := engine.context - settings.max_new_tokens):
        at = f" at num_visual_tokens={prompt.kind}" if pictures else ""
        return Result(
            error=f"The prompt has {length} tokens{at}; {room} fit, of a context of {engine.context} and "
            f"{settings.max_new_tokens} for the answer."
        )
    return prompt


def _answered(engine: Engine, prompts: list[_Prompt]) -> list[Result]:
    """The answers; where a prompt is refused, those of each by itself, and why of that one."""
    try:
        return engine.answer(prompts)
    except ValueError as error:
        if len(prompts) == 1:
            return [_refused(error)]
        return [result for prompt in prompts for result in _answered(engine, [prompt])]


def _refused(error: Exception) -> Result:
    return Result(error=" ".join(str(error).split()) or type(error).__name__)


def _ends(generation: GenerationConfig) -> set[int]:
    ends = generation.eos_token_id
    return {*(ends if isinstance(ends, list) else [ends])}


class GenerateEngine:
    """`generate`, greedily, in batches of one number of visual tokens."""

    def __init__(self, settings: EngineSettings, checkpoint: M3Checkpoint | None = None):
        self.settings = settings
        device = {name: value for name, value in settings.loading.items() if name == "device_map"}
        self.model, self.processor = (checkpoint or settings.find()).load(**device)
        self.model.eval()
        self.context = self.model.config.context_length
        self.ends = _ends(self.model.generation_config)

    @torch.no_grad()
    def answer(self, prompts: list[_Prompt]) -> list[Result]:
        shown = {}
        if prompts[0].pictures:
            numbers = [number for prompt in prompts for number in prompt.numbers]
            shown = {
                "images": [prompt.pictures for prompt in prompts],
                "num_visual_tokens": numbers if prompts[0].number is None else prompts[0].number,
            }
        inputs = self.processor(
            text=[prompt.text for prompt in prompts],
            **shown,
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
        automatic, results, first = AUTO in prompts[0].numbers, [], 0
        for index, (prompt, tokens) in enumerate(zip(prompts, answers)):
            numbers, spent = prompt.numbers, prompt.visual_tokens
            if automatic:
                numbers = output.num_visual_tokens[first : first + len(numbers)].tolist()
                spent = int(output.visual_tokens_spent[index])
            first += len(prompt.pictures)
            results.append(_result(self.processor, prompt, tokens, self.ends, numbers, spent))
        return results


class VllmEngine:
    """vLLM, greedily; it puts together prompts of any number of visual tokens."""

    def __init__(self, settings: EngineSettings, checkpoint: M3Checkpoint | None = None):
        from vllm import LLM, SamplingParams

        checkpoint = checkpoint or settings.find()
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
        asked = [{"prompt_token_ids": prompt.ids} | _shown_to_vllm(prompt) for prompt in prompts]
        found = self.llm.generate(asked, self.sampling, use_tqdm=False)
        answers = [list(one.outputs[0].token_ids) for one in found]
        return [
            _result(self.processor, prompt, tokens, self.ends, prompt.numbers, prompt.visual_tokens)
            for prompt, tokens in zip(prompts, answers, strict=True)
        ]


def _shown_to_vllm(prompt: _Prompt) -> dict[str, Any]:
    if not prompt.pictures:
        return {}
    number = {"num_visual_tokens": prompt.number}
    return {"multi_modal_data": {"image": prompt.pictures}, "mm_processor_kwargs": number}


def _result(
    processor: modeling_m3.M3LlavaProcessor,
    prompt: _Prompt,
    tokens: list[int],
    ends: set[int],
    numbers: list[int],
    spent: int,
) -> Result:
    length = next((index for index, token in enumerate(tokens) if token in ends), None)
    return Result(
        answer=processor.decode(tokens[:length], skip_special_tokens=True).strip(),
        num_visual_tokens=numbers[0] if len({*numbers}) == 1 else None,
        visual_tokens=spent,
        prompt_tokens=len(prompt.ids) - len(prompt.pictures) + prompt.visual_tokens,
        answer_tokens=len(tokens) if length is None else length,
        finish_reason="length" if length is None else "stop",
    )
