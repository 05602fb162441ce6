"""What the choice of visual tokens is fitted on: how right every question is answered at every scale, and what each pass knew.

All questions about a picture share what their prompts begin with, the picture included, which is computed once for each scale.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from os.path import commonprefix
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from m3_evaluation.runs import read_run, read_samples, read_task, task_file
from m3_evaluation.scores import judge_anew
from m3_evaluation.signals import PROBE_TOKENS, read_task_signals
from modeling_m3 import M3LlavaForConditionalGeneration, M3LlavaProcessor
from modeling_m3.automatic_budget_m3 import Confidence, read_signals
from modeling_m3.outputs_m3 import CACHE_NAME
from modeling_m3.visual_tokens import expand_placeholders

from .budget_data import AskedPictures


@dataclass
class Samples:
    """Outcomes of n questions at s scales, with signals of width w.

    Attributes:
        scales: (s,) ascending.
        scores: (n, s) float32, between 0 and 1.
        tokens: (n, s) visual tokens of each prompt.
        signals: (n, s, w) float16, what the language model held at the end of the question after a pass at each scale.
        confidences: (n, s, c) float32, of the answer, see `Confidence`.
        kinds: (n,) kinds of questions.
        groups: (n,) what each question is about.
    """

    scales: np.ndarray
    scores: np.ndarray
    tokens: np.ndarray
    signals: np.ndarray
    confidences: np.ndarray
    kinds: np.ndarray
    groups: np.ndarray

    def __len__(self) -> int:
        return len(self.scores)

    def rows(self, chosen: np.ndarray) -> "Samples":
        """Some of the questions."""
        kept = {field.name: getattr(self, field.name) for field in fields(self)}
        return Samples(**{name: value if name == "scales" else value[chosen] for name, value in kept.items()})

    def save(self, file: Path) -> None:
        """Writes them; kinds and groups as UTF-8."""
        arrays = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in ("kinds", "groups"):
            arrays[name] = np.frombuffer("\n".join(arrays[name]).encode(), dtype=np.uint8)
        save_file({name: np.ascontiguousarray(value) for name, value in arrays.items()}, file)

    @classmethod
    def load(cls, file: Path) -> "Samples":
        arrays = load_file(file)
        for name in ("kinds", "groups"):
            arrays[name] = np.array(arrays[name].tobytes().decode().split("\n"))
        return cls(**arrays)

    @classmethod
    def joined(cls, parts: Sequence["Samples"]) -> "Samples":
        """All questions of several."""
        together = {
            field.name: np.concatenate([getattr(part, field.name) for part in parts])
            for field in fields(cls)
            if field.name != "scales"
        }
        return cls(scales=parts[0].scales, **together)


@torch.no_grad()
def ask(
    model: M3LlavaForConditionalGeneration,
    processor: M3LlavaProcessor,
    asked: AskedPictures,
    score: Callable[[str, list[str]], float],
    max_new_tokens: int,
) -> Samples:
    """Answers all questions of a picture greedily at every scale.

    Args:
        score: of an answer and what counts as right, between 0 and 1.
        max_new_tokens: of an answer.
    """
    scales = processor.visual_token_scales  # ascending
    prompts = [prompt_ids(processor, question, len(asked.pictures)) for question in asked.questions]
    inputs = processor.image_processor(asked.pictures, return_tensors="pt")
    encoded = model.encode_images(
        inputs["pixel_values"].to(model.device), inputs.get("image_sizes"), inputs.get("image_tile_grids")
    )
    scores, tokens, confidences, signals = [], [], [], []
    for scale in scales:
        features = model.get_visual_tokens(encoded, scale)
        counts = [len(image) for image in features]
        rows = []
        for prompt in prompts:
            ids = [prompt[i] for i in expand_placeholders(prompt, processor.image_token_id, counts)]
            rows.append(ids)
        answers, signal, confidence = _answer(model, processor, rows, torch.cat(features), max_new_tokens)
        scores.append([score(answer, right) for answer, right in zip(answers, asked.answers)])
        tokens.append([sum(counts)] * len(rows))
        signals.append(signal.half().cpu().numpy())
        confidences.append(confidence.cpu().numpy())
    return Samples(
        scales=np.array(scales),
        scores=np.array(scores, dtype=np.float32).T,
        tokens=np.array(tokens, dtype=np.int32).T,
        signals=np.stack(signals, axis=1),
        confidences=np.stack(confidences, axis=1),
        kinds=np.array(asked.kinds),
        groups=np.array([asked.group] * len(prompts)),
    )


def samples_of_run(
    folder: Path,
    scales: Sequence[int],
    fingerprint: str,
    metric: str | None = None,
    settings: dict[str, Any] | None = None,
) -> Samples:
    """The outcomes that `m3-eval --signals` kept.

    Args:
        folder: a complete run.
        scales, fingerprint: of the checkpoint that must have been asked.
        metric: of all its tasks; what each is meant by if None.
        settings: that it must have been asked with, see `settings_of`; any if None.

    Raises:
        ValueError: the run is another checkpoint's, was asked with other settings, or keeps no signals; or a task has no such
            metric, or one that is no share.
    """
    run = read_run(folder)
    if run.fingerprint != fingerprint or run.scales != list(scales):
        raise ValueError(f"{folder} is a run of another checkpoint, {run.checkpoint}, or not at all its scales.")
    for name, wanted in (settings or {}).items():
        found = run.settings.get(name)
        found = (
            found if name != "image_grid_pinpoints" or found != run.config.get(name) else None
        )  # the checkpoint's own
        if found != wanted:
            also = f", or give m3-budget --{name} {found}" if name in ("dtype", "quantize") and found else ""
            raise ValueError(
                f"{folder} is a run with {name} {found}, but this checkpoint is asked with {name} {wanted}: run m3-eval "
                f"--signals so, into a new folder{also}."
            )
    parts = []
    for name in run.tasks:
        stored = read_task_signals(task_file(folder, name).parent)
        if stored is None:
            raise ValueError(f"{folder} keeps no signals of {name}: run m3-eval with --signals, into a new folder.")
        task = read_task(folder, name)
        asked, _ = judge_anew(task, list(read_samples(folder, name)))
        chosen = metric or task.metric
        if chosen not in task.higher_is_better:
            raise ValueError(f"{folder}: {name} has no metric {chosen}; it has {', '.join(task.higher_is_better)}.")
        scores = np.array([sample.scores[chosen] for sample in asked], dtype=np.float32)
        if not task.higher_is_better[chosen] or scores.min() < 0 or scores.max() > 1:
            raise ValueError(f"{folder}: {chosen} of {name} is no score from 0 to 1: name another by --metric.")
        kinds = [sample.kind or sample.subset or "" for sample in asked]
        tokens = np.array([sample.visual_tokens for sample in asked], dtype=np.int32)
        part = Samples(
            np.array(run.scales), scores, tokens, **stored, kinds=np.array([f"{name} {k}".strip() for k in kinds])
        )
        parts.append(part.rows(tokens[:, -1] > 0))  # of questions about pictures
    return Samples.joined(parts)


def prompt_ids(processor: M3LlavaProcessor, question: str, pictures: int) -> list[int]:
    """A question's, in the checkpoint's chat format, with one mark per picture before it or where it has its own."""
    marks = [] if processor.image_token in question else [{"type": "image"}] * pictures
    chat = [{"role": "user", "content": [*marks, {"type": "text", "text": question}]}]
    [ids] = processor.tokenize_prompts([processor.apply_chat_template(chat, add_generation_prompt=True)])
    return ids


def _answer(
    model: M3LlavaForConditionalGeneration,
    processor: M3LlavaProcessor,
    rows: list[list[int]],
    features: torch.Tensor,
    max_new_tokens: int,
) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """Greedy answers, signals (n, d) and confidences (n, c) of prompts about the same pictures."""
    device, language_model = model.device, model.model.language_model
    shared = min(len(commonprefix(rows)), min(map(len, rows)) - 1)
    longest = max(map(len, rows)) - shared
    pad = processor.tokenizer.pad_token_id or 0
    # What is padded stands between what is shared and the rest, so that all rows end together.
    ids = torch.tensor([row[:shared] + [pad] * (longest + shared - len(row)) + row[shared:] for row in rows])
    mask = torch.tensor(
        [[1] * shared + [0] * (longest + shared - len(row)) + [1] * (len(row) - shared) for row in rows]
    )
    ids, mask = ids.to(device), mask.to(device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    embeds = model.get_input_embeddings()(ids)
    images = (ids == processor.image_token_id) & mask.bool()
    embeds[images] = features.to(embeds).repeat(len(rows), 1)[: images.sum()]
    prefix = language_model(inputs_embeds=embeds[:1, :shared], position_ids=positions[:1, :shared], use_cache=True)
    cache = getattr(prefix, CACHE_NAME)
    cache.batch_repeat_interleave(len(rows))
    output = language_model(
        inputs_embeds=embeds[:, shared:],
        attention_mask=mask,
        position_ids=positions[:, shared:],
        use_cache=True,
        **{CACHE_NAME: cache},
        output_hidden_states=True,
    )
    signal = read_signals(output.hidden_states)
    ends = model.generation_config.eos_token_id
    ends = torch.tensor([] if ends is None else ends if isinstance(ends, list) else [ends], device=device)
    confidence, done = Confidence(len(rows), device), torch.zeros(len(rows), dtype=torch.bool, device=device)
    answers: list[list[int]] = [[] for _ in rows]
    hidden, position = output.last_hidden_state[:, -1:], positions[:, -1:]
    for step in range(max_new_tokens):
        logits = model.get_logits(hidden)[:, -1].to(device).float()
        token = logits.argmax(-1)
        if step < PROBE_TOKENS:
            confidence.add(logits, ~done)
        for answer, new, over in zip(answers, token.tolist(), done.tolist()):
            if not over:
                answer.append(new)
        done |= torch.isin(token, ends)
        if done.all():
            break
        mask, position = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1), position + 1
        output = language_model(
            input_ids=token[:, None], attention_mask=mask, position_ids=position, use_cache=True, **{CACHE_NAME: cache}
        )
        hidden = output.last_hidden_state
    texts = [processor.decode(answer, skip_special_tokens=True).strip() for answer in answers]
    return texts, signal, confidence.values()
