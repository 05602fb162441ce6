"""A conversation as the checkpoint's own chat template writes it: what the model reads, and which of it are answers.

What is supervised is one rule. The prompt of an answer is what the template makes of the turns before it with
`add_generation_prompt=True`; everything that it then writes, up to and with the end of that turn, is supervised. Where it writes
no end of a turn, the tokenizer's end token is added.

A template is anybody's program, and may drop what it is given without a word. So it is asked twice: about the conversation, and
about its outline, with a name in the place of each text. The outline tells where texts belong; the conversation must be the
outline with its texts in those places, or it is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Turn:
    """What one side says.

    Attributes:
        role: "user" or "assistant".
        text: without marks of images.
        images: how many stand in it; they come first.
    """

    role: str
    text: str
    images: int = 0


@dataclass(frozen=True)
class Written:
    """A text for the model.

    Attributes:
        text: with one mark for each image.
        answers: which of its characters are supervised, in order.
        adds_end: whether an answer's end is the tokenizer's end token, since the template writes none.
    """

    text: str
    answers: list[range]
    adds_end: bool


class ChatTemplateError(ValueError):
    """A conversation that a template does not write whole."""


@dataclass(frozen=True)
class _Answer:
    """An answer in outlines.

    Attributes:
        turn: its index.
        prompt: the outline of its prompt.
        outline: of the turns up to and with it.
        start: where in that the prompt's end is.
        place: where its text begins.
        stop: where its turn ends.
        has_end: whether the template writes an end of the turn.
    """

    turn: int
    prompt: str
    outline: str
    start: int
    place: int
    stop: int
    has_end: bool


class ChatTemplate:
    """A chat template.

    Args:
        tokenizer: whose special tokens it may write.
        template: in Jinja.
        image_token: what it writes for an image.

    Attributes:
        special_ids: of the tokenizer's special tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str, image_token: str):
        self.tokenizer, self.template, self.image_token = tokenizer, template, image_token
        added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._special = {token for token in (*tokenizer.all_special_tokens, *added) if token}
        self._ends = ({tokenizer.eos_token} | self._special - {tokenizer.bos_token, image_token}) - {None}
        self.special_ids = set(tokenizer.convert_tokens_to_ids(sorted(self._special)))
        self._content = self._fitting_content()

    def write(self, turns: Sequence[Turn]) -> list[Written]:
        """Return the texts that a conversation becomes: one; or one for each answer, where the template rewrites earlier turns.

        Answers without a text are not supervised.

        Raises:
            ChatTemplateError: the template drops, repeats, moves or changes a text, by the number of its turn; it fails; it
                begins an answer otherwise than the prompt for one ends, but for white space; or a text holds a special token of the tokenizer's.
        """
        for index, turn in enumerate(turns):
            self._check_plain(index, turn)
        written = self._written(turns, self._content)
        if self.tokenizer.eos_token is None and any(one.adds_end for one in written):
            raise ChatTemplateError(
                "the chat template writes no end of a turn, and the tokenizer has no end token to add"
            )
        return written

    def _fitting_content(self) -> Callable[[Turn, str, str], Any]:
        """How this template wants contents: most read texts and lists of parts, some one of them alone."""
        chat = [
            Turn("user", "What?", 1),
            Turn("assistant", "This."),
            Turn("user", "Where?"),
            Turn("assistant", "There."),
        ]
        for turns in (chat, chat[:2]):  # since some take one question alone
            for content in _CONTENTS:
                try:
                    self._written(turns, content)
                    return content
                except ChatTemplateError:
                    continue
        # None fits, and records are refused for what is missing under the one that it reads most of.
        return max(_CONTENTS, key=lambda content: self._texts_read(chat, content))

    def _texts_read(self, chat: Sequence[Turn], content: Callable[[Turn, str, str], Any]) -> int:
        try:
            text = self._rendered(self._messages(chat, [turn.text for turn in chat], content))
        except ChatTemplateError:
            return -1
        return sum(turn.text in text for turn in chat)

    def _messages(
        self, turns: Sequence[Turn], texts: Sequence[str], content: Callable[[Turn, str, str], Any]
    ) -> list[dict[str, Any]]:
        given = [content(turn, text, self.image_token) for turn, text in zip(turns, texts)]
        return [{"role": turn.role, "content": one} for turn, one in zip(turns, given)]

    def _written(self, turns: Sequence[Turn], content: Callable[[Turn, str, str], Any]) -> list[Written]:
        texts = [turn.text for turn in turns]
        names = [f"text-{index:04}-here" if text.strip() else text for index, text in enumerate(texts)]
        plain, named = self._messages(turns, texts, content), self._messages(turns, names, content)
        answers = [
            self._answer(turns, named[: index + 1], names)
            for index, turn in enumerate(turns)
            if turn.role == "assistant" and turn.text.strip()
        ]
        whole = self._rendered(named)
        if all(whole.startswith(a.prompt) and whole.startswith(a.outline[: a.stop]) for a in answers):
            return [self._at_once(whole, turns, plain, names, answers)]
        return [self._alone(turns[: answer.turn + 1], plain[: answer.turn + 1], names, answer) for answer in answers]

    def _answer(self, turns: Sequence[Turn], named: list[dict[str, Any]], names: list[str]) -> _Answer:
        index = len(named) - 1
        prompt, outline = self._rendered(named[:-1], prompts=True), self._rendered(named)
        earlier = next((name for name in reversed(names[:index]) if name.strip()), "")
        place = outline.rfind(names[index])
        if place < 0:
            raise _fault("drops", index, turns)
        # What comes before the last text may be written otherwise once the answer is there; what follows it begins the answer.
        begun, before = (
            text[text.rfind(earlier) + len(earlier) :] if earlier else text for text in (prompt, outline[:place])
        )
        length = _length_begun(begun, before)
        if length is None:
            raise ChatTemplateError(
                f"the chat template ends its prompt for turn {index + 1} with {_short(begun)}, and the same turn, once it is there, "
                f"begins with {_short(before)}"
            )
        stop = place + len(names[index])
        end = self._end_of_turn(outline[stop:])
        return _Answer(index, prompt, outline, place - len(before) + length, place, stop + end, end > 0)

    def _end_of_turn(self, tail: str) -> int:
        """How much of what follows a text is the end of its turn: up to its first special token, or else to its last word."""
        found = [token for token in self._ends if token in tail]
        if not found:
            return len(tail.rstrip())
        first = min(found, key=lambda token: (tail.index(token), -len(token)))
        return tail.index(first) + len(first)

    def _at_once(
        self, whole: str, turns: Sequence[Turn], plain: list[dict[str, Any]], names: list[str], answers: list[_Answer]
    ) -> Written:
        """All answers in one text."""
        text, places = self._filled(whole, turns, plain, names)
        written, done = Written("", [], False), 0
        for answer in answers:
            start, stop = _moved(answer, places[answer.turn], names)
            if self._rendered(plain[: answer.turn], prompts=True) != text[:start]:
                raise ChatTemplateError(
                    f"the chat template writes another prompt for turn {answer.turn + 1} than stands before it"
                )
            written = self._with_answer(written, text[done:start], text[start:stop], answer)
            done = stop
        return replace(written, text=written.text + text[done:])

    def _alone(self, turns: Sequence[Turn], plain: list[dict[str, Any]], names: list[str], answer: _Answer) -> Written:
        """One answer after its own prompt."""
        prompt, _ = self._filled(answer.prompt, turns[:-1], plain[:-1], names, prompts=True)
        text, places = self._filled(answer.outline, turns, plain, names)
        start, stop = _moved(answer, places[answer.turn], names)
        return self._with_answer(Written("", [], False), prompt, text[start:stop], answer)

    def _with_answer(self, written: Written, prompt: str, text: str, answer: _Answer) -> Written:
        if not answer.has_end:
            text += self.tokenizer.eos_token or ""
        start = len(written.text) + len(prompt)
        answers = [*written.answers, range(start, start + len(text))]
        return Written(written.text + prompt + text, answers, written.adds_end or not answer.has_end)

    def _filled(
        self, outline: str, turns: Sequence[Turn], plain: list[dict[str, Any]], names: list[str], prompts: bool = False
    ) -> tuple[str, dict[int, tuple[int, int]]]:
        """The text of which `outline` is the outline, and where in it the texts of turns begin and end."""
        images, found = sum(turn.images for turn in turns), outline.count(self.image_token)
        if found != images:
            raise ChatTemplateError(f"the chat template writes {found} image mark(s) for {images} image(s)")
        text = self._rendered(plain, prompts)
        return text, _places(outline, text, turns, names)

    def _rendered(self, messages: list[dict[str, Any]], prompts: bool = False) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                messages, chat_template=self.template, tokenize=False, add_generation_prompt=prompts
            )
        except Exception as error:  # whatever a program from elsewhere may raise; it is told by the record's name
            raise ChatTemplateError(
                f"the chat template fails: {type(error).__name__}: {' '.join(str(error).split())}"
            ) from error

    def _check_plain(self, index: int, turn: Turn) -> None:
        for token in self._special:
            if token in turn.text:
                found = self.tokenizer(turn.text, add_special_tokens=False)["input_ids"]
                if self.tokenizer.convert_tokens_to_ids(token) in found:
                    raise ChatTemplateError(
                        f"the text of turn {index + 1} ({turn.role}) holds {token!r}, which the tokenizer reads as a special token"
                    )


def _places(outline: str, text: str, turns: Sequence[Turn], names: Sequence[str]) -> dict[int, tuple[int, int]]:
    """Where the texts of turns begin and end in a conversation, by index; ends of white space may be gone.

    Raises:
        ChatTemplateError: a text is not there as it is, once and in order.
    """
    slots = [index for index, turn in enumerate(turns) if turn.text.strip()]
    begins = [outline.find(names[index]) for index in slots]
    for index, begin in zip(slots, begins):
        if begin < 0:
            raise _fault("drops", index, turns)
        if outline.count(names[index]) > 1:
            raise _fault("repeats", index, turns)
    if begins != sorted(begins):
        raise _fault("moves", slots[next(i for i, begin in enumerate(begins) if begin != sorted(begins)[i])], turns)
    places, cursor = {}, begins[0] if slots else 0
    if not text.startswith(outline[:cursor]):
        raise _fault("changes", slots[0], turns)
    for index, begin, follows in zip(slots, begins, [*begins[1:], len(outline)]):
        after = outline[begin + len(names[index]) : follows]
        for given in _with_ends_trimmed(turns[index].text):
            stop = cursor + len(given) + len(after)
            if text.startswith(given + after, cursor) and (follows < len(outline) or stop == len(text)):
                break
        else:
            as_it_is = any(text.startswith(given, cursor) for given in _with_ends_trimmed(turns[index].text))
            raise _fault("changes what follows" if as_it_is else "changes", index, turns)
        places[index] = (cursor, cursor + len(given))
        cursor = stop
    return places


def _moved(answer: _Answer, place: tuple[int, int], names: Sequence[str]) -> tuple[int, int]:
    """Where what is supervised of an answer begins and ends, given where its text does."""
    begin, end = place
    return begin - (answer.place - answer.start), end + answer.stop - (answer.place + len(names[answer.turn]))


def _length_begun(begun: str, before: str) -> int | None:
    """How much of what a template writes before an answer the end of its prompt stands for; None where it is another beginning.

    White space may differ (that of LLaVA-OneVision has a space after the name of a side in turns, and none in prompts): what
    both have at their ends counts once.
    """
    if before.startswith(begun):
        return len(begun)
    rest, space = before, begun[len(begun.rstrip()) :]
    for character in "".join(begun.split()):
        rest = rest.lstrip()
        if not rest.startswith(character):
            return None
        rest = rest[1:]
    return len(before) - len(rest.removeprefix(space) if rest.startswith(space) else rest.lstrip())


def _with_ends_trimmed(text: str) -> list[str]:
    """A text and what templates make of its ends, the longest first."""
    given = {text, text.strip(), text.lstrip(), text.rstrip(), text.strip("\n"), text.lstrip("\n"), text.rstrip("\n")}
    return sorted(given, key=len, reverse=True)


def _fault(what: str, index: int, turns: Sequence[Turn]) -> ChatTemplateError:
    return ChatTemplateError(
        f"the chat template {what} the text of turn {index + 1} ({turns[index].role}), {_short(turns[index].text)}"
    )


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def _text_or_parts(turn: Turn, text: str, image_token: str) -> Any:
    return _parts(turn, text, image_token) if turn.images else text


def _parts(turn: Turn, text: str, image_token: str) -> Any:
    return [{"type": "image"}] * turn.images + [{"type": "text", "text": text}]


def _text(turn: Turn, text: str, image_token: str) -> Any:
    """For templates that know nothing of images: as the original writes them, each a mark and a newline."""
    return "\n".join([image_token] * turn.images + [text] * bool(text or not turn.images))


_CONTENTS = (_text_or_parts, _parts, _text)
