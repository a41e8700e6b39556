"""`/v1/moderations` and LiteLLM's guardrail route: answers of anybody, scored.

An answer is read behind the chat that it answers, in one prefill, its thinking and the
answer itself apart. Where the chat or the thinking is missing, scores are still scores,
and it is said that thresholds promise nothing.
"""

import secrets
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

from holdfast.data.chat.conversation import behind_prompt, split_completion
from holdfast.data.chat.template import prompt_token_ids
from holdfast.guard.monitor.monitor import NOT_FINITE, Monitor, TokenScore
from holdfast.guard.serve.chat import Desk, Refused
from holdfast.guard.serve.web.shapes import (
    GuardrailRequest,
    Message,
    ModerationRequest,
    Part,
    Turns,
)

AT_ONCE = 8
"""Answers that are scored between two steps of the batch."""
ALONE = "the text stands without the chat that it answers"
UNTHOUGHT = "the answer stands without its thinking"
NOTHING = "there is no answer to score"
REMEMBERED = 4096
"""Chats of a gateway that are remembered until their answer comes."""


class Item(NamedTuple):
    """One answer to be scored."""

    prompt: tuple[int, ...]
    written: tuple[int, ...]
    abstains: str | None  # What is missing, and so why nothing is promised.


def items(desk: Desk, request: ModerationRequest) -> list[Item]:
    """Return the answers of a request, as tokens."""
    given: Any = request.input
    if isinstance(given, str):
        return [_text(desk, given)]
    first = given[0]
    if isinstance(first, Part):
        return [_text(desk, "".join(part.text for part in given))]
    if isinstance(first, str):
        return [_text(desk, each) for each in given]
    chats = [given] if isinstance(first, Message) else given
    return [chat_item(desk, chat) for chat in chats]


def chat_item(desk: Desk, messages: Sequence[Message]) -> Item:
    """Return the answer that a chat ends with."""
    turns = Turns(messages)
    prompt = desk.prompt(turns)
    if turns.answer is None:
        return Item(prompt, (), NOTHING)
    thinking, answer = turns.answer.thinking, turns.answer.text
    return _item(desk, prompt, thinking, answer, None)


def _text(desk: Desk, text: str) -> Item:
    """Return a text that answers nothing we know of."""
    prompt = prompt_token_ids(desk.tokenizer, "", thinking=desk.adapter.thinking)
    return _item(desk, prompt, "", text, ALONE)


def _item(
    desk: Desk, prompt: tuple[int, ...], thinking: str, answer: str, why: str | None
) -> Item:
    fmt, is_closed = desk.adapter.thinking, bool(answer)
    begun = fmt is not None and answer.lstrip().startswith(fmt.open)
    if fmt is not None and not thinking and (begun or fmt.close in answer):
        split = split_completion(answer, fmt)
        thinking, answer, is_closed = split.thinking, split.answer, split.closed
    if not (thinking or answer).strip():
        return Item(prompt, (), NOTHING)
    if fmt is not None and not thinking:
        why = why or UNTHOUGHT
    # Of a model that does not think, a thinking is part of what was said.
    answer = answer if fmt is not None else thinking + answer
    said = behind_prompt(desk.tokenizer, prompt, thinking if fmt else "", answer, fmt)
    # A thinking that nobody ended has no end to be read.
    end = said.spans.answer[1] if is_closed else said.spans.thinking[1]
    written = said.token_ids[len(prompt) : end]
    most = desk.adapter.max_positions
    if len(prompt) + len(written) > most:
        raise Refused(
            400,
            f"expected a chat and its answer of up to {most} tokens; found "
            f"{len(prompt) + len(written)}. Shorten it.",
            "context_length_exceeded",
        )
    return Item(prompt, tuple(written), why)


class Scores(NamedTuple):
    """What a scored answer comes to."""

    scores: dict[str, float]  # Highest of each detector.
    fired: dict[str, int]  # Token at which each fired first.
    abstains: str | None
    n_tokens: dict[str, int]  # By channel.

    @classmethod
    def of(cls, found: Sequence[TokenScore], why: str | None) -> "Scores":
        """Read the scores of all tokens of an answer."""
        fired: dict[str, int] = {}
        counts = {"thinking": 0, "answer": 0}
        for each in found:
            counts[each.channel] += 1
            for name in each.fired:
                fired.setdefault(name, each.index)
        last = found[-1].abstains if found else None
        scores = found[-1].scores if found else {}
        # What was not read is worse than what is missing.
        why = last if last == NOT_FINITE else why or last
        return cls(dict(scores), fired, why, counts)


def result(
    monitor: Monitor, scored: Scores, stale: Sequence[str] = ()
) -> dict[str, Any]:
    """Return one result, in the form of OpenAI's moderation.

    `stale`: What thresholds were not set on.
    """
    channels = {each.name: each.channel for each in monitor.bundle.detectors}
    names = sorted({*channels, *monitor.limits})
    finite = {name: _finite(scored.scores.get(name)) for name in names}
    apart = {
        channel: {name: finite[name] for name in names if channels.get(name) == channel}
        for channel in ("thinking", "answer")
    }
    return {
        "flagged": monitor.bundle.acts_on in scored.fired,
        "categories": {name: name in scored.fired for name in names},
        "category_scores": finite,
        "category_applied_input_types": {name: ["text"] for name in names},
        "holdfast": {
            **apart,
            "acts_on": monitor.bundle.acts_on,
            "thresholds": dict(monitor.limits),
            "fired_at": scored.fired,
            "tokens": scored.n_tokens,
            "abstains": scored.abstains,
            "stale": list(stale),
        },
    }


def _finite(value: float | None) -> float | None:
    # What is no number is null, and never a low score.
    ordinary = value is not None and abs(value) < float("inf")
    return value if ordinary else None


def moderation(name: str, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the reply with all results."""
    own = f"modr-{secrets.token_hex(12)}"
    return {"id": own, "model": name, "results": list(results)}


class Remembered:
    """Chats that a gateway has sent, until it sends their answer."""

    def __init__(self) -> None:
        """Begin with none."""
        self._chats: OrderedDict[str, list[Message]] = OrderedDict()

    def keep(self, request: GuardrailRequest) -> None:
        """Keep the chat of a call, as far as it is text."""
        rows, call = request.structured_messages, request.litellm_call_id
        if not rows or call is None:
            return
        try:
            chat = [Message.model_validate(row) for row in rows]
            Turns(chat)
        except Exception:  # Tools, images, other roles: nothing that a template takes.
            return
        self._chats[call] = chat
        while len(self._chats) > REMEMBERED:
            self._chats.popitem(last=False)

    def items(self, desk: Desk, request: GuardrailRequest) -> list[Item]:
        """Return the texts of an answer, behind the chat that they answer."""
        chat = self._chats.get(request.litellm_call_id or "")
        found = []
        for text in request.texts or ():
            if chat is None or chat[-1].role == "assistant":
                found.append(_text(desk, text))
            else:
                said = Message(role="assistant", content=text)
                found.append(chat_item(desk, [*chat, said]))
        return found


def guardrail(
    monitor: Monitor, scored: Sequence[Scores], *, blocks: bool
) -> dict[str, Any]:
    """Return what a gateway is to do with the texts that it sent.

    `blocks`: Whether it is to block what is flagged.
    """
    acts_on = monitor.bundle.acts_on
    flagged = [each for each in scored if acts_on in each.fired]
    told = [each for each in (s.abstains for s in scored) if each]
    reply: dict[str, Any] = {"action": "NONE"}
    if flagged and blocks:
        first = flagged[0]
        score, limit = first.scores[acts_on], monitor.limits[acts_on]
        reply = {
            "action": "BLOCKED",
            "blocked_reason": f"the detector `{acts_on}` fired at token "
            f"{first.fired[acts_on]}, with a score of {score:.3g}; its threshold is "
            f"{limit:.3g}",
        }
    return reply | {"holdfast": {"flagged": bool(flagged), "abstains": told}}
