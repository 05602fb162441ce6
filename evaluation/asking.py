"""Asks all questions of a task at all scales, batch after batch, and records what came of each."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .answering import Answerer, Chat, pictures_of
from .record import Record, add_thumbnail


MOST_PICTURES = 2000  # of a task, of which small copies are kept


def ask_all(
    answerer: Answerer,
    scales: Sequence[int],
    questions: Sequence[tuple[str, dict[str, Any]]],
    chat_of: Callable[[int], Chat],
    record: Record,
    run_folder: Path,
    batch_size: int,
    desc: str,
    continuation_of: Callable[[int], str] | None = None,
    quiet: bool = False,
) -> None:
    """Completes the record.

    Args:
        answerer, scales: who is asked, at which numbers of visual tokens.
        questions: (key, arguments of `generate`) of each.
        chat_of: the messages of a question, by its index; asked for when its turn comes, so pictures are in memory by batch.
        record: what is known already is not asked again.
        run_folder: where small copies of the pictures go.
        batch_size: prompts at once.
        desc: what the progress bar says, which shows the time that is left.
        continuation_of: for likelihoods, what the answer would be.
        quiet: shows no progress.
    """
    groups: dict[str, list[int]] = {}
    for index, (_, settings) in enumerate(questions):
        groups.setdefault(repr(sorted(settings.items())), []).append(index)
    asked = 0
    with tqdm(total=len(questions), desc=desc, unit=" questions", disable=quiet) as progress:
        for group in groups.values():
            for start in range(0, len(group), batch_size):
                batch = group[start : start + batch_size]
                if record.missing(questions[index][0] for index in batch):
                    chats = [chat_of(index) for index in batch]
                    settings = questions[batch[0]][1]
                    torch.manual_seed(batch[0])  # where a task samples, it samples the same when a run goes on
                    if continuation_of is None:
                        found = answerer.answer(chats, scales, **settings)
                    else:
                        found = answerer.likelihoods(chats, [continuation_of(index) for index in batch], scales)
                    record.add(
                        {
                            questions[index][0]: {
                                "results": [asdict(result) for result in results],
                                "pictures": _thumbnails(chat, run_folder) if asked < MOST_PICTURES else [],
                                **_keys(answerer, chat),
                            }
                            for index, chat, results in zip(batch, chats, found)
                        }
                    )
                asked += len(batch)
                progress.update(len(batch))


def _thumbnails(chat: Chat, folder: Path) -> list[str]:
    return [add_thumbnail(folder, picture, Answerer.key_of(picture)[:32]) for picture in pictures_of(chat)]


def _keys(answerer: Answerer, chat: Chat) -> dict[str, list[str]]:
    """Of the pictures, where signals are kept: questions about the same ones are not independent."""
    return {"keys": [Answerer.key_of(picture)[:32] for picture in pictures_of(chat)]} if answerer.keep_signals else {}
