"""Responses of diffusion models as the rows that judges and stages read."""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from holdfast.data.conversation import ThinkingFormat, completion_spans
from holdfast.models.rows import Completion


class Reading(NamedTuple):
    """How a response is read.

    Attributes:
        tokenizer: Tokenizer of the model.
        thinking: Its thinking format, or None.
        stop_ids: Tokens that end an answer.
    """

    tokenizer: Any
    thinking: ThinkingFormat | None
    stop_ids: Collection[int]


def as_completion(
    reading: Reading,
    place: int,
    prompt: Sequence[int],
    response: Sequence[int],
    *,
    gap: float,
    margin: float,
) -> Completion:
    """Return a response as a completion, cut at its first stop token.

    Args:
        reading: How it is read.
        place: Which prompt it answers.
        prompt: Tokens of the prompt.
        response: Tokens of the response, what follows its stop token included.
        gap: Least lead of a token over the second.
        margin: Least lead of a position over the first that was left open.
    """
    stops = [i for i, token in enumerate(response) if token in reading.stop_ids]
    end = stops[0] if stops else len(response)
    token_ids = (*prompt, *response[:end])
    spans = completion_spans(
        reading.tokenizer, token_ids, len(prompt), reading.thinking
    )

    def text(region: tuple[int, int]) -> str:
        return str(
            reading.tokenizer.decode(
                list(token_ids[slice(*region)]),
                skip_special_tokens=True,
                clean_up_tokenization_spaces=False,
            )
        )

    start, template_end = spans.end_template
    return Completion(
        index=place,
        token_ids=(*token_ids, *response[end : end + 1]),
        spans=spans,
        thinking=text(spans.thinking),
        answer=text(spans.answer),
        finish="stop" if stops else "length",
        forced_close=False,
        closed=reading.thinking is None or start < template_end,
        min_top2_gap=gap,
        min_margin=margin,
    )
