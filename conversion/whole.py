"""What is asked of a folder before it appears: whether every tensor is there, and a picture can be asked about."""

import logging
from pathlib import Path

import torch
from PIL import Image
from safetensors import safe_open

from modeling_m3 import M3LlavaConfig, M3LlavaForConditionalGeneration, M3LlavaProcessor
from modeling_m3.loading_m3 import quantizable_layers

from .original import ConversionError


logger = logging.getLogger(__name__)


def expected_shapes(config: M3LlavaConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors that a configuration asks for, by name, as they are before any is quantized."""
    return _shapes(_without_values(config))


def check_weights(folder: Path, config: M3LlavaConfig) -> None:
    """Raises `ConversionError` unless the weight files of a folder hold what its configuration asks for.

    Of a layer that is stored in 4 or 8 bits, the packed weight must be there, in whatever shape, and its scales.
    """
    found: dict[str, tuple[int, ...]] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            found |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}
    model = _without_values(config)
    packed = set() if getattr(config, "quantization_config", None) is None else set(quantizable_layers(model))
    for name, shape in _shapes(model).items():
        if name not in found:
            raise ConversionError(f"{name} was not written, which the configuration asks for")
        if name.removesuffix(".weight") in packed:
            if f"{name}.absmax" not in found and f"{name.removesuffix('weight')}SCB" not in found:
                raise ConversionError(f"the scales of {name}, which is quantized, were not written")
        elif found[name] != shape:
            raise ConversionError(f"{name} was written in the shape {found[name]}, but {shape} is asked for")


def check_chat(folder: Path) -> None:
    """Has a picture and a question laid out for the model that a folder describes, by its processor and chat template.

    Raises:
        ConversionError: there is not a placeholder for each visual token, or a token that the embedding has no row for; or the
            template takes no picture, neither as a part of a message nor as a mark in its text.
    """
    config = M3LlavaConfig.from_pretrained(folder)
    failures = []
    for as_text in (False, True):
        try:
            _lay_out(folder, config, as_text)
            break
        except ConversionError:
            raise
        except Exception as error:  # a template may raise what it likes
            text = " ".join(str(error).split())
            failures.append(text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}")
    if len(failures) == 2:
        raise ConversionError(
            f"the chat template takes no picture with a question ({failures[0]}): name another one by --chat-template"
        )
    if failures:
        logger.warning(
            "its chat template takes a picture only as a mark in a text, not as a part of a message, as m3-ask gives it (%s): "
            "--chat-template names another one",
            failures[0],
        )


def _lay_out(folder: Path, config: M3LlavaConfig, as_text: bool) -> None:
    processor = M3LlavaProcessor.from_pretrained(folder, backend="pil")
    questions = ("What?", "What is it, and of which colour?")  # the shorter one is padded
    prompts = []
    for question in questions:
        parts = [{"type": "image"}, {"type": "text", "text": question}]
        content = f"{processor.image_token}\n{question}" if as_text else parts
        chat = [{"role": "user", "content": content}]
        prompts.append(processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))
        if question.casefold() not in prompts[-1].casefold():
            raise ValueError(f"of a question it makes {prompts[-1][:80]!r}")
    pictures = [[Image.new("RGB", (48, 32))] for _ in prompts]
    inputs = processor(images=pictures, text=prompts, padding=True, return_tensors="pt")
    ids, rows = inputs["input_ids"], config.text_config.vocab_size
    if (highest := int(ids.max())) >= rows:
        raise ConversionError(
            f"the tokenizer has {processor.tokenizer.convert_ids_to_tokens(highest)!r} as {highest}, but the embedding has {rows} "
            "rows: use the tokenizer files of this checkpoint"
        )
    laid_out, expected = (ids == config.image_token_id).sum(1).tolist(), _placeholders(config, inputs)
    if laid_out != expected:
        raise ConversionError(
            f"pictures have {laid_out} placeholders (image_token_id {config.image_token_id}), but the model makes {expected} visual "
            "tokens of them: processor, tokenizer and configuration are not of one checkpoint"
        )


def _placeholders(config: M3LlavaConfig, inputs: dict[str, torch.Tensor]) -> list[int]:
    """How many visual tokens the model makes of each picture."""
    sizes, grids = (inputs[name].tolist() if name in inputs else None for name in ("image_sizes", "image_tile_grids"))
    _, layouts = config.image_tiles(inputs["pixel_values"], sizes, grids)
    scales = inputs["num_visual_tokens"].tolist()
    return [layout.count(scale or max(config.visual_token_scales)) for layout, scale in zip(layouts, scales)]


def _without_values(config: M3LlavaConfig) -> M3LlavaForConditionalGeneration:
    with torch.device("meta"):
        return M3LlavaForConditionalGeneration(config)


def _shapes(model: M3LlavaForConditionalGeneration) -> dict[str, tuple[int, ...]]:
    shapes = {name: tuple(parameter.shape) for name, parameter in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    return shapes
