"""What is trained on: tokens of a row, and which of them carry the loss."""

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from holdfast.data.chat.conversation import Conversation, Spans
from holdfast.data.chat.rendering import ChatTokenizer
from holdfast.finetune.settings import LossOn

IGNORED: Final = -100
"""Label of a token without loss, as PyTorch's cross-entropy reads it."""


class Example(NamedTuple):
    """One training sequence."""

    # Prompt, thinking, end template, answer, its end, and the last token of a turn.
    input_ids: tuple[int, ...]
    labels: tuple[int, ...]  # The same tokens where the loss lies, `IGNORED` elsewhere.
    answer: int  # Place of the first token of the answer.

    def record(self) -> dict[str, Any]:
        """Return it as a row of a data set."""
        return {"input_ids": list(self.input_ids), "labels": list(self.labels)}


def example(made: Conversation, loss: LossOn, *, stop: int) -> Example:
    """Return a conversation as tokens and labels."""
    input_ids = (*made.token_ids, stop)
    start = made.spans.answer[0]
    return Example(input_ids, mask(input_ids, made.spans, loss), start)


def mask(input_ids: Sequence[int], spans: Spans, loss: LossOn) -> tuple[int, ...]:
    """Return the labels of a sequence: `IGNORED` before the loss begins."""
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
    """
    if loss != "template" or not examples:
        return 0
    first = examples[0]
    silent = sum(label == IGNORED for label in first.labels)
    return first.answer - silent


def shown(tokenizer: ChatTokenizer, row: Example) -> tuple[str, str]:
    """Return the text of a sequence that is masked, and the text that is trained on."""
    start = sum(label == IGNORED for label in row.labels)
    parts = (row.input_ids[:start], row.input_ids[start:])
    masked, trained = (
        str(
            tokenizer.decode(
                list(part),
                skip_special_tokens=False,
                clean_up_tokenization_spaces=False,
            )
        )
        for part in parts
    )
    return masked, trained
