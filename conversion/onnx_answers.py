"""Answers from a folder that `m3-export` wrote, by onnxruntime: what `generate` says when it is greedy, without the model.

Needs the folder's processor for inputs, and numpy and onnxruntime for the rest. How many visual tokens an image has and in which
order they stand is asked of the same `ImageLayout` as in the model.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from transformers import GenerationConfig

from modeling_m3 import M3LlavaConfig
from modeling_m3.encoding_m3 import TILES_AT_ONCE
from modeling_m3.visual_tokens import as_lists, check_num_visual_tokens

from .exported_graphs import visual_tokens_name


VISION, LANGUAGE, NEWLINE = "vision.onnx", "language.onnx", "image_newline.npy"

Cache = list[onnxruntime.OrtValue]  # keys and values of every layer, (b, heads, tokens, head size) each

_INPUTS = ("input_ids", "attention_mask", "pixel_values", "image_sizes", "image_tile_grids", "num_visual_tokens")
# Of a generation configuration: what `generate` here does, what sampling alone reads, and what does not change an answer.
_UNDERSTOOD = {
    *("bos_token_id", "eos_token_id", "pad_token_id"),
    *("do_sample", "temperature", "top_p", "top_k"),
    *("transformers_version", "_from_model_config", "use_cache", "max_length", "max_new_tokens", "auto_keep"),
    *("cache_implementation", "return_dict_in_generate", "output_attentions", "output_hidden_states"),
}
_OFF = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0, "length_penalty": 1.0, "min_length": 0}


class OnnxM3:
    """An exported checkpoint. Shapes use: b prompts, s sequence length, d hidden size of the language model.

    Attributes:
        config, generation_config: of the checkpoint.
        vision, language: the sessions of the two graphs.
        image_newline: (d,), for checkpoints that end rows of tiles with it.
    """

    def __init__(
        self,
        config: M3LlavaConfig,
        generation_config: GenerationConfig,
        vision: onnxruntime.InferenceSession,
        language: onnxruntime.InferenceSession,
        image_newline: np.ndarray | None = None,
    ):
        self.config, self.generation_config = config, generation_config
        self.vision, self.language = vision, language
        self.image_newline = image_newline
        self._past = [given for given in language.get_inputs() if given.name.startswith("past_key_values.")]
        self._outputs = [output.name for output in language.get_outputs()]

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        providers: Sequence[Any] = ("CPUExecutionProvider",),
        session_options: onnxruntime.SessionOptions | None = None,
    ) -> "OnnxM3":
        """
        Reads what `m3-export` wrote.

        Args:
            folder: OUT of the command.
            providers: onnxruntime's execution providers.
            session_options: onnxruntime's, as numbers of threads.

        Raises:
            ValueError: the folder holds no exported checkpoint.
        """
        folder = Path(folder)
        for name in (VISION, LANGUAGE, "config.json", "generation_config.json"):
            if not (folder / name).is_file():
                raise ValueError(f"{folder} has no {name}: name a folder that m3-export wrote.")
        vision, language = (
            onnxruntime.InferenceSession(folder / name, session_options, providers=list(providers))
            for name in (VISION, LANGUAGE)
        )
        newline = np.load(folder / NEWLINE) if (folder / NEWLINE).exists() else None
        config, generation_config = (kind.from_pretrained(folder) for kind in (M3LlavaConfig, GenerationConfig))
        return cls(config, generation_config, vision, language, newline)

    def generate(self, inputs: Mapping[str, Any], max_new_tokens: int = 20) -> np.ndarray:
        """
        Greedy answers to a batch of prompts.

        Args:
            inputs: what the processor returned, as arrays or tensors; prompts of different lengths padded on the left.
            max_new_tokens: where no answer has ended before.

        Returns:
            (b, s + new tokens), int64: prompts and answers, padded after the token that ends them, as from `generate`.

        Raises:
            ValueError: for inputs that are none, or that the graphs would answer wrongly.
        """
        if type(max_new_tokens) is not int or max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens!r} must be a whole number from 1.")
        settings = self.generation_config.to_diff_dict()
        asked = {name for name, value in settings.items() if value not in (None, False) and value != _OFF.get(name)}
        if ignored := sorted(asked - _UNDERSTOOD):
            raise ValueError(
                f"generation_config.json sets {', '.join(ignored)}, which is not done here: answers are greedy. Take it out "
                "of generation_config, or write a loop around `forward`."
            )
        ids, mask = self._prompts(inputs)
        ends = self.generation_config.eos_token_id
        ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
        pad = self.generation_config.pad_token_id
        pad = pad if pad is not None else ends[0] if ends else 0
        visual_tokens = np.concatenate([*self.get_visual_tokens(inputs), self._no_visual_tokens()])
        context = self.config.context_length
        if context is not None and mask.sum(1).max() > context:
            raise ValueError(
                f"A prompt has {mask.sum(1).max()} tokens, more than the language model's context of {context}: give a smaller "
                "num_visual_tokens, or fewer pictures."
            )
        ended = np.zeros(len(ids), bool)
        answers, step, cache = [ids], ids, None
        while True:
            logits, cache = self.forward(step, mask, visual_tokens, cache, np.array([step.shape[1] - 1]))
            step = np.where(ended, pad, logits[:, -1].argmax(-1))[:, None].astype(np.int64)
            answers.append(step)
            ended |= np.isin(step[:, 0], ends)
            if ended.all() or len(answers) > max_new_tokens:
                return np.concatenate(answers, axis=1)
            mask = np.concatenate([mask, np.ones((len(mask), 1), np.int64)], axis=1)
            visual_tokens = self._no_visual_tokens()

    def get_visual_tokens(self, inputs: Mapping[str, Any]) -> list[np.ndarray]:
        """
        The visual tokens of every image at its own scale, from the vision graph.

        Args:
            inputs: what the processor returned.

        Returns:
            One (tokens, d) per image, in reading order.

        Raises:
            ValueError: for sizes, grids or numbers of visual tokens that do not fit the pixels, and for "auto".
        """
        pixels = inputs.get("pixel_values")
        if pixels is None:
            return []
        whole = hasattr(pixels, "shape")
        pixels = torch.as_tensor(np.asarray(pixels)) if whole else [torch.as_tensor(np.asarray(p)) for p in pixels]
        facts = (inputs.get(name) for name in ("image_sizes", "image_tile_grids", "num_visual_tokens"))
        sizes, grids, numbers = as_lists(*facts)
        tiles, layouts = self.config.image_tiles(pixels, sizes, grids)
        if isinstance(numbers, list) and 0 in numbers:
            raise ValueError('num_visual_tokens="auto" needs the model, which chooses: give the processor a number.')
        scales = check_num_visual_tokens(numbers, self.config.visual_token_scales, len(layouts))
        wanted = sorted(set(scales))
        names = [visual_tokens_name(scale) for scale in wanted]
        parts = [
            self.vision.run(names, {"pixel_values": some.float().numpy()})
            for some in torch.cat(tiles).split(TILES_AT_ONCE)
        ]
        features = {scale: np.concatenate(of_scale) for scale, of_scale in zip(wanted, zip(*parts))}
        newline = None if self.image_newline is None else torch.from_numpy(self.image_newline)
        ends = np.cumsum([layout.num_tiles for layout in layouts])
        return [
            layout.merge(torch.from_numpy(features[scale][end - layout.num_tiles : end]), newline).numpy()
            for layout, scale, end in zip(layouts, scales, ends)
        ]

    def forward(
        self,
        input_ids: np.ndarray,
        attention_mask: np.ndarray,
        visual_tokens: np.ndarray,
        cache: Cache | None = None,
        logits_to_keep: np.ndarray | None = None,
    ) -> tuple[np.ndarray, Cache]:
        """
        One run of the language graph.

        Args:
            input_ids: (b, s), int64: a prompt, or what follows what is in the cache.
            attention_mask: (b, cached tokens + s), int64, 0 for padding.
            visual_tokens: (all visual tokens, d): of all images, in the order of their placeholders in `input_ids`.
            cache: what the last run returned.
            logits_to_keep: indices into the sequence whose logits are wanted; all by default.

        Returns:
            Logits, (b, kept, vocabulary), and the cache with this sequence in it.

        Raises:
            ValueError: if the placeholders and the visual tokens differ in number.
        """
        b, s = input_ids.shape
        placeholders = int((input_ids == self.config.image_token_id).sum())
        if placeholders != len(visual_tokens):
            raise ValueError(
                f"The prompt has {placeholders} placeholders for {len(visual_tokens)} visual tokens. Pass all that the "
                "processor returned, num_visual_tokens, image_sizes and image_tile_grids included."
            )
        if cache is None:
            shapes = [(b, given.shape[1], 0, given.shape[3]) for given in self._past]
            cache = [onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32)) for shape in shapes]
        positions = np.maximum(attention_mask.cumsum(1) - 1, 0)[:, -s:]
        given = {
            "input_ids": input_ids,
            "visual_tokens": visual_tokens,
            "attention_mask": attention_mask,
            "position_ids": positions,
            "logits_to_keep": np.arange(s) if logits_to_keep is None else logits_to_keep,
        }
        values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(v)) for name, v in given.items()}
        values |= {past.name: value for past, value in zip(self._past, cache)}
        logits, *cache = self.language.run_with_ort_values(self._outputs, values)
        return logits.numpy(), cache

    def _prompts(self, inputs: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """`input_ids` and `attention_mask`, both (b, s). Raises `ValueError` for what is not known, and for padding elsewhere."""
        if unknown := sorted(name for name in inputs if name not in _INPUTS):
            raise ValueError(f"{', '.join(unknown)} is no input of an exported model: it takes {', '.join(_INPUTS)}.")
        if inputs.get("input_ids") is None:
            raise ValueError("There are no input_ids: pass what the processor returned for a prompt.")
        ids = np.asarray(inputs["input_ids"]).astype(np.int64)
        given = inputs.get("attention_mask")
        mask = np.ones_like(ids) if given is None else np.asarray(given).astype(np.int64)
        if ids.ndim != 2 or ids.shape != mask.shape or not ids.size:
            raise ValueError(
                f"input_ids have the shape {ids.shape} and attention_mask {mask.shape}: both should be (prompts, tokens)."
            )
        if (np.diff(mask, axis=1) < 0).any() or not mask[:, -1].all():
            raise ValueError('A prompt is padded on the right: prepare inputs with padding_side="left".')
        return ids, mask

    def _no_visual_tokens(self) -> np.ndarray:
        return np.zeros((0, self.config.text_config.hidden_size), np.float32)
