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
        answer: Place of the first token of the answer.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    answer: int

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
    start = made.spans.answer[0]
    return Example(input_ids, mask(input_ids, made.spans, loss), start)


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


def lead(examples: Sequence[Example], loss: LossOn) -> int:
    """Return how many tokens with loss come before the first one of an answer.

    Those of the end template, which are the same in every row. Where the thinking
    carries loss it is what a model says first, and nothing comes before it.

    Args:
        examples: Training sequences.
        loss: Where the loss lies.
    """
    if loss != "template" or not examples:
        return 0
    first = examples[0]
    silent = sum(label == IGNORED for label in first.labels)
    return first.answer - silent
