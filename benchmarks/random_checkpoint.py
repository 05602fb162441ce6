"""Checkpoints of random weights in real shapes: what speed and memory depend on."""

from pathlib import Path

import torch

from modeling_m3 import M3LlavaConfig, M3LlavaForConditionalGeneration


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


def random_config(size: str) -> M3LlavaConfig:
    """LLaVA-1.5-M3 with a language model of a shape of `SHAPES`."""
    vision = _TINY_VISION if size == "tiny" else None
    return M3LlavaConfig(vision_config=vision, text_config={**SHAPES[size], "vocab_size": 32064})


def random_model(size: str, dtype: torch.dtype = torch.float32) -> M3LlavaForConditionalGeneration:
    torch.manual_seed(0)
    return M3LlavaForConditionalGeneration(random_config(size)).to(dtype).eval()


def save_random_checkpoint(size: str, folder: Path) -> None:
    """In float32. What is there already is kept."""
    if not (folder / "config.json").exists():
        random_model(size).save_pretrained(folder)


def prompt(model: M3LlavaForConditionalGeneration, scale: int, text: int = 64) -> dict[str, torch.Tensor]:
    """Inputs of one image at `scale` visual tokens and `text` other ones, on the model's device."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(3, 30000, (text,), generator=generator).tolist()
    ids = torch.tensor([[1, *words[: text // 2], *[model.config.image_token_id] * scale, *words[text // 2 :]]])
    side = model.config.vision_config.image_size
    pixels = torch.randn(1, 3, side, side, generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels.to(model.dtype)}
    return {name: value.to(model.device) for name, value in inputs.items()} | {
        "num_visual_tokens": torch.tensor([scale])
    }
