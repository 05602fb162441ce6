"""`generate` that computes one token whenever it is asked for one, so that several answers can grow side by side."""

import contextvars
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TextStreamer


class StepwiseAnswer(TextStreamer):
    """One call of `generate`, which waits after every token until `step` is called again. It runs in the context it is made in.

    Its time is that of its own steps: what is computed between them is not counted.

    Args:
        model: an `M3LlavaForConditionalGeneration`.
        tokenizer: that answers are decoded by.
        stop: ends the answer at the next token once it is set.
        prefilled: called once the first token is there, or the first of every beam.
        call: arguments of `generate`, for one prompt.

    Attributes:
        text: so far; the last word comes when it is whole.
        tokens: so far.
        first_token_seconds, seconds: of computing.
        output: what `generate` returned, once `step` has returned False.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        stop: threading.Event,
        prefilled: Callable[[], None] = lambda: None,
        **call: Any,
    ):
        super().__init__(tokenizer, skip_prompt=True)
        self.text, self.tokens, self.seconds, self.first_token_seconds, self.output = "", 0, 0.0, None, None
        self.prefilled, self._new, self._stop, self._closed = prefilled, [], stop, False
        self._go, self._came = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        self._streams = call.get("num_beams", 1) == 1  # beams have no token that stays before their end
        if self._streams:
            call["streamer"] = self
        call["stopping_criteria"] = StoppingCriteriaList([_Stopped(self)])
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._generate, model, call), daemon=True)

    def step(self) -> bool:
        """Computes the next token, or the whole answer of beams. False once there is none.

        Raises:
            Whatever `generate` raised.
        """
        begin = time.perf_counter()
        if self._error is not None:
            raise self._error
        if self._closed or self.output is not None:
            return False
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._go.release()
        self._came.acquire()
        self.seconds += time.perf_counter() - begin
        if self._streams and self.tokens and self.first_token_seconds is None:
            self.first_token_seconds = self.seconds
        if self._error is not None:
            raise self._error
        return self.output is None

    @property
    def is_stopped(self) -> bool:
        return self._closed or self._stop.is_set()

    def close(self) -> None:
        """Lets go of a call that is under way."""
        self._closed = True
        self._go.release()
        if self._thread.ident is not None:
            self._thread.join()

    def put(self, value: torch.Tensor) -> None:
        if self.next_tokens_are_prompt:
            self.next_tokens_are_prompt = False
            return
        self._new += value.flatten().tolist()
        text = self._decoded(self._new)  # all of it: a tokenizer may drop the space that a part begins with
        is_whole = text and self._is_chinese_char(ord(text[-1]))
        self.text = text if is_whole else text[: max(text.rfind(" "), text.rfind("\n")) + 1]
        self.tokens += 1
        self._came.release()
        if not self._closed:
            self._go.acquire()

    def end(self) -> None:
        """Text is complete once `generate` has returned."""

    def _decoded(self, ids: Any) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _generate(self, model: Any, call: dict[str, Any]) -> None:
        try:
            output = model.generate(**call, return_dict_in_generate=True)
            new = output.sequences[0, call["input_ids"].shape[1] :]
            self.text, self.tokens, self.output = self._decoded(new), len(new), output
        except BaseException as error:  # it is raised where the answer is waited for
            self._error = error
        self._came.release()


class _Stopped(StoppingCriteria):
    def __init__(self, answer: StepwiseAnswer):
        self.answer = answer

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        self.answer.prefilled()
        return torch.full((len(input_ids),), self.answer.is_stopped, device=input_ids.device)
