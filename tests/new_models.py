"""Tiny random vision towers and language models, made by transformers' own classes, for `m3-create` to put together."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.clip import CLIPImageProcessorPil
from transformers.models.siglip import SiglipImageProcessorPil


SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<|turn|>", "<|end|>")
VOCABULARY = 256 + len(SPECIAL_TOKENS)

# How chats are written: with no token that begins them; with one; with one, no system and other names of speakers; and with none
# though the tokenizer has one.
TURNS = (
    "{% for message in messages %}<|turn|>{{ message['role'] }}\n{{ message['content'] | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
NO_SYSTEM = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system here') }}{% endif %}\n"
    "  {% for message in messages %}<|turn|>{{ 'model' if message['role'] == 'assistant' else 'user' }}\n{{ message['content'] }}"
    "<|end|>{% endfor %}{% if add_generation_prompt %}<|turn|>model\n{% endif %}"
)

# Model types with what differs, whether prompts begin with a token, the chat template, and the tower each is tried with.
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {"tower": "siglip", "bos": False, "template": TURNS, "vocab_size": 320, "tie_word_embeddings": False},
    "qwen3": {"tower": "siglip", "bos": False, "template": TURNS, "head_dim": 16},
    "llama": {"tower": "clip", "bos": True, "template": "{{ bos_token }}" + TURNS, "tie_word_embeddings": False},
    "smollm2": {"tower": "siglip", "bos": False, "template": TURNS, "model_type": "llama"},
    "smollm3": {"tower": "clip", "bos": False, "template": TURNS, "num_hidden_layers": 4},
    "gemma": {"tower": "clip", "bos": True, "template": NO_SYSTEM, "head_dim": 16},
    "gemma2": {
        **{"tower": "siglip", "bos": True, "template": NO_SYSTEM, "head_dim": 16, "sliding_window": 8},
        **{"final_logit_softcapping": 10.0, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 16},
    },
    "gemma3_text": {
        **{
            "tower": "clip",
            "bos": True,
            "template": NO_SYSTEM,
            "head_dim": 16,
            "sliding_window": 8,
            "num_hidden_layers": 4,
        },
        **{"layer_types": ["sliding_attention", "full_attention"] * 2, "query_pre_attn_scalar": 16},
    },
    "phi3": {"tower": "siglip", "bos": False, "template": TURNS, "tie_word_embeddings": False, "sliding_window": 8},
    "olmo": {"tower": "clip", "bos": True, "template": TURNS, "tie_word_embeddings": False},
    "olmo2": {"tower": "siglip", "bos": False, "template": TURNS, "tie_word_embeddings": False},
    "mistral": {"tower": "clip", "bos": True, "template": "{{ bos_token }}" + TURNS, "sliding_window": 8},
    "granite": {
        **{"tower": "clip", "bos": False, "template": TURNS, "logits_scaling": 3.0, "embedding_multiplier": 5.0},
        **{"residual_multiplier": 0.5},
    },
    "cohere": {"tower": "siglip", "bos": True, "template": "{{ bos_token }}" + TURNS, "logit_scale": 0.5},
}


@cache
def tokenizer(bos: bool, template: str | None) -> PreTrainedTokenizerFast:
    """Of bytes, with five special tokens; prompts begin with one of them where `bos` is set."""
    ids = {text: number for number, text in enumerate((*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())))}
    backend = Tokenizer(models.BPE(ids, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", ids["<s>"])])
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>" if bos else None, eos_token="<|end|>", pad_token="<pad>"
    )
    made.chat_template = template
    return made


def make_language_model(folder: Path, family: str, **changes: Any) -> Path:
    """A folder that transformers' own class of the family saved."""
    settings = {**FAMILIES[family], **changes}
    config = AutoConfig.for_model(
        **{
            **{"model_type": family, "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96},
            **{
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 512,
            },
            **{
                "initializer_range": 0.2,
                "pad_token_id": 0,
                "bos_token_id": 1,
                "eos_token_id": 4,
                "tie_word_embeddings": True,
            },
            **{key: value for key, value in settings.items() if key not in ("tower", "bos", "template", "dtype")},
        }
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=settings.get("dtype", torch.float32))
    for name, parameter in model.named_parameters():  # as after training: none is all ones or zeros
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, mean=float(name.endswith("weight")), std=0.1)
    model.save_pretrained(folder)
    tokenizer(settings["bos"], settings["template"]).save_pretrained(folder)
    return folder


def make_tower(folder: Path, kind: str, **changes: Any) -> Path:
    """A folder of a CLIP or a SigLIP vision model, with its image processor: a 9x9 grid of patches of 4 pixels."""
    sizes = {
        "image_size": 36,
        "patch_size": 4,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 2,
        **changes,
    }
    torch.manual_seed(1)
    size = {"height": 36, "width": 36}
    if kind == "siglip":
        tower = SiglipVisionModel(SiglipVisionConfig(num_hidden_layers=3, **sizes))
        images = SiglipImageProcessorPil(size=size, resample=2, image_mean=[0.5] * 3, image_std=[0.4] * 3)
    else:
        tower = CLIPVisionModel(CLIPVisionConfig(num_hidden_layers=3, **sizes))
        images = CLIPImageProcessorPil(size={"shortest_edge": 36}, crop_size=size)
    for parameter in tower.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    tower.save_pretrained(folder)
    images.save_pretrained(folder)
    return folder


def reference_tokens(
    tower: torch.nn.Module, layer: int, leading: int, weights: dict[str, torch.Tensor], pixels: torch.Tensor, scale: int
) -> torch.Tensor:
    """Visual tokens of pictures, (pictures, scale, d), by transformers' own tower, plain layers and pooling."""
    features = tower(pixels, output_hidden_states=True).hidden_states[layer][:, leading:]
    features = F.linear(features, weights["linear_1.weight"], weights["linear_1.bias"])
    features = F.linear(F.gelu(features), weights["linear_2.weight"], weights["linear_2.bias"])
    side, wanted = round(features.shape[1] ** 0.5), round(scale**0.5)
    grid = features.transpose(1, 2).unflatten(2, (side, side))
    return F.avg_pool2d(grid, side // wanted).flatten(2).transpose(1, 2)
