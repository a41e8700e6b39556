"""What an OpenAI-shaped server sent, as tokens or texts, and what rows it makes.

Token ids are those that were drawn. Where a server tells none, its text is tokenised
again, and a row whose tokens do not give that very text back, or whose regions have
other borders then, is marked: its answer stands, but no state is read of it.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from holdfast.data.chat.conversation import (
    Conversation,
    Spans,
    behind_prompt,
    completion_spans,
    split_completion,
)
from holdfast.data.chat.rendering import ChatTokenizer
from holdfast.data.chat.thinking import ThinkingFormat
from holdfast.data.served import Served, served
from holdfast.data.tables import TableRow
from holdfast.errors import PromptFileError
from holdfast.models.decoding.row_state import Completion, Finish, Tokens

_PREFIX = "token_id:"


class UnansweredError(Exception):
    """Nobody answered a row; the message says why."""


class Sent(NamedTuple):
    """One answer of a server, as it is kept and read."""

    text: str | None = None  # Text, which may hold the thinking in tags.
    reasoning: str | None = None  # Thinking, where it was sent apart.
    field: str | None = None  # Where that stood.
    token_ids: tuple[int, ...] | None = None  # Tokens drawn, where they are told.
    finish: Finish | None = None  # How it ended; None where that is not told.
    n_prompt: int | None = None  # Tokens of the prompt, as the server counts them.
    # The prompt as the server read it, where it tells.
    prompt_ids: tuple[int, ...] | None = None


class Understood(NamedTuple):
    """Thinking and answer of a completion, and how it ended."""

    thinking: str
    answer: str
    closed: bool
    finish: Finish


def sent_of(body: Mapping[str, Any]) -> Sent:
    """Read the one answer of a body, whichever of the two forms it has.

    Raises:
        UnansweredError: If it holds none.
    """
    try:
        [first, *_] = served(TableRow("its answer", dict(body)), "the server")
    except PromptFileError as error:
        raise UnansweredError(f"no answer in what was sent: {error.found}") from error
    if first.failure is not None and first.failure != "no text":
        raise UnansweredError(first.failure)
    choices = body.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else {}
    choice = choice if isinstance(choice, Mapping) else {}
    usage = body.get("usage")
    count = usage.get("prompt_tokens") if isinstance(usage, Mapping) else None
    prompt = choice.get("prompt_token_ids") or body.get("prompt_token_ids")
    return Sent(
        first.content,
        first.reasoning,
        first.field,
        _token_ids(choice),
        first.finish,
        count if isinstance(count, int) else None,
        _numbers(prompt),
    )


def _token_ids(choice: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Return the tokens that were drawn, wherever a server tells them."""
    for name in ("token_ids", "tokens"):
        if (ids := _numbers(choice.get(name))) is not None:
            return ids
    logprobs = choice.get("logprobs")
    if not isinstance(logprobs, Mapping):
        return None
    content, tokens = logprobs.get("content"), logprobs.get("tokens")
    if isinstance(content, list):
        ids = _numbers([e.get("id") if isinstance(e, dict) else None for e in content])
        if ids is not None:
            return ids
        tokens = [e.get("token") if isinstance(e, dict) else None for e in content]
    if isinstance(tokens, list) and all(
        isinstance(each, str) and each.startswith(_PREFIX) for each in tokens
    ):
        return tuple(int(each.removeprefix(_PREFIX)) for each in tokens)
    return None


def _numbers(value: Any) -> tuple[int, ...] | None:
    whole = isinstance(value, list) and all(type(each) is int for each in value)
    return tuple(value) if whole else None


def encode(tokenizer: ChatTokenizer, text: str) -> tuple[int, ...]:
    """Return the tokens of a text by itself, without special ones around it."""
    if not text:
        return ()
    return tuple(map(int, tokenizer(text, add_special_tokens=False)["input_ids"]))


def decode(tokenizer: ChatTokenizer, token_ids: Sequence[int]) -> str:
    """Return the text of tokens, special ones included."""
    return str(
        tokenizer.decode(
            list(token_ids),
            skip_special_tokens=False,
            clean_up_tokenization_spaces=False,
        )
    )


def is_text_of(
    tokenizer: ChatTokenizer, token_ids: Sequence[int], text: str, stop: str = ""
) -> bool:
    """Return whether tokens have a text in our vocabulary, special ones aside.

    The end of either may be missing: control tokens, or half a character.

    `stop`: Text that ended the round, which may be missing as well; "" for none.
    """
    try:
        said = tokenizer.decode(list(token_ids), skip_special_tokens=True)
        whole = decode(tokenizer, token_ids)
    except (OverflowError, TypeError, IndexError, KeyError, ValueError):
        return False
    told = text.rstrip("\ufffd").strip()
    if not told:
        return not str(said).rstrip("\ufffd").strip() or not text
    controls = set(getattr(tokenizer, "added_tokens_decoder", ()))
    for one in (str(said), whole):
        short, long = sorted((one.rstrip("\ufffd").strip(), told), key=len)
        rest = long.removeprefix(short).strip().removesuffix(stop or "\0")
        if long.startswith(short or "\0") and set(encode(tokenizer, rest)) <= controls:
            return True
    return False


def survives(tokenizer: ChatTokenizer, text: str) -> bool:
    """Return whether the tokens of a text give that very text back."""
    if "\ufffd" in text:
        # Bytes of a character that was cut: which they were is not told.
        return False
    return decode(tokenizer, encode(tokenizer, text)) == text


def conversation_of(
    tokenizer: ChatTokenizer,
    fmt: ThinkingFormat | None,
    prompt: Sequence[int],
    texts: tuple[str, str],
    *,
    apart: bool,
) -> Conversation:
    """Return thinking and answer behind a prompt, tokenised again.

    `texts`: The thinking, and the answer.
    `apart`: Whether each region is tokenised by itself; else all of the text together,
    as most tokenizers see what they are given. Which is nearer to what a model writes
    depends on the model (see `tokenises_apart`).
    """
    if apart or fmt is None:
        return behind_prompt(tokenizer, prompt, *texts, fmt)
    token_ids = (*prompt, *encode(tokenizer, fmt.end_template.join(texts)))
    return Conversation(
        token_ids, completion_spans(tokenizer, token_ids, len(prompt), fmt)
    )


def tokenised(
    tokenizer: ChatTokenizer, fmt: ThinkingFormat | None, text: str, *, apart: bool
) -> tuple[int, ...]:
    """Return the tokens of what was written, which may hold the end of the thinking.

    `apart`: As in `conversation_of`.
    """
    if not apart or fmt is None or fmt.end_template not in text:
        return encode(tokenizer, text)
    thinking, _, answer = text.partition(fmt.end_template)
    parts = (thinking, fmt.end_template, answer)
    return tuple(token for part in parts for token in encode(tokenizer, part))


def tokenises_apart(
    tokenizer: ChatTokenizer, fmt: ThinkingFormat | None, rows: Sequence[Completion]
) -> tuple[bool, int]:
    """Return which way of tokenising again is nearer to rows that a model drew.

    Returns: Whether regions are tokenised apart, and how many rows come back then.
    """
    counts = {True: 0, False: 0}
    for row in rows:
        written = row.token_ids[row.spans.prompt[1] : row.spans.answer[1]]
        text = decode(tokenizer, written)
        for apart in counts:
            counts[apart] += tokenised(tokenizer, fmt, text, apart=apart) == written
    apart = counts[True] >= counts[False]
    return apart, counts[apart]


def understood(
    sent: Served, thinking: ThinkingFormat | None, *, bare_answers: bool, place: str
) -> Understood:
    """Tell thinking from answer; a text without either mark is all of one of them.

    `place`: Where the answer stands, for errors.
    """
    text = sent.content or ""
    if thinking is not None and has_tags(sent, thinking):
        thought, answer, closed = split_completion(text, thinking)
    elif thinking is not None and (
        sent.reasoning or (sent.reasoning is not None and not text.strip())
    ):
        thought, answer = _of_field(sent, thinking, place)
        closed = bool(answer.strip())
    else:
        closed = bare_answers
        thought, answer = ("", text) if bare_answers else (text, "")
    finish = sent.finish or ("stop" if closed else "length")
    return Understood(thought, answer, closed, finish)


def has_tags(sent: Served, thinking: ThinkingFormat) -> bool:
    """Return whether the thinking stands in the text, between tags."""
    content = sent.content or ""
    if sent.reasoning:
        return False
    return thinking.close in content or content.lstrip().startswith(thinking.open)


def _of_field(sent: Served, thinking: ThinkingFormat, place: str) -> tuple[str, str]:
    """Return what was sent apart; a server's parser keeps the newlines around it."""
    thought = (sent.reasoning or "").strip("\n")
    thought = thought.removeprefix(thinking.open).strip("\n")
    answer = (sent.content or "").lstrip("\n")
    if thinking.close in thought or thinking.open in thought:
        raise PromptFileError(
            "thinking without tags, since it stands in a field of its own",
            f"`{thinking.close}` or `{thinking.open}` inside `{sent.field}` at {place}",
            "Take the tags out of the field.",
        )
    if answer.lstrip().startswith(thinking.open):
        raise PromptFileError(
            "thinking in a field of its own or in tags",
            f"`{sent.field}`, and an answer that begins with `{thinking.open}`, at "
            f"{place}",
            "Leave one of the two out.",
        )
    return thought, answer


def completion_of_text(
    tokenizer: ChatTokenizer,
    thinking: ThinkingFormat | None,
    conversation: Conversation,
    text: Understood,
    index: int = 0,
) -> Completion:
    """Return the completion whose texts were tokenised again, region by region."""
    token_ids, spans = conversation.token_ids, conversation.spans
    if not text.closed:
        # The end template was never written.
        token_ids = token_ids[: spans.thinking[1]]
        end = len(token_ids)
        spans = Spans(spans.prompt, spans.thinking, (end, end), (end, end))
    same = all(survives(tokenizer, each) for each in (text.thinking, text.answer))
    n_prompt = spans.prompt[1]
    same = same and completion_spans(tokenizer, token_ids, n_prompt, thinking) == spans
    tokens: Tokens = "text" if same else "lost"
    return Completion(
        index=index,
        token_ids=tuple(token_ids),
        spans=spans,
        thinking=text.thinking,
        answer=text.answer,
        finish=text.finish,
        forced_close=False,
        closed=text.closed,
        min_top2_gap=math.nan,
        min_margin=math.nan,
        tokens=tokens,
    )


def within_limits(
    text: Understood,
    tokenizer: ChatTokenizer,
    thinking: ThinkingFormat | None,
    prompt: Sequence[int],
    limits: tuple[int, int],
    *,
    apart: bool,
) -> tuple[Conversation, Understood]:
    """Return a row that was answered whole, cut where its limits are.

    A server that takes chats alone cannot be made to close a thinking: one that passed
    its limit ends the row there, whatever came after it.

    `limits`: Most tokens of thinking and of answer.
    """
    max_thinking, max_answer = limits

    def told(text: Understood) -> Conversation:
        texts = text.thinking, text.answer
        return conversation_of(tokenizer, thinking, prompt, texts, apart=apart)

    whole = told(text)
    start, end = whole.spans.thinking
    if thinking is not None and end - start > max_thinking:
        cut = decode(tokenizer, whole.token_ids[start : start + max_thinking])
        text = Understood(cut, "", False, "length")
        return told(text), text
    start, end = whole.spans.answer
    if end - start > max_answer:
        cut = decode(tokenizer, whole.token_ids[start : start + max_answer])
        text = text._replace(answer=cut, finish="length")
        whole = told(text)
    return whole, text
