"""What is trained on: tokens of a row, and which of them carry the loss."""

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from holdfast.data.conversation import (
    ChatTokenizer,
    Spans,
    ThinkingFormat,
    build_conversation,
)
from holdfast.training.recipe import LossOn

IGNORED: Final = -100
"""Label of a token without loss, as PyTorch's cross-entropy reads it."""


class Example(NamedTuple):
    """One training sequence.

    Attributes:
        input_ids: Prompt, thinking, end template, answer, stop token.
        labels: The same tokens where the loss lies, `IGNORED` elsewhere.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]

    def record(self) -> dict[str, Any]:
        """Return it as a row of a data set."""
        return {"input_ids": list(self.input_ids), "labels": list(self.labels)}


def example(
    tokenizer: ChatTokenizer,
    row: tuple[str, str, str],
    fmt: ThinkingFormat | None,
    loss: LossOn,
    *,
    stop: int,
    system_prompt: str | None = None,
) -> Example:
    """Return a row as tokens and labels.

    Args:
        tokenizer: Tokenizer with a chat template.
        row: Prompt, thinking and answer.
        fmt: Format of the thinking, None for a model without.
        loss: Where the loss lies.
        stop: Token that ends an answer; it carries loss wherever the answer does.
        system_prompt: System message, None for no such message.

    Raises:
        InputError: If the chat template refuses the prompt.
        ThinkingFormatError: If there is a thinking and no format for one.
    """
    prompt, thinking, answer = row
    made = build_conversation(tokenizer, prompt, thinking, answer, fmt, system_prompt)
    input_ids = (*made.token_ids, stop)
    return Example(input_ids, mask(input_ids, made.spans, loss))


def mask(input_ids: Sequence[int], spans: Spans, loss: LossOn) -> tuple[int, ...]:
    """Return the labels of a sequence: `IGNORED` before the loss begins.

    Args:
        input_ids: Tokens, the stop token included.
        spans: Regions of the sequence.
        loss: Where the loss lies; all of it reaches to the end.
    """
    start = {
        "both": spans.thinking[0],
        "template": spans.end_template[0],
        "answer": spans.answer[0],
    }[loss]
    return (*[IGNORED] * start, *input_ids[start:])
