"""Checkpoints of random weights in real shapes: what speed and memory depend on."""

from pathlib import Path

import torch

from modeling_m3 import M3LlavaConfig, M3LlavaForConditionalGeneration
from modeling_m3.visual_tokens import tile_grid


# The language model's shape; "1b" is TinyLlama-1.1B's. The vision tower is CLIP-ViT-L/14-336, but for "tiny".
SHAPES = {
    "tiny": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4},
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
}
_TINY_VISION = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 336,
    "patch_size": 14,
}


# LLaVA-1.6's, as (height, width), and one of 3x3 tiles as in Table 5 of the paper.
PINPOINTS = [[672, 336], [336, 672], [672, 672], [336, 1008], [1008, 336], [1008, 1008]]


def random_config(size: str, cut_into_tiles: bool = False) -> M3LlavaConfig:
    """LLaVA-1.5-M3, or LLaVA-NeXT-M3, with a language model of a shape of `SHAPES`."""
    tiles = {"image_grid_pinpoints": PINPOINTS, "patch_merge_type": "spatial_unpad"} if cut_into_tiles else {}
    vision = _TINY_VISION if size == "tiny" else None
    return M3LlavaConfig(vision_config=vision, text_config={**SHAPES[size], "vocab_size": 32064}, **tiles)


def random_model(
    size: str, dtype: torch.dtype = torch.float32, cut_into_tiles: bool = False, device: str = "cpu"
) -> M3LlavaForConditionalGeneration:
    return build(random_config(size, cut_into_tiles), dtype, device)


def build(config: M3LlavaConfig, dtype: torch.dtype, device: str) -> M3LlavaForConditionalGeneration:
    """Weights are random but the same in every run on that kind of device, where they are made."""
    torch.manual_seed(0)
    with torch.device(device):
        return M3LlavaForConditionalGeneration(config).to(dtype).eval()


def save_random_checkpoint(size: str, folder: Path) -> None:
    """In float32. What is there already is kept."""
    if not (folder / "config.json").exists():
        random_model(size).save_pretrained(folder)


def prompt(
    model: M3LlavaForConditionalGeneration,
    scale: int,
    text: int = 64,
    batch: int = 1,
    images: int = 1,
    image_size: tuple[int, int] = (336, 336),
) -> dict[str, torch.Tensor]:
    """Inputs on the model's device, as a processor makes them: in every prompt, images between two halves of the text.

    Args:
        model: its configuration decides whether images are cut into tiles.
        scale: visual tokens per tile.
        text: tokens that are not visual ones, but for the one that begins the sequence.
        batch: prompts.
        images: per prompt.
        image_size: (height, width) in pixels; matters where images are cut into tiles.
    """
    config, generator = model.config, torch.Generator().manual_seed(0)
    side, grid = config.vision_config.image_size, None
    if config.image_grid_pinpoints is not None:
        grid = tile_grid(image_size, config.image_grid_pinpoints, side)
    layout = config.image_layout(grid, image_size)
    placeholders = images * layout.count(scale)
    words = torch.randint(3, config.text_config.vocab_size - 1, (batch, text), generator=generator)
    words += words >= config.image_token_id  # any token but a placeholder
    ids = torch.cat(
        [
            torch.ones(batch, 1, dtype=torch.long),
            words[:, : text // 2],
            torch.full((batch, placeholders), config.image_token_id),
            words[:, text // 2 :],
        ],
        dim=1,
    )
    tiles = () if grid is None else (layout.num_tiles,)
    pixels = torch.randn(batch * images, *tiles, 3, side, side, generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels.to(model.dtype)}
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    inputs["num_visual_tokens"] = torch.full((batch * images,), scale)
    inputs["image_tile_grids"] = torch.tensor([grid or (0, 0)] * batch * images)
    if grid is not None:
        inputs["image_sizes"] = torch.tensor([image_size] * batch * images)
    return inputs
