"""Which questions a checkpoint answers exactly, at every scale.

An answer counts if greedy generation would write it to the letter and end there. That is known from one pass with the
right answer given, since every token of it must be the likeliest after those before it; and all questions about a
picture share one prefix of visual tokens, each seeing that prefix and itself alone. So a test set takes minutes, and
`tests/test_m3_tiny.py` checks that `generate` agrees.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from modeling_m3 import M3LlavaForConditionalGeneration, M3LlavaProcessor
from modeling_m3.visual_tokens import expand_placeholders

from .scenes import Question


@dataclass
class Answers:
    """Whether each question is answered correctly at each scale.

    Attributes:
        kinds: (questions,), of `Question.kind`.
        scales: (scales,), ascending.
        correct: (questions, scales) bool.
    """

    kinds: np.ndarray
    scales: list[int]
    correct: np.ndarray

    def summary(self) -> dict[str, dict[str, Any]]:
        """By kind of question: how many there are, how many are answered at each scale, and the oracle's row.

        The oracle takes the fewest tokens that answer a question correctly. A question that no scale answers counts with
        the fewest, as the paper's authors do (Table 2).
        """
        result = {}
        for kind in dict.fromkeys(self.kinds.tolist()):
            hits = self.correct[self.kinds == kind]
            first = np.where(hits.any(1), hits.argmax(1), 0)
            result[kind] = {
                "questions": len(hits),
                "correct": dict(zip(map(str, self.scales), hits.sum(0).tolist())),
                "oracle": {"correct": int(hits.any(1).sum()), "tokens": int(np.array(self.scales)[first].sum())},
            }
        return result


@torch.no_grad()
def evaluate(
    model: M3LlavaForConditionalGeneration,
    processor: M3LlavaProcessor,
    pictures: Iterable[tuple[Image.Image, list[Question]]],
    scales: Sequence[int],
    samplings: Sequence[str] = ("average",),
    batch_size: int = 16,
) -> dict[str, Answers]:
    """Asks every question about every picture at every scale, in every way to make its tokens; by that way."""
    scales = sorted(scales)
    kinds: list[str] = []
    correct: dict[str, list[tuple[bool, ...]]] = {sampling: [] for sampling in samplings}
    progress = tqdm(desc="pictures", unit="", mininterval=5)
    for batch in _batches(pictures, batch_size):
        questions = [asked for _, asked in batch]
        kinds += [question.kind for asked in questions for question in asked]
        pixel_values = processor.image_processor([picture for picture, _ in batch], return_tensors="pt")["pixel_values"]
        encoded = model.encode_images(pixel_values.to(model.device))
        finest = None
        for sampling in samplings:
            columns = []
            for scale in scales:
                if scale == max(processor.visual_token_scales) and finest is not None:
                    columns.append(finest)  # there is nothing to sample
                    continue
                features = model.get_visual_tokens(encoded, scale, sampling)
                columns.append(_answered(model, processor, questions, features))
                if scale == max(processor.visual_token_scales):
                    finest = columns[-1]
            correct[sampling] += zip(*columns)
        progress.update(len(batch))
    progress.close()
    return {sampling: Answers(np.array(kinds), scales, np.array(hits)) for sampling, hits in correct.items()}


def _answered(
    model: M3LlavaForConditionalGeneration,
    processor: M3LlavaProcessor,
    questions: list[list[Question]],
    features: list[torch.Tensor],
) -> list[bool]:
    """One bool per question, given every picture's visual tokens, (n, d)."""
    layouts = [layout_of(processor, asked, len(image)) for asked, image in zip(questions, features)]
    length = max(len(layout["ids"]) for layout in layouts)
    rows = len(layouts)
    ids = torch.full((rows, length), processor.tokenizer.pad_token_id)
    positions, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    groups = torch.full_like(ids, -1)
    for row, layout in enumerate(layouts):
        for name, target in (("ids", ids), ("positions", positions), ("labels", labels), ("groups", groups)):
            target[row, : len(layout[name])] = torch.tensor(layout[name])
    ids, positions, labels, groups = (tensor.to(model.device) for tensor in (ids, positions, labels, groups))
    # Group 0, the prefix, is seen by all that follow; any other group by itself alone. Padding sees itself.
    same = groups[:, :, None] == groups[:, None, :]
    allowed = (same | (groups[:, None, :] == 0)) & torch.ones_like(same[0]).tril()
    mask = torch.zeros_like(allowed, dtype=model.dtype).masked_fill(~allowed, torch.finfo(model.dtype).min)
    embeds = model.get_input_embeddings()(ids)
    embeds[ids == processor.image_token_id] = torch.cat(features).to(embeds.dtype)
    hidden = model.model.language_model(
        inputs_embeds=embeds, attention_mask=mask[:, None], position_ids=positions, use_cache=False
    ).last_hidden_state
    target = labels[:, 1:]
    row, column = torch.where(target != -100)
    right = model.lm_head(hidden[row, column]).argmax(-1) == target[row, column]
    answers = [[True] * len(asked) for asked in questions]
    for r, group, ok in zip(row.tolist(), groups[row, column + 1].tolist(), right.tolist()):
        answers[r][group - 1] &= ok
    return [ok for asked in answers for ok in asked]


def layout_of(processor: M3LlavaProcessor, questions: list[Question], num_tokens: int) -> dict[str, list[int]]:
    """The picture's sequence: what all questions' prompts begin with, then the rest of each."""
    prompts = [_prompt(processor, question, num_tokens) for question in questions]
    ids = [prompt for prompt, _ in prompts]
    shared = min(len(commonprefix(ids)), min(map(len, ids)) - 1)  # every question keeps a token of its own
    layout: dict[str, list[int]] = {
        "ids": prompts[0][0][:shared],
        "positions": list(range(shared)),
        "labels": [-100] * shared,
        "groups": [0] * shared,
    }
    for number, (prompt, answer) in enumerate(prompts, start=1):
        rest = prompt[shared:]
        layout["ids"] += rest + answer
        layout["positions"] += range(shared, shared + len(rest) + len(answer))
        layout["labels"] += [-100] * len(rest) + answer
        layout["groups"] += [number] * (len(rest) + len(answer))
    return layout


def _prompt(processor: M3LlavaProcessor, question: Question, num_tokens: int) -> tuple[list[int], list[int]]:
    """(token ids of the prompt with its placeholders, of the answer and the end of turn)."""
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]}
    ]
    tokenizer = processor.tokenizer
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    ids, answer = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (text, question.answer))
    sources = expand_placeholders(ids, processor.image_token_id, [num_tokens])
    return [ids[i] for i in sources], [*answer, tokenizer.eos_token_id]


def _batches(items: Iterable, size: int) -> Iterator[list]:
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
