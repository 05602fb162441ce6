"""Conversations in LLaVA's format as token ids and labels, masked as the original masks them.

Source: `preprocess_multimodal` and `preprocess` of the original's `llava/train/train.py`, prompts of its
`llava/conversation.py`. They find an answer by counting: each round of a prompt is tokenized again, alone, and the lengths
are laid end to end. Where the sum is not the length of the whole, nothing of the sample is supervised. Both are kept, so
that the labels are the original's. The template "chat_template" is not the original's: it is the checkpoint's own, and
`chat_layout` says what of it is supervised.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import accumulate
from typing import Any

from transformers import PreTrainedTokenizerBase

from modeling_m3 import M3LlavaProcessor

from .chat_layout import ChatTemplate, Turn


IGNORE_INDEX = -100
IMAGE_MARK = "<image>"  # in data, whatever the checkpoint's own token for it


@dataclass(frozen=True)
class Encoded:
    """A conversation, as one sequence of tokens or several.

    Attributes:
        input_ids: with one placeholder per image; sequences one after the other.
        labels: of these tokens.
        mismatch: why nothing is supervised, where that is so.
        lengths: of the sequences, where there are several: each is read alone, and begins with the conversation's first turn.
        adds_end: whether answers end with the tokenizer's end token because the chat template writes no end.
    """

    input_ids: list[int]
    labels: list[int]
    mismatch: str | None = None
    lengths: tuple[int, ...] = ()
    adds_end: bool = False

    @property
    def sequences(self) -> list[tuple[list[int], list[int]]]:
        """The tokens and labels of each sequence."""
        ends = list(accumulate(self.lengths or [len(self.input_ids)]))
        return [(self.input_ids[start:end], self.labels[start:end]) for start, end in zip([0, *ends], ends)]


def encode(
    conversation: Sequence[dict[str, str]], template: str, processor: M3LlavaProcessor, max_length: int | None = None
) -> Encoded:
    """Tokenizes a conversation and masks all but the answers. Placeholders are never supervised.

    Args:
        conversation: turns as `{"from": "human" | "gpt", "value": text}`, with one `<image>` in the text per image. The
            marks of a turn are moved to its start, each with a newline, as the original does, or to where the checkpoint's
            own template puts images. A first turn by gpt is left out, as by the original.
        template: a name of `TEMPLATES`.
        processor: of the checkpoint; its tokenizer must be a fast one.
        max_length: the original compares lengths only in prompts of fewer tokens, an image counted as one.

    Raises:
        ValueError: turns that are not by human and gpt in alternation, or that the template cannot take or does not write
            whole.
    """
    check_template(template)
    turns = [_turn(turn) for turn in conversation]
    if turns and turns[0][0] == "gpt" and template not in ("plain", "v0"):
        turns = turns[1:]
    if not turns:
        raise ValueError("the conversation has no turn by human")
    if template != "v0" and any(speaker != ("human", "gpt")[i % 2] for i, (speaker, _) in enumerate(turns)):
        raise ValueError(f"turns must be by human and gpt in alternation, not {[speaker for speaker, _ in turns]}")
    if template != "chat_template":  # which writes marks of its own
        turns = [(speaker, _marks_first(text).replace(IMAGE_MARK, processor.image_token)) for speaker, text in turns]
    encoded = _ENCODERS[template](turns, processor, max_length)
    labels = [
        IGNORE_INDEX if token == processor.image_token_id else label
        for token, label in zip(encoded.input_ids, encoded.labels)
    ]
    return replace(encoded, labels=labels)


def check_template(template: str) -> None:
    """Raises `ValueError` unless `template` is the name of one."""
    if template not in TEMPLATES:
        raise ValueError(f"template={template!r} is not known: choose from {', '.join(TEMPLATES)}.")


_Turns = list[tuple[str, str]]


def _turn(turn: Any) -> tuple[str, str]:
    if not isinstance(turn, dict) or turn.get("from") not in ("human", "gpt") or not isinstance(turn.get("value"), str):
        raise ValueError(f'a turn must be {{"from": "human" or "gpt", "value": text}}, not {turn!r}')
    if half := re.search("[\ud800-\udfff]", turn["value"]):
        raise ValueError(f"a text holds {half[0]!r}, half of a surrogate pair, which is no character")
    return turn["from"], turn["value"]


def _marks_first(text: str) -> str:
    marks = text.count(IMAGE_MARK)
    if not marks:
        return text
    return (f"{IMAGE_MARK}\n" * marks + text.replace(IMAGE_MARK, "").strip()).strip()


def _count(text: str, processor: M3LlavaProcessor) -> int:
    return len(processor.tokenizer(text)["input_ids"])


def _spaces_after_special_tokens(tokenizer: Any) -> bool:
    """Whether text after a special token is tokenized as it is alone: sentencepiece's `legacy` behaviour."""
    after_end = tokenizer(f"{tokenizer.eos_token}A", add_special_tokens=False)["input_ids"][1:]
    return after_end == tokenizer("A", add_special_tokens=False)["input_ids"]


def _mask_rounds(
    prompt: str,
    rounds: list[str],
    separator: str,
    processor: M3LlavaProcessor,
    max_length: int | None,
    *,
    start: int,
    overlap: int,
    correction: int,
) -> Encoded:
    """Supervises what follows `separator` in each round, up to the first round that does not hold it exactly once.

    Args:
        start: tokens before the first round.
        overlap: tokens of an instruction, tokenized alone, that are not part of it in the prompt: its `<s>`, and the
            space at its end, which belongs to the answer's first token.
        correction: tokens that a later round has in the prompt beyond those it has alone.
    """
    tokenizer = processor.tokenizer
    input_ids = tokenizer(prompt)["input_ids"]
    labels = [IGNORE_INDEX] * len(input_ids)
    end = start
    for index, text in enumerate(rounds):
        parts = text.split(separator)
        if len(parts) != 2:
            break
        shift = correction if index else 0
        answer = end + _count(parts[0] + separator, processor) - overlap + shift
        end += _count(text, processor) + shift
        labels[answer:end] = input_ids[answer:end]
    length = len(input_ids) - input_ids.count(
        tokenizer.unk_token_id
    )  # the original pads with it, and counts no padding
    if end != length and (max_length is None or end < max_length):
        mismatch = f"rounds of {end} tokens make up a prompt of {length}: a turn holds a separator, or has no answer"
        return Encoded(input_ids, [IGNORE_INDEX] * len(input_ids), mismatch)
    return Encoded(input_ids, labels)


def _vicuna(system: str, turns: _Turns, processor: M3LlavaProcessor, max_length: int | None) -> Encoded:
    prompt = f"{system} "
    for speaker, text in turns:
        role, end = ("USER", " ") if speaker == "human" else ("ASSISTANT", "</s>")
        prompt += f"{role}: {text}{end}" if text else f"{role}:"
    correction = 0 if _spaces_after_special_tokens(processor.tokenizer) else -1
    return _mask_rounds(
        prompt,
        prompt.split("</s>"),
        " ASSISTANT: ",
        processor,
        max_length,
        start=1,
        overlap=2,
        correction=correction,
    )


def _llama_2(system: str, turns: _Turns, processor: M3LlavaProcessor, max_length: int | None) -> Encoded:
    if not turns[0][1]:
        raise ValueError("the first turn is empty, and llama_2 writes its system text there")
    prompt = ""
    for index, (speaker, text) in enumerate(turns):
        if text and speaker == "human":
            text = text if index else f"<<SYS>>\n{system}\n<</SYS>>\n\n{text}"
            prompt += f"<s>[INST] {text} [/INST]"
        elif text:
            prompt += f" {text} </s>"
    prompt = prompt.lstrip("<s>")  # any of these characters, as the original does; the tokenizer adds the first `<s>`
    rounds = prompt.split("</s>")
    return _mask_rounds(prompt, rounds, "[/INST] ", processor, max_length, start=1, overlap=2, correction=0)


def _mpt(turns: _Turns, processor: M3LlavaProcessor, max_length: int | None) -> Encoded:
    end = "<|im_end|>"
    prompt = f"<|im_start|>system\n{_MPT_SYSTEM}{end}"
    for speaker, text in turns:
        role = "<|im_start|>user\n" if speaker == "human" else "<|im_start|>assistant\n"
        prompt += f"{role}{text}{end}" if text else role
    pieces = prompt.split(end)
    rounds = [end.join(pieces[:3])] + [end.join(pieces[i : i + 2]) for i in range(3, len(pieces), 2)]
    separator = f"{end}<|im_start|>assistant\n"
    correction = 1 if _spaces_after_special_tokens(processor.tokenizer) else 0
    return _mask_rounds(prompt, rounds, separator, processor, max_length, start=0, overlap=1, correction=correction)


def _plain(turns: _Turns, processor: M3LlavaProcessor, max_length: int | None) -> Encoded:
    """An image and its caption: the question is dropped (pretraining of the projector)."""
    images = processor.image_token * turns[0][1].count(processor.image_token)
    if len(turns) != 2 or not images:
        raise ValueError("the template plain takes one question with an <image> and one answer")
    input_ids = processor.tokenizer(f"{images}{turns[1][1]}\n")["input_ids"]
    masked = _count(images, processor)
    return Encoded(input_ids, [IGNORE_INDEX] * masked + input_ids[masked:])


def _v0(turns: _Turns, processor: M3LlavaProcessor, max_length: int | None) -> Encoded:
    header = f"{_HUMAN_ASSISTANT}\n\n"
    texts = [f"### {'Human' if speaker == 'human' else 'Assistant'}: {text}\n" for speaker, text in turns]
    labels = processor.tokenizer("".join([header, *texts, "### "]))["input_ids"]
    input_ids = list(labels)
    position = _count(header, processor)
    masked = list(range(position))
    for (speaker, _), text in zip(turns, texts):
        length = _count(text, processor)
        masked += range(position + 2, position + length) if speaker == "human" else ()
        position += length
    for index in masked:
        if index < len(labels):
            labels[index] = IGNORE_INDEX
    return Encoded(input_ids, labels)


def _chat_template(turns: _Turns, processor: M3LlavaProcessor, max_length: int | None) -> Encoded:
    """The checkpoint's own."""
    template = _own_template(processor.tokenizer, _default_template(processor), processor.image_token)
    roles = {"human": "user", "gpt": "assistant"}
    chat = [
        Turn(roles[speaker], text.replace(IMAGE_MARK, "").strip() if images else text, images)
        for speaker, text in turns
        for images in [text.count(IMAGE_MARK)]
    ]
    written = template.write(chat)
    sequences = [_mask_characters(one.text, one.answers, processor.tokenizer, template.special_ids) for one in written]
    lengths = tuple(len(input_ids) for input_ids, _ in sequences)
    return Encoded(
        [token for input_ids, _ in sequences for token in input_ids],
        [label for _, labels in sequences for label in labels],
        mismatch=None if any(one.answers for one in written) else "no answer has a text",
        lengths=lengths if len(lengths) > 1 else (),
        adds_end=any(one.adds_end for one in written),
    )


def _default_template(processor: M3LlavaProcessor) -> str | None:
    """The checkpoint's; of several that have names, the one that is used where none is named."""
    template = processor.chat_template
    if not isinstance(template, dict):
        return template
    if "default" not in template:
        raise ValueError(
            f"the checkpoint has the chat templates {', '.join(template)}, and none of them is called default"
        )
    return template["default"]


@lru_cache(maxsize=4)
def _own_template(tokenizer: PreTrainedTokenizerBase, template: str | None, image_token: str) -> ChatTemplate:
    if template is None:
        raise ValueError(
            f"the checkpoint has no chat template: choose another template from {', '.join(TEMPLATES[1:])}"
        )
    return ChatTemplate(tokenizer, template, image_token)


def _mask_characters(
    text: str, answers: list[range], tokenizer: PreTrainedTokenizerBase, special_ids: set[int]
) -> tuple[list[int], list[int]]:
    """The tokens of a text, and labels of those that hold a character of an answer."""
    starts_with_bos = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    encoding = tokenizer(text, add_special_tokens=not starts_with_bos, return_offsets_mapping=True)
    input_ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
    labels = [IGNORE_INDEX] * len(input_ids)
    index = 0
    for answer in answers:
        # A space at the end of a prompt may be in the answer's first token, and a token of no characters before it. A special
        # token at the end of a prompt may hold white space that an answer begins with.
        while (
            index < len(offsets)
            and offsets[index][0] < answer.start
            and (offsets[index][1] <= answer.start or input_ids[index] in special_ids)
        ):
            index += 1
        while index < len(offsets) and offsets[index][0] < answer.stop and answer.start <= offsets[index][1]:
            labels[index] = input_ids[index]
            index += 1
    return input_ids, labels


_HUMAN_ASSISTANT = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
_USER_ASSISTANT = _HUMAN_ASSISTANT.replace("human", "user")
_LLAVA_LLAMA_2_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
_LLAMA_2_SYSTEM = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  Your "
    "answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. Please "
    "ensure that your responses are socially unbiased and positive in nature.\n\nIf a question does not make any sense, or "
    "is not factually coherent, explain why instead of answering something not correct. If you don't know the answer to a "
    "question, please don't share false information."
)
_MPT_SYSTEM = (
    "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."
)

_ENCODERS: dict[str, Callable[[_Turns, M3LlavaProcessor, int | None], Encoded]] = {
    "chat_template": _chat_template,
    "v1": partial(_vicuna, _USER_ASSISTANT),
    "llava_v1": partial(_vicuna, _HUMAN_ASSISTANT),
    "llama_2": partial(_llama_2, _LLAMA_2_SYSTEM),
    "llava_llama_2": partial(_llama_2, _LLAVA_LLAMA_2_SYSTEM),
    "mpt": _mpt,
    "plain": _plain,
    "v0": _v0,
}
TEMPLATES = tuple(_ENCODERS)
"""The original's conversation templates by its names, and "chat_template", the checkpoint's own."""
