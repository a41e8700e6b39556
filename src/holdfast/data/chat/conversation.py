"""Conversations as tokens: prompt, thinking, end template, answer.

The tokenizer is whatever has the methods of `ChatTokenizer`; a fast tokenizer of
`transformers` has them. The four regions are tokenised apart, so that their borders
are token borders and the end template is always the same tokens, whatever stands
before it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, count
from typing import Any, Final, NamedTuple
from weakref import WeakSet

from holdfast.data.chat.rendering import ChatTokenizer
from holdfast.data.chat.template import (
    prompt_token_ids,
)
from holdfast.data.chat.thinking import ThinkingFormat
from holdfast.errors import ThinkingFormatError

_BROKEN: Final = "\ufffd"
_PIECES: Final = re.compile(r"\s+|\S+")
_SEPARABLE: Final = WeakSet[Any]()
"""Tokenizers that were seen to tokenise a part of a text as inside the whole."""


class Spans(NamedTuple):
    """Half-open ranges of token indices; they follow on each other without gaps."""

    prompt: tuple[int, int]
    thinking: tuple[int, int]
    end_template: tuple[int, int]
    answer: tuple[int, int]


@dataclass(frozen=True)
class Conversation:
    """A prompt with thinking and answer as tokens, and what each token belongs to.

    Marks that end the answer stand behind it and belong to none.
    """

    token_ids: tuple[int, ...]
    spans: Spans


class SplitCompletion(NamedTuple):
    """Thinking and answer of a completion; not `closed` if the thinking never ended."""

    thinking: str
    answer: str
    closed: bool


def build_conversation(
    tokenizer: ChatTokenizer,
    prompt_text: str,
    thinking: str,
    answer: str,
    fmt: ThinkingFormat | None,
    system_prompt: str | None = None,
    earlier: Sequence[tuple[str, str]] = (),
) -> Conversation:
    """Put prompt, thinking, end template and answer together, token by token.

    Each region is tokenised by itself and without special tokens, so there is no
    second start token and no token across a border. What the user says is text, also
    where it spells a control token.

    `prompt_text`: What the user says, not yet rendered.
    `fmt`: Format of the thinking, None for a model without.
    `system_prompt`: System message, None for no such message.
    `earlier`: The turns before, each with the model's answer to it; they count as
    prompt.
    Returns: Token ids and spans; without a format, thinking and end template are empty.
    Behind an answer stand the marks that end it, where the format has any.
    """
    prompt = prompt_token_ids(
        tokenizer,
        prompt_text,
        system_prompt=system_prompt,
        thinking=fmt,
        earlier=earlier,
    )
    return behind_prompt(tokenizer, prompt, thinking, answer, fmt)


def behind_prompt(
    tokenizer: ChatTokenizer,
    prompt: Sequence[int],
    thinking: str,
    answer: str,
    fmt: ThinkingFormat | None,
) -> Conversation:
    """Put thinking, end template and answer behind a prompt that is tokens already.

    Arguments and result are those of `build_conversation`.
    """
    if fmt is None and thinking:
        raise ThinkingFormatError(
            "a chat template with thinking, since there is a thought to place",
            "one without",
            "Use a reasoning model, or give the answer alone.",
        )
    _require_separable(tokenizer)
    end_template = "" if fmt is None else fmt.end_template
    answer_end = "" if fmt is None or not answer else fmt.answer_end
    token_ids = list(prompt)
    ranges = [(0, len(prompt))]
    texts = (thinking, end_template, answer, answer_end)
    *regions, behind = _ids_of_each(tokenizer, texts)
    for ids in regions:
        start = len(token_ids)
        token_ids += ids
        ranges.append((start, len(token_ids)))
    return Conversation((*token_ids, *behind), Spans(*ranges))


def split_completion(text: str, fmt: ThinkingFormat | None) -> SplitCompletion:
    """Cut a completion at the first closing tag.

    `text`: What the model wrote after the prompt; may start with the opening tag.
    `fmt`: Format of the thinking, None for a model without.
    """
    if fmt is None:
        return SplitCompletion("", text, True)
    if text.startswith(fmt.open_template):
        text = text.removeprefix(fmt.open_template)
    elif text.lstrip().startswith(fmt.open):
        text = text.lstrip().removeprefix(fmt.open)
    border = _end_template(text, fmt)
    if border is None:
        return SplitCompletion(one_thought(text, fmt), "", False)
    answer = text[border[2] :]
    answer = answer[: answer_stop(answer, fmt.answer_end)]
    return SplitCompletion(one_thought(text[: border[0]], fmt), answer, True)


def one_thought(text: str, fmt: ThinkingFormat) -> str:
    """Return a thinking that was opened anew, as channels may be, as one text."""
    lead = fmt.end_template.partition(fmt.close)[0]
    return text.replace(lead + fmt.open, "\n\n") if lead.strip() else text


def answer_stop(text: str, answer_end: str) -> int | None:
    """Return where the marks that end an answer begin in it; None without any."""
    mark = answer_end.strip()
    at = text.find(mark) if mark else -1
    if at < 0:
        return None
    lead = answer_end.partition(mark)[0]
    return at - len(lead) if text[:at].endswith(lead) else at


def end_is_open(text: str, fmt: ThinkingFormat) -> bool:
    """Return whether what comes next may still belong to the end template of a text."""
    border = _end_template(text, fmt)
    return border is not None and border[3]


def completion_spans(
    tokenizer: ChatTokenizer,
    token_ids: Sequence[int],
    n_prompt: int,
    fmt: ThinkingFormat | None,
) -> Spans:
    r"""Find the regions of a sequence that a model generated.

    A token that holds the end of the thinking and the start of the end template
    (".\n") counts as thinking, and one that runs over the end of the template
    counts as template, so the answer starts with its own first token.

    `fmt`: Format of the thinking, None for a model without.
    Returns: Spans over the whole sequence, but for marks that end the answer and what
    follows them. Without a closing tag the rest is thinking, and end template and
    answer are empty at the end.
    """
    total = len(token_ids)
    prompt = (0, n_prompt)
    if fmt is None:
        empty = (n_prompt, n_prompt)
        return Spans(prompt, empty, empty, (n_prompt, total))
    texts = token_texts(tokenizer, token_ids[n_prompt:])
    starts = [0, *accumulate(map(len, texts))]
    border = _end_template("".join(texts), fmt)
    if border is None:
        return Spans(prompt, (n_prompt, total), (total, total), (total, total))
    first_character, tag, last_character, _ = border
    # The tag may be several tokens; the first of them is never thinking.
    holds_tag = max(i for i, start in enumerate(starts[:-1]) if start <= tag)
    start = next(i for i, at in enumerate(starts) if at >= first_character)
    end = next(i for i, at in enumerate(starts) if at >= last_character)
    first = n_prompt + min(start, holds_tag)
    last = n_prompt + end
    stop = answer_stop("".join(texts[end:]), fmt.answer_end)
    if stop is not None:
        # As in the thinking: a token that holds the last of the answer is answer.
        behind = (i for i, at in enumerate(starts) if at >= starts[end] + stop)
        total = n_prompt + next(behind)
    return Spans(prompt, (n_prompt, first), (first, last), (last, total))


def token_texts(tokenizer: ChatTokenizer, token_ids: Sequence[int]) -> tuple[str, ...]:
    """Return the characters that each token adds, for display.

    A character of several tokens is shown with its last one; the others are "". Bytes
    that make no character are U+FFFD, shown with the next whole one. Joined, the
    parts are the text of the whole sequence.
    """
    parts: list[str] = []
    context = pending = 0
    for index in range(len(token_ids)):
        # Decoded behind the last finished part, because some decoders treat the
        # first token of a text in another way.
        before = _decode(tokenizer, token_ids[context:pending])
        text = _decode(tokenizer, token_ids[context : index + 1])
        if text.endswith(_BROKEN) and index + 1 < len(token_ids):
            parts.append("")
        else:
            parts.append(text[len(before) :])
            context, pending = pending, index + 1
    return tuple(parts)


def _end_template(text: str, fmt: ThinkingFormat) -> tuple[int, int, int, bool] | None:
    """Return start of the end template, start of its tag, its end, in characters.

    What a model writes may lack white space that the template has, or the marks of the
    answer behind it; a part of a mark is none.

    Returns: The three, and whether what comes next may still belong to it; None where
    there is no closing tag.
    """
    tag = text.find(fmt.close)
    if tag < 0:
        return None
    lead, _, trail = fmt.end_template.partition(fmt.close)
    start, end = tag, tag + len(fmt.close)
    for piece in reversed(_PIECES.findall(lead)):
        before = text[:start]
        if not piece.isspace() and not before.endswith(piece):
            break
        start -= next(len(piece) - n for n in count() if before.endswith(piece[n:]))
    for piece in _PIECES.findall(trail):
        rest = text[end:]
        said = rest.lstrip()
        if piece.isspace():
            end += next(n for n in count(len(piece), -1) if rest.startswith(piece[:n]))
        elif said.startswith(piece):
            end = len(text) - len(said) + len(piece)
        else:
            return start, tag, end, piece.startswith(said)
    return start, tag, end, False


def _decode(tokenizer: ChatTokenizer, token_ids: Sequence[int]) -> str:
    text = tokenizer.decode(
        list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    return str(text)


def _require_separable(tokenizer: ChatTokenizer) -> None:
    # Asked for every row of a long pool, and the same for all of them.
    if tokenizer in _SEPARABLE:
        return
    joined = tokenizer.decode(_ids(tokenizer, "x") + _ids(tokenizer, "y"))
    if joined == "x y":
        raise ThinkingFormatError(
            "a tokenizer that tokenises a part of a text as it does inside the whole",
            "one that puts a space before every text",
            "Use a model with a byte-level tokenizer.",
        )
    _SEPARABLE.add(tokenizer)


def _ids_of_each(tokenizer: ChatTokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Return the tokens of each text by itself, in one call, which costs the most."""
    said = [text for text in texts if text]
    found = iter(tokenizer(said, add_special_tokens=False)["input_ids"] if said else ())
    return [list(map(int, next(found))) if text else [] for text in texts]


def _ids(tokenizer: ChatTokenizer, text: str) -> list[int]:
    if not text:
        return []
    ids: Sequence[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [int(token) for token in ids]
