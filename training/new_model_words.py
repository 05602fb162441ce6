"""A projector that begins near words: its tokens are trained to be like the input embeddings of what a picture shows.

LLaVA's first stage begins with a random projector and leaves it to the language model's gradients to find out what the
language model would understand. That takes more captions than two CPU cores get through in an hour. The first part of the
way needs no language model at all: tokens that lie near the embeddings of "circle" and "orange" are understood by it at once.

Shapes use: b scenes, n visual tokens, d hidden size of the language model, w words.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.functional import cross_entropy, normalize
from transformers import PreTrainedTokenizerBase

from modeling_m3.visual_tokens import pool_tiles

from .m3_tiny.scenes import COLORS, SHAPES


STEPS = 120
ROWS = 32
LEARNING_RATE = 2e-3
SCALES = (1, 9, 9, 36)
# How much better the likeness to the right word must be; and the length from which tokens are held back, which is the usual
# one of embeddings.
SHARPNESS = 4.0
LENGTH = 3.0
WORDS = (SHAPES, tuple(COLORS))


def train_on_words(
    projector: nn.Module,
    embeddings: torch.Tensor,
    tokenizer: PreTrainedTokenizerBase,
    seen: torch.Tensor,
    facts: Sequence[tuple[str, ...]],
    steps: int = STEPS,
) -> list[float]:
    """Trains the projector in place. Returns the loss of each step.

    Args:
        projector: from the tower's hidden size to d.
        embeddings: (vocabulary, d), of the language model's input.
        tokenizer: of the language model.
        seen: (b, patches, hidden size of the tower), patches of a square grid of an even side.
        facts: the right word of each of `WORDS`, for every scene.
        steps: of training.
    """
    side = int(seen.shape[1] ** 0.5)
    # Every second patch of every second row: four times as fast, and of nearly the same average.
    seen = seen.unflatten(1, (side, side))[:, ::2, ::2].flatten(1, 2)
    mean = embeddings.mean(0)
    vectors = [normalize(word_vectors(embeddings - mean, tokenizer, words), dim=1) for words in WORDS]
    right = [
        torch.tensor([words.index(word) for word in column]) for words, column in zip(WORDS, zip(*facts), strict=True)
    ]
    rng = random.Random("new model words")
    optimizer = torch.optim.AdamW(projector.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.05)
    losses = []
    for _ in range(steps):
        rows = rng.sample(range(len(seen)), min(ROWS, len(seen)))
        tokens = pool_tiles(projector(seen[rows].float()), rng.choice(SCALES), "average") - mean
        loss = (tokens.norm(dim=-1) - LENGTH).relu().square().mean()
        for matrix, classes in zip(vectors, right):
            loss = loss + cross_entropy(likeness(tokens, matrix), classes[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def likeness(tokens: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """How much the token that is most like a word is like it, softly: (b, w) from (b, n, d) and unit vectors (w, d)."""
    return torch.logsumexp(SHARPNESS * (tokens @ vectors.T), dim=1)


def word_vectors(embeddings: torch.Tensor, tokenizer: PreTrainedTokenizerBase, words: Sequence[str]) -> torch.Tensor:
    """(w, d): the embedding of each word inside a sentence, an average where it is several tokens."""
    ids = [tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for word in words]
    return torch.stack([embeddings[row].mean(0) for row in ids])
