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
"""`compile_for`: one graph of the whole prefill for every number of visual tokens, which `generate` then uses.

A graph goes from pixels and token ids to the logits of the last position and the keys and values of all. Everything that
decides shapes is fixed before it: numbers of tiles, numbers of visual tokens, prompts, and the length, for which prompts are
padded on the left. The padding is gone again before keys and values enter the cache, so that whatever comes after a prefill
(decoding, beams, streaming, a chat's next turn, any kind of cache) sees what it would have seen without a graph.

Where visual tokens stand is no shape but an index, computed inside the graph: for pictures in several tiles, from the order
in which `ImageLayout.merge` reads them.
"""

import types
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import DynamicCache
from transformers.utils import logging

from .outputs_m3 import CACHE_NAME, M3LlavaCausalLMOutputWithPast
from .visual_tokens import ImageLayout, as_lists, check_num_visual_tokens, joined, laid_out, pool_tiles, tile_grid


logger = logging.get_logger(__name__)

SHORTEST_TEXT = 32  # tokens that the shortest graphs hold beside visual ones; the next hold twice as many, and so on
OF_UNCUT = (0.5, 0.75, 1)  # lengths for pictures whose padding is cut off, as parts of the visual tokens of one without
# What a prefill by a graph may be asked; with anything else it runs as without graphs.
KNOWN_ARGUMENTS = {
    "attention_mask",
    "position_ids",
    "use_cache",
    "logits_to_keep",
    "pixel_values",
    "image_sizes",
    "image_tile_grids",
    "image_grid_pinpoints",
    "num_visual_tokens",
    "visual_token_sampling",
    "mm_encoder_outputs",
    CACHE_NAME,
}

# Of each picture of a call, in reading order: tiles, and tokens that each is pooled to.
Pictures = tuple[tuple[int, int], ...]


class M3LlavaCompilingMixin:
    """`compile_for` for a model with `model`, `lm_head` and `generate`."""

    _prefill_graphs: "PrefillGraphs | None" = None

    def compile_for(
        self,
        scales: Sequence[int | Sequence[int]] | int | None = None,
        max_text: int = 128,
        mode: str | None = "reduce-overhead",
        like: dict[str, Any] | None = None,
        progress: bool = True,
        **options: Any,
    ) -> "M3LlavaCompilingMixin":
        """
        Compiles the prefill at these numbers of visual tokens, each as one graph; `generate` uses the graphs from then on.

        With CUDA graphs (`mode="reduce-overhead"`) a prefill no longer waits for Python and for launches, which is most of its
        time for one prompt of few tokens. Calls of another kind than was compiled for, longer texts and turns that go on from
        a cache run as before; nothing is ever compiled in the middle of `generate`. What is compiled is kept in torch's cache
        on disk (`TORCHINDUCTOR_CACHE_DIR`), so that the next start is quicker. Calling it again replaces the graphs.

        Args:
            scales: numbers of visual tokens of each picture (for several pictures that differ: a list of one number for each);
                all that the checkpoint offers by default; an empty list: no graphs any more.
            max_text: the most tokens of a prompt, beside the visual ones, that graphs are compiled for. There is one for 32, 64
                and so on up to it; for pictures in tiles, lengths follow the pictures' shapes instead.
            mode: of `torch.compile`.
            like: what the processor returned for a batch of the kind to come: graphs are for as many prompts and pictures, and
                tiles of each. By default, for one prompt with one picture; of a checkpoint that cuts pictures into tiles, for
                every number of tiles.
            progress: whether a bar shows how many are compiled.
            options: anything else for `torch.compile`, as `backend` or `options`.

        Returns:
            The model itself.

        Raises:
            ValueError: for numbers that the checkpoint does not offer, a model in training mode, in parts on several devices or
                quantised in a way that cannot be compiled, and with torch's reason where tracing fails. The model is then as it
                was.
        """
        if type(max_text) is not int or max_text < 1:
            raise ValueError(f"max_text={max_text!r} must be a whole number from 1.")
        _check_can_be_compiled(self)
        offered = self.config.visual_token_scales
        scales = offered if scales is None else [scales] if isinstance(scales, int) else list(scales)
        kinds = []
        for layouts, prompts in _kinds(self.config, like):
            for numbers in scales:
                numbers = list(numbers) if isinstance(numbers, (list, tuple)) else numbers
                numbers = check_num_visual_tokens(numbers, offered, len(layouts), "scales")
                lengths = _lengths(layouts, numbers, prompts, max_text)
                pictures = _pictures(layouts, numbers)
                kinds += [(pictures, len(prompts), length) for length in lengths]
        if mode is not None and "options" in options:  # of which torch takes one
            options["options"] = {**torch._inductor.list_mode_options(mode), **options["options"]}
            mode = None
        graphs = PrefillGraphs({"mode": mode, **options})
        for kind in logging.tqdm(
            list(dict.fromkeys(kinds)), desc="Compiling prefills", disable=None if progress else True
        ):
            graphs.compile(self, *kind)
        self._prefill_graphs = graphs if len(graphs) else None
        return self

    def _fitting_graph(self, input_ids: torch.LongTensor, kwargs: dict[str, Any]) -> "FittingGraph | None":
        """The graph for a prefill of these prompts, each of which may stand several times, as beams have it; None without one."""
        mask, cache = kwargs.get("attention_mask"), kwargs.get(CACHE_NAME)
        unknown = [
            name
            for name in kwargs
            if name not in KNOWN_ARGUMENTS and kwargs[name] is not None and kwargs[name] is not False
        ]
        if (
            self._prefill_graphs is None
            or input_ids is None
            or unknown
            or kwargs.get("pixel_values") is None
            or kwargs.get("mm_encoder_outputs")
            or (kwargs.get("visual_token_sampling") or self.config.visual_token_sampling)
            != self.config.visual_token_sampling
            or kwargs.get("logits_to_keep", 1) != 1
            or not kwargs.get("use_cache", True)
            or (cache is not None and int(cache.get_seq_length()))
            or (mask is not None and mask.shape != input_ids.shape)
            or torch.is_grad_enabled()
        ):
            return None
        placeholders = (input_ids == self.config.image_token_id).sum()[None]
        facts = (kwargs.get(name) for name in ("image_sizes", "image_tile_grids", "num_visual_tokens"))
        sizes, grids, numbers, [placeholders] = as_lists(*facts, placeholders)
        tiles, layouts = self.config.image_tiles(
            kwargs["pixel_values"], sizes, grids, kwargs.get("image_grid_pinpoints")
        )
        offered = self.config.visual_token_scales
        numbers = check_num_visual_tokens(laid_out(numbers, offered), offered, len(layouts))
        repeats, rest = divmod(placeholders, sum(layout.count(number) for layout, number in zip(layouts, numbers)))
        if rest or not repeats or len(input_ids) % repeats:
            return None  # without a graph it is said what is wrong
        prompts, length = len(input_ids) // repeats, input_ids.shape[1]
        found = self._prefill_graphs.find(_pictures(layouts, numbers), prompts, length)
        if found is None:
            logger.warning_once(
                f"No graph was compiled for {len(layouts)} picture(s) in {prompts} prompt(s) of {length} tokens at {numbers} visual "
                "tokens: they run without one, as all others of which that is true. See max_text and like of compile_for."
            )
            return None
        graph, padded = found
        order = _reading_order(layouts, numbers, self.model.image_newline is not None, prompts * padded)
        return FittingGraph(graph, repeats, padded - length, joined(tiles), order)

    def _prefill_by_graph(self, input_ids: torch.LongTensor, kwargs: dict[str, Any]) -> Any:
        """The outputs of a prefill, and its cache filled, if there is a graph for it; else None."""
        cache, mask, positions = (kwargs.get(name) for name in (CACHE_NAME, "attention_mask", "position_ids"))
        fitting = self._fitting_graph(input_ids, kwargs) if cache is not None else None
        if fitting is None:
            return None
        mask = torch.ones_like(input_ids) if mask is None else mask
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0) if positions is None else positions
        repeats, padding = fitting.repeats, fitting.padding
        logits, states = fitting.graph(
            self,
            fitting.tiles.to(self.device, self.dtype),
            fitting.order.to(self.device),
            *(
                nn.functional.pad(each[::repeats].to(self.device), (padding, 0))
                for each in (input_ids, mask, positions)
            ),
        )
        # What was padded ends here. Beams begin with what their prompt has.
        states = [state[:, :, padding:] for state in states]
        if repeats > 1:
            logits, *states = (each.repeat_interleave(repeats, dim=0) for each in (logits, *states))
        for layer, (keys, values) in enumerate(zip(states[::2], states[1::2])):
            cache.update(keys, values, layer)
        return M3LlavaCausalLMOutputWithPast(logits=logits, **{CACHE_NAME: cache})

    def _whole_prefill(
        self,
        pictures: Pictures,
        tiles: torch.FloatTensor,
        order: torch.LongTensor,
        input_ids: torch.LongTensor,
        attention_mask: torch.LongTensor,
        position_ids: torch.LongTensor,
    ) -> tuple[torch.FloatTensor, list[torch.FloatTensor]]:
        """What a graph holds; every number of it is Python's or a shape.

        Args:
            pictures: tiles of each picture, and tokens of each tile.
            tiles: (all tiles, channels, height, width).
            order: (b * s,), of each placeholder in reading order: which of all pooled tokens it stands for.
            input_ids, attention_mask, position_ids: (b, s).

        Returns:
            Logits of the last position, (b, 1, vocabulary), and keys and values of every layer, (b, heads, s, size of a head).
        """

        def pool(features: torch.Tensor) -> torch.Tensor:  # -> (all pooled tokens, size)
            parts = features.split([count for count, _ in pictures])
            if not self.config.keeps_class_token:
                sampling = self.config.visual_token_sampling
                parts = [pool_tiles(part, number, sampling) for part, (_, number) in zip(parts, pictures)]
            return joined([part.flatten(0, 1) for part in parts])

        # The projector's last layer is linear: what it makes of averages is the average of what it makes, at less cost.
        tokens = self.model._encode_tiles(tiles, pool=pool)["tile_features"]
        if self.model.image_newline is not None:
            tokens = torch.cat([tokens, self.model.image_newline[None].to(tokens.dtype)])
        is_placeholder = input_ids == self.config.image_token_id
        place = is_placeholder.flatten().cumsum(0) - 1
        visual = tokens[order[place.clamp(min=0)]].unflatten(0, input_ids.shape)
        embeds = self.get_input_embeddings()(input_ids)
        embeds = torch.where(is_placeholder.unsqueeze(-1), visual.to(embeds.dtype), embeds)
        cache = DynamicCache()
        hidden = self.model.language_model(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=True,
            **{CACHE_NAME: cache},
        ).last_hidden_state
        return self.get_logits(hidden[:, -1:]), [
            state for layer in cache.layers for state in (layer.keys, layer.values)
        ]


class FittingGraph(NamedTuple):
    """A graph, and what it is called with beside the prompts."""

    graph: Callable
    repeats: int  # rows of each prompt
    padding: int  # on the left
    tiles: torch.FloatTensor  # of all pictures, (all tiles, channels, height, width)
    order: torch.LongTensor


class PrefillGraphs:
    """The compiled prefills of a model, by what they are for.

    A copy of a model has none of its graphs, as these hold its weights.
    """

    def __init__(self, options: dict[str, Any]):
        self.options = options
        self.lengths: dict[tuple[Pictures, int], list[int]] = {}
        self.compiled: dict[tuple[Pictures, int, int], Any] = {}

    def __deepcopy__(self, memo: dict) -> None:
        return None

    def __reduce__(self) -> tuple:
        return type(None), ()

    def __len__(self) -> int:
        return len(self.compiled)

    def find(self, pictures: Pictures, prompts: int, length: int) -> tuple[Any, int] | None:
        """The shortest graph that holds such prompts, and its length."""
        lengths = self.lengths.get((pictures, prompts), [])
        place = bisect_left(lengths, length)
        if place == len(lengths):
            return None
        return self.compiled[pictures, prompts, lengths[place]], lengths[place]

    @torch.no_grad()
    def compile(self, model: Any, pictures: Pictures, prompts: int, length: int) -> None:
        """Adds a graph. Raises `ValueError` with torch's reason if there cannot be one."""
        code = _graph.__code__.replace(co_name=f"prefill_{len(self.compiled)}")  # torch counts graphs by code
        whole = types.FunctionType(code, globals(), closure=None)
        compiled = torch.compile(whole, fullgraph=True, dynamic=False, **self.options)
        on_device = model.device.type == "cuda"
        side = model.config.vision_config.image_size
        channels = model.config.vision_config.num_channels
        ids = torch.zeros(prompts, length, dtype=torch.long, device=model.device)
        tiles = torch.zeros(sum(count for count, _ in pictures), channels, side, side, device=model.device)
        order = torch.zeros(prompts * length, dtype=torch.long, device=model.device)
        inputs = tiles.to(model.dtype), order, ids, torch.ones_like(ids), torch.zeros_like(ids)
        try:
            for _ in range(3 if on_device else 1):  # CUDA graphs are warmed up, recorded, and replayed
                compiled(model, pictures, *inputs)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise ValueError(f"The prefill cannot be compiled: {str(error).splitlines()[0]}") from error

        def run(model: Any, *inputs: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
            if on_device:
                torch.compiler.cudagraph_mark_step_begin()
            with torch.compiler.set_stance("eager_on_recompile"):
                logits, states = compiled(model, pictures, *inputs)
            # The next call of a CUDA graph writes over these.
            return (logits.clone(), [state.clone() for state in states]) if on_device else (logits, states)

        self.compiled[pictures, prompts, length] = run
        self.lengths.setdefault((pictures, prompts), []).append(length)
        self.lengths[pictures, prompts].sort()


def _graph(model: Any, pictures: Pictures, *inputs: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    return model._whole_prefill(pictures, *inputs)


def _check_can_be_compiled(model: Any) -> None:
    """Raises `ValueError` for a model of which it is not known that one graph can hold it."""
    if model.training:
        raise ValueError("The model is in training mode, where nothing is generated: call model.eval() first.")
    devices = {str(parameter.device) for parameter in model.parameters()}
    offloaded = {"cpu", "disk"} & {str(device) for device in (getattr(model, "hf_device_map", None) or {}).values()}
    if len(devices) > 1 or "meta" in devices or (offloaded and devices != {"cpu"}):
        raise ValueError(
            f"The model is in parts ({', '.join(sorted(devices | offloaded))}), between which a graph cannot go: load it whole on one "
            "device to compile it."
        )
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_compileable:
        kind = quantizer.quantization_config.quant_method
        raise ValueError(
            f"This release cannot compile a model quantised by {getattr(kind, 'value', kind)}: load it without."
        )


def _kinds(config: Any, like: dict[str, Any] | None) -> Iterable[tuple[list[ImageLayout], list[int]]]:
    """The layouts of a call's pictures, with nothing cut off, and how many of them each prompt has."""
    side = config.vision_config.image_size

    def uncut(grid: tuple[int, int] | None) -> ImageLayout:
        return config.image_layout(grid, grid and (grid[0] * side, grid[1] * side))

    if like is not None:
        yield _kind_of(config, like, uncut)
    elif config.image_grid_pinpoints is None:
        yield [uncut(None)], [1]
    else:
        finest, most = max(config.visual_token_scales), {}
        for pair in config.image_grid_pinpoints:
            layout = uncut(tile_grid(pair, [pair], side))
            most[layout.num_tiles] = max(
                layout, most.get(layout.num_tiles, layout), key=lambda each: each.count(finest)
            )
        yield from (([layout], [1]) for layout in most.values())


def _kind_of(config: Any, like: dict[str, Any], uncut: Any) -> tuple[list[ImageLayout], list[int]]:
    missing = [name for name in ("input_ids", "pixel_values") if like.get(name) is None]
    if missing:
        raise ValueError(f"like has no {missing[0]}: pass what the processor returned for prompts with pictures.")
    facts = (like.get(name) for name in ("image_sizes", "image_tile_grids", "num_visual_tokens"))
    placeholders = (like["input_ids"] == config.image_token_id).sum(1)
    sizes, grids, numbers, placeholders = as_lists(*facts, placeholders)
    _, layouts = config.image_tiles(like["pixel_values"], sizes, grids, like.get("image_grid_pinpoints"))
    offered = config.visual_token_scales
    numbers = check_num_visual_tokens(laid_out(numbers, offered), offered, len(layouts))
    counts = iter([layout.count(number) for layout, number in zip(layouts, numbers)])
    prompts = []
    for remaining in placeholders:
        prompts.append(0)
        while remaining > 0:
            remaining -= next(counts, remaining)
            prompts[-1] += 1
    if sum(prompts) != len(layouts):
        raise ValueError("like has other pictures than its prompts show: pass what the processor returned.")
    return [uncut(layout.grid) for layout in layouts], prompts


def _lengths(layouts: list[ImageLayout], numbers: list[int], prompts: list[int], max_text: int) -> list[int]:
    counts = iter([layout.count(number) for layout, number in zip(layouts, numbers)])
    most = max(sum(next(counts) for _ in range(pictures)) for pictures in prompts)
    if any(layout.merge_type == "spatial_unpad" and layout.grid not in (None, (0, 0)) for layout in layouts):
        return [round(most * part) + max_text for part in OF_UNCUT]
    texts = [max_text]
    while texts[0] > SHORTEST_TEXT:
        texts.insert(0, 1 << (texts[0] - 1).bit_length() - 1)
    return [most + text for text in texts]


def _pictures(layouts: list[ImageLayout], numbers: list[int]) -> Pictures:
    return tuple((layout.num_tiles, number + layout.keeps_class_token) for layout, number in zip(layouts, numbers))


def _reading_order(layouts: list[ImageLayout], numbers: list[int], newline: bool, size: int) -> torch.LongTensor:
    """Which of all pooled tokens, tile after tile and then the newline, each visual token is; zeros up to `size`."""
    pictures = _pictures(layouts, numbers)
    total = sum(count * number for count, number in pictures)
    tokens = torch.arange(total)[:, None].split([count * number for count, number in pictures])
    newline = torch.tensor([total]) if newline else None
    merged = [layout.merge(part.view(*shape, 1), newline) for layout, part, shape in zip(layouts, tokens, pictures)]
    order = joined(merged)[:, 0]
    return nn.functional.pad(order, (0, size - len(order)))
