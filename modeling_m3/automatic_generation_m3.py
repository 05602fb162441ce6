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
"""`generate` where the model chooses the number of visual tokens, prompt by prompt.

Images are encoded once. A pass at a coarse scale is followed by the decisions of `automatic_budget_m3.py`; then each prompt is
answered by a plain call at the scale it came to, and prompts that came to the same one together. What a pass has computed goes
on into that call where the cache allows it: all of it where the scale is the same, else what stands before the images.

Shapes use: b prompts, s sequence length, d hidden size.
"""

import copy
from dataclasses import dataclass, field
from os.path import commonprefix
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache, DynamicLayer
from transformers.generation import GenerationMode
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import logging

from .automatic_budget_m3 import AutomaticBudget, Confidence, UnfittedBudget, read_signals
from .outputs_m3 import CACHE_NAME, M3LlavaEncodedImages
from .visual_tokens import ImageLayout


logger = logging.get_logger(__name__)

# With these arguments alone, a call that is given a cache of its prompt answers as one without.
GO_ON_FROM_A_CACHE = {
    *("max_new_tokens", "max_length", "min_new_tokens", "min_length", "max_time", "stop_strings", "tokenizer"),
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "no_repeat_ngram_size"),
    *("eos_token_id", "pad_token_id", "bos_token_id", "bad_words_ids", "suppress_tokens", "logits_processor"),
    *("stopping_criteria", "streamer", "generation_config", "num_beams", "num_return_sequences", "use_cache"),
    *("return_dict_in_generate", "output_scores", "output_logits"),
}


@dataclass
class _Prompt:
    """A prompt, laid out for the numbers of visual tokens `written`, and what becomes of it."""

    ids: list[int]  # without padding
    images: list[int]
    layouts: list[ImageLayout]
    written: list[int]
    automatic: list[bool]
    spent: int = 0  # visual tokens of all passes
    scale: int = 0  # to answer at
    unsure: bool = False  # whether the answer there is to be looked at
    logits: np.ndarray | None = None  # of a right answer at each scale

    def scales(self, scale: int) -> list[int]:
        """Of its images, where those that are to be chosen are at `scale`."""
        return [scale if automatic else written for automatic, written in zip(self.automatic, self.written)]

    def visual_tokens(self, scale: int) -> int:
        return sum(layout.count(number) for layout, number in zip(self.layouts, self.scales(scale)))

    def ids_at(self, scale: int, image_token_id: int) -> list[int]:
        """Its tokens at `scale`: of each image's placeholders, as many as it then has."""
        ids, position = [], 0
        for layout, before, now in zip(self.layouts, self.written, self.scales(scale)):
            begin = self.ids.index(image_token_id, position)
            ids += self.ids[position : begin + layout.count(now)]
            position = begin + layout.count(before)
        return ids + self.ids[position:]


@dataclass
class _Pass:
    """What prompts that were computed together left: tokens (b, s), all ending together, and the cache of them."""

    prompts: list[_Prompt]
    input_ids: torch.Tensor
    mask: torch.Tensor
    last_hidden: torch.Tensor  # (b, d), at the end
    cache: Cache

    def of(self, prompts: list[_Prompt], length: int | None = None) -> "_Pass":
        """A copy for some of the prompts, with the cache of the first `length` tokens."""
        rows = [next(i for i, held in enumerate(self.prompts) if held is prompt) for prompt in prompts]
        cache, index = copy.deepcopy(self.cache), torch.tensor(rows, device=self.mask.device)
        beyond = 0 if length is None else int(cache.get_seq_length()) - length
        if beyond:
            cache.crop(-beyond)
        cache.batch_select_indices(index)
        return _Pass(prompts, self.input_ids[index], self.mask[index], self.last_hidden[index], cache)


@dataclass
class _Answered:
    """What a plain call returned: sequences that begin with `length` tokens of prompt, `repeats` of each prompt."""

    prompts: list[_Prompt]
    output: Any
    length: int
    repeats: int = field(init=False)

    def __post_init__(self) -> None:
        self.repeats = len(self.sequences) // len(self.prompts)

    @property
    def sequences(self) -> torch.Tensor:
        return self.output if isinstance(self.output, torch.Tensor) else self.output.sequences


class AutomaticGeneration:
    """One call of `generate` with automatic budgets.

    Args:
        model: an `M3LlavaForConditionalGeneration`.
        input_ids, attention_mask: (b, s), as the processor laid them out.
        encoded: all images; by the assistant too, if there is one that sees.
        numbers: visual tokens per tile of each image, 0 where the model chooses.
        sampling: `visual_token_sampling`.
        keep: the share of the finest scale's accuracy to keep.
        settings: the other arguments of `generate`.

    Raises:
        ValueError: the checkpoint has one scale, its stored choice is for another model, `keep` is no share, or the images
            are not those of the prompts.
    """

    def __init__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        encoded: dict[str, M3LlavaEncodedImages],
        numbers: list[int],
        sampling: str | None,
        keep: float | None,
        settings: dict[str, Any],
    ):
        self.model, self.input_ids, self.encoded, self.numbers = model, input_ids, encoded, numbers
        self.sampling, self.settings = sampling, settings
        offered = model.config.visual_token_scales
        if len(offered) < 2:
            raise ValueError(
                f'num_visual_tokens="auto": this checkpoint offers {offered[0]} alone, so there is no choice.'
            )
        fitted, reason = model._find_automatic_budget()
        self.choice: AutomaticBudget | UnfittedBudget = fitted or UnfittedBudget(offered)
        if fitted is None:
            logger.warning_once(
                f'num_visual_tokens="auto": {reason}, so a careful rule is used, which takes more tokens. m3-budget fits one: '
                "docs/automatic-budget.md."
            )
        self.keep = self.choice.keep if keep is None else keep
        if isinstance(self.keep, bool) or not isinstance(self.keep, (int, float)) or not 0 < self.keep <= 1:
            raise ValueError(f"auto_keep={keep!r}: give the share of accuracy to keep, above 0 and up to 1, as 0.99.")
        self.finest = max(offered)
        self.prompts = self._read(attention_mask)
        if settings.get("streamer") is not None and len(self.prompts) > 1:
            raise ValueError(
                "streamer: with automatic budgets, prompts of a batch do not answer in step. Give it one prompt."
            )
        self.image_token_id = model.config.image_token_id
        chosen = [prompt for prompt in self.prompts if any(prompt.automatic)]
        self.shared = self._shared(chosen)
        self.first: _Pass | None = None  # the coarse pass of all prompts
        self.answered: list[_Answered] = []

    @torch.no_grad()
    def __call__(self) -> Any:
        """What `generate` returns: sequences that begin with the prompts as they were given."""
        self._answer([prompt for prompt in self.prompts if not any(prompt.automatic)], self.finest)
        prompts = [prompt for prompt in self.prompts if any(prompt.automatic)]
        start = self.choice.start
        self.first, signals = self._run(prompts, start)
        for prompt, logits, scale, unsure in zip(prompts, *self.choice.first_choice(signals, self.keep)):
            prompt.logits, prompt.scale, prompt.unsure = logits, int(scale), bool(unsure)
        for scale in (scale for scale in self.choice.scales if scale >= start):
            here = [prompt for prompt in prompts if prompt.scale == scale]
            unsure = [prompt for prompt in here if prompt.unsure and scale != self.finest]
            done = self.first if scale == start else None
            if unsure and done is None:
                done, _ = self._run(unsure, scale)
            if unsure:
                logits = np.stack([prompt.logits for prompt in unsure])
                choices = self.choice.next_choice(scale, logits, self._look_at(done.of(unsure)), self.keep)
                for prompt, choice in zip(unsure, choices):
                    prompt.scale = int(choice)
            staying = [prompt for prompt in here if prompt.scale == scale]
            computed = [
                prompt for prompt in staying if done is not None and any(prompt is held for held in done.prompts)
            ]
            self._answer(computed, scale, done)
            self._answer([prompt for prompt in staying if not any(prompt is held for held in computed)], scale)
        return self._joined()

    def _read(self, attention_mask: torch.Tensor | None) -> list[_Prompt]:
        mask = torch.ones_like(self.input_ids) if attention_mask is None else attention_mask
        written, layouts = [number or self.finest for number in self.numbers], self.encoded["image"].layouts
        prompts, index = [], 0
        for ids, kept in zip(self.input_ids.tolist(), mask.bool().tolist()):
            ids = [token for token, is_kept in zip(ids, kept) if is_kept]
            missing, images = ids.count(self.model.config.image_token_id), []
            while missing > 0 and index < len(layouts):
                missing -= layouts[index].count(written[index])
                images.append(index)
                index += 1
            if missing:
                break
            prompts.append(
                _Prompt(
                    ids,
                    images,
                    [layouts[image] for image in images],
                    [written[image] for image in images],
                    [self.numbers[image] == 0 for image in images],
                )
            )
        if len(prompts) < len(self.input_ids) or index < len(layouts):
            raise ValueError(
                f"The prompts have {(self.input_ids == self.model.config.image_token_id).sum()} placeholders, which are not those "
                f"of {len(layouts)} image(s) at num_visual_tokens={self.numbers}, 0 laid out as {self.finest}. Pass all that "
                "the processor returned."
            )
        return prompts

    def _shared(self, prompts: list[_Prompt]) -> int:
        """How many tokens before the first image are the same in all prompts."""
        if not prompts or not self._goes_on_from_a_cache():
            return 0
        return len(commonprefix([prompt.ids[: prompt.ids.index(self.image_token_id)] for prompt in prompts]))

    def _goes_on_from_a_cache(self) -> bool:
        config = self.settings.get("generation_config") or self.model.generation_config

        def of(name: str) -> Any:
            given = self.settings.get(name)
            return getattr(config, name, None) if given is None else given

        plain = config.get_generation_mode() in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
        one = (of("num_beams") or 1) == (of("num_return_sequences") or 1) == 1
        kept = of("use_cache") is not False and of("cache_implementation") is None and of("prefill_chunk_size") is None
        whole = not of("output_attentions") and not of("output_hidden_states")
        return plain and one and kept and whole and self.settings.keys() <= GO_ON_FROM_A_CACHE

    def _laid_out(self, prompts: list[_Prompt], scale: int, shared: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and mask (b, s); what is padded stands between the first `shared` tokens and the rest."""
        rows = [prompt.ids_at(scale, self.image_token_id) for prompt in prompts]
        length = max(map(len, rows))
        pad = self._pad_token_id()
        ids = [row[:shared] + [pad] * (length - len(row)) + row[shared:] for row in rows]
        mask = [[1] * shared + [0] * (length - len(row)) + [1] * (len(row) - shared) for row in rows]
        return torch.tensor(ids, device=self.input_ids.device), torch.tensor(mask, device=self.input_ids.device)

    def _images(self, prompts: list[_Prompt], scale: int) -> dict[str, Any]:
        """The visual tokens of the prompts' images, for the model and for an assistant."""
        numbers = [number for prompt in prompts for number in prompt.scales(scale)]
        if not numbers:
            return {}
        outputs = {}
        for name, encoded in self.encoded.items():
            model = self.settings["assistant_model"] if name == "assistant" else self.model
            tiles = encoded.tile_features.split([layout.num_tiles for layout in encoded.layouts])
            images = [image for prompt in prompts for image in prompt.images]
            chosen = M3LlavaEncodedImages(
                tile_features=torch.cat([tiles[image] for image in images]),
                layouts=[encoded.layouts[image] for image in images],
            )
            tokens = model.get_visual_tokens(chosen, numbers, self.sampling)
            outputs[name] = BaseModelOutputWithPooling(pooler_output=tokens)
        return {"mm_encoder_outputs": outputs}

    def _prefix(self, prompts: list[_Prompt]) -> dict[str, Cache]:
        """What the coarse pass computed of that which stands before the images."""
        if not self.shared or self.first is None or not can_be_cut(self.first.cache):
            return {}
        return {CACHE_NAME: self.first.of(prompts, self.shared).cache}

    def _run(self, prompts: list[_Prompt], scale: int) -> tuple[_Pass, torch.Tensor]:
        """A pass, and its signals (b, 2 d)."""
        ids, mask = self._laid_out(prompts, scale, self.shared)
        prefix = self._prefix(prompts)
        begin, positions = self.shared if prefix else 0, _positions(mask)
        images = self._images(prompts, scale)
        images = {"mm_encoder_outputs": {"image": images["mm_encoder_outputs"]["image"]}}
        output = self.model.model(
            input_ids=ids[:, begin:],
            attention_mask=mask,
            position_ids=positions[:, begin:],
            use_cache=True,
            output_hidden_states=True,
            **images,
            **prefix,
        )
        for prompt in prompts:
            prompt.spent += prompt.visual_tokens(scale)
        done = _Pass(prompts, ids, mask, output.last_hidden_state[:, -1], getattr(output, CACHE_NAME))
        return done, read_signals(output.hidden_states)

    def _look_at(self, done: _Pass) -> torch.Tensor:
        """`Confidence.values` of the greedy answers' first tokens."""
        ends = self.model.generation_config.eos_token_id
        ends = torch.tensor([] if ends is None else ends if isinstance(ends, list) else [ends], device=done.mask.device)
        confidence, mask = Confidence(len(done.prompts), done.mask.device), done.mask
        going, hidden = torch.ones_like(mask[:, 0], dtype=torch.bool), done.last_hidden
        for step in range(self.choice.probe_tokens):
            logits = self.model.get_logits(hidden)
            confidence.add(logits, going)
            token = logits.argmax(-1)
            going = going & ~torch.isin(token, ends)
            if not going.any() or step + 1 == self.choice.probe_tokens:
                break
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            output = self.model.model(
                input_ids=token[:, None],
                attention_mask=mask,
                position_ids=_positions(mask)[:, -1:],
                use_cache=True,
                **{CACHE_NAME: done.cache},
            )
            hidden = output.last_hidden_state[:, -1]
        return confidence.values()

    def _answer(self, prompts: list[_Prompt], scale: int, done: _Pass | None = None) -> None:
        """A plain call at `scale`, which goes on from the pass if that can be done."""
        if not prompts:
            return
        if done is not None and self._goes_on_from_a_cache() and can_be_cut(done.cache):
            length = done.input_ids.shape[1] - 1
            if not (done.input_ids[:, length:] == self.image_token_id).any():
                done = done.of(prompts, length)
                inputs = {"input_ids": done.input_ids, "attention_mask": done.mask, CACHE_NAME: done.cache}
                self._generate(prompts, inputs)
                return
        prefix = self._prefix(prompts) if any(any(prompt.automatic) for prompt in prompts) else {}
        ids, mask = self._laid_out(prompts, scale, self.shared if prefix else 0)
        for prompt in prompts:
            prompt.spent += prompt.visual_tokens(scale)
        self._generate(prompts, {"input_ids": ids, "attention_mask": mask, **prefix, **self._images(prompts, scale)})

    def _generate(self, prompts: list[_Prompt], inputs: dict[str, Any]) -> None:
        output = self.model.generate(**inputs, **self.settings)
        self.answered.append(_Answered(prompts, output, inputs["input_ids"].shape[1]))

    def _joined(self) -> Any:
        parts = {id(prompt): (part, row) for part in self.answered for row, prompt in enumerate(part.prompts)}
        repeats = self.answered[0].repeats
        order = [(parts[id(prompt)], repeat) for prompt in self.prompts for repeat in range(repeats)]
        rows = [part.sequences[row * repeats + repeat, part.length :] for (part, row), repeat in order]
        new = torch.full((len(rows), max(map(len, rows))), self._pad_token_id(), device=self.input_ids.device)
        for index, row in enumerate(rows):
            new[index, : len(row)] = row
        sequences = torch.cat([self.input_ids.repeat_interleave(repeats, dim=0), new], dim=1)
        if isinstance(self.answered[0].output, torch.Tensor):
            return sequences
        output = self._joined_outputs([(part, row * repeats + repeat) for (part, row), repeat in order], sequences)
        scales = {image: scale for p in self.prompts for image, scale in zip(p.images, p.scales(p.scale))}
        output["num_visual_tokens"] = torch.tensor([scales[image] for image in sorted(scales)])
        output["visual_tokens_spent"] = torch.tensor([prompt.spent for prompt in self.prompts])
        return output

    def _joined_outputs(self, order: list[tuple[_Answered, int]], sequences: torch.Tensor) -> Any:
        """The outputs of all calls as one. Of several calls, what has an entry for every step and row, zeros after its end."""
        first = self.answered[0].output
        if len(self.answered) == 1:
            rows = torch.tensor([row for _, row in order])
            if (rows == torch.arange(len(rows))).all():
                first["sequences"] = sequences
                return first
        joined: dict[str, Any] = {"sequences": sequences}
        for name, value in first.items():
            steps = isinstance(value, tuple) and all(
                isinstance(step, torch.Tensor) and step.ndim == 2 for step in value
            )
            if isinstance(value, torch.Tensor) and value.ndim == 1:
                joined[name] = torch.stack([part.output[name][row] for part, row in order])
            elif steps and name in ("scores", "logits"):
                longest = max(len(part.output[name]) for part in self.answered)
                nothing = torch.zeros_like(value[0][0])
                joined[name] = tuple(
                    torch.stack(
                        [part.output[name][i][row] if i < len(part.output[name]) else nothing for part, row in order]
                    )
                    for i in range(longest)
                )
        return type(first)(**joined)

    def _pad_token_id(self) -> int:
        config = self.settings.get("generation_config") or self.model.generation_config
        pad, ends = self.settings.get("pad_token_id", config.pad_token_id), config.eos_token_id
        if pad is None:
            pad = ends[0] if isinstance(ends, list) else ends
        return 0 if pad is None else int(pad)


def _positions(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


def can_be_cut(cache: Cache) -> bool:
    """Whether a cache holds every token of every layer, so that its end can be taken off."""
    return all(type(layer) is DynamicLayer for layer in getattr(cache, "layers", [None]))
