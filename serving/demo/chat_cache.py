"""What stays of a chat between its turns, so that a turn computes only what is new."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass
class ChatCache:
    """Keys and values of the tokens `ids`, among which are those of `pictures`, each with its number of visual tokens."""

    ids: list[int]
    pictures: list[tuple[str, int]]
    cache: Any

    def shared_with(
        self, ids: Sequence[int], pictures: Sequence[tuple[str, int]], counts: Sequence[int], image_token_id: int
    ) -> tuple[int, int]:
        """How many tokens a prompt begins with that are here, and how many of its pictures are among them, none of them cut.

        The prompt's last token is never one: its logits are to be computed.

        Args:
            ids, pictures: of the prompt.
            counts: placeholders of each picture.
        """
        pairs = enumerate(zip(self.ids, ids[:-1]))
        length = next((i for i, (held, asked) in pairs if held != asked), min(len(self.ids), len(ids) - 1))
        end = 0
        for index, (picture, count) in enumerate(zip(pictures, counts)):
            begin = ids.index(image_token_id, end)
            end = begin + count
            if begin >= length:
                return length, index
            if end > length or self.pictures[index : index + 1] != [picture]:
                return begin, index
        return length, len(pictures)
