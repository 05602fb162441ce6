"""The untrained m3-tiny: its tokenizer, processor and model."""

from collections.abc import Iterable

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from modeling_m3 import (
    M3LlavaConfig,
    M3LlavaForConditionalGeneration,
    M3LlavaImageProcessorPil,
    M3LlavaProcessor,
)


VOCABULARY_SIZE = 512
# <s><|user|><image>\nWhat is there?<|assistant|>A cat.</s><|user|>...
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' }}"
    "{% set text = message['content'] %}"
    "{% if text is not string %}{% set text %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endset %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ text + eos_token }}{% endgeneration %}"
    "{% else %}{{ text }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most 512 tokens.

    Every digit and capital letter stands alone, so that codes are spelled; and every space, so that a word is the same
    token in a question and as an answer: a model that can say "red" then knows what is asked by "a red shape".
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("[0-9A-Z ]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<image>", "<|user|>", "<|assistant|>", "<|system|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos = ("<s>", tokenizer.token_to_id("<s>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[bos])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        model_max_length=1024,
        padding_side="left",
    )


def new_processor(tokenizer: PreTrainedTokenizerFast) -> M3LlavaProcessor:
    return M3LlavaProcessor(M3LlavaImageProcessorPil(), tokenizer, chat_template=CHAT_TEMPLATE)


def new_model(tokenizer: PreTrainedTokenizerFast) -> M3LlavaForConditionalGeneration:
    """2.8 million parameters: CLIP-shaped vision tower, Llama-shaped language model with tied embeddings."""
    token_ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = M3LlavaConfig(
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 128,
            "hidden_act": "gelu",
            "intermediate_size": 512,
            "num_hidden_layers": 5,
            "num_attention_heads": 4,
            "image_size": 336,
            "patch_size": 14,
            "projection_dim": 128,
        },
        text_config={
            "model_type": "llama",
            "vocab_size": VOCABULARY_SIZE,
            "hidden_size": 192,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,  # heads of 32: serving engines have kernels for no less
            "max_position_embeddings": 1024,
            "initializer_range": 0.06,  # attention of so small a model learns nothing for long from the usual 0.02
            "tie_word_embeddings": True,
            **token_ids,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        **token_ids,
    )
    model = M3LlavaForConditionalGeneration(config)
    positions = model.model.vision_tower.embeddings.position_embedding.weight
    with torch.no_grad():
        positions[1:] = 0.3 * _sines_and_cosines(config.grid_side, positions.shape[1])
    for name, value in token_ids.items():
        setattr(model.generation_config, name, value)
    model.generation_config.do_sample = False
    return model


def _sines_and_cosines(side: int, size: int) -> torch.Tensor:
    """(side * side, size): positions of a grid to begin with, in which neighbours are alike.

    With random ones the vision tower needs most of its time to find out which patches lie side by side.
    """
    frequencies = 1 / 100 ** torch.linspace(0, 1, size // 4)
    angles = torch.arange(side)[:, None] * frequencies
    one_axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows, columns = one_axis[:, None].expand(-1, side, -1), one_axis[None].expand(side, -1, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1)
