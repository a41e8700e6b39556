"""What a chat template writes around a message, a thought and a reply.

It is asked by stand-ins, which are found again in what it renders.
"""

import re
from collections.abc import Iterable
from typing import Any, Final, NamedTuple

from holdfast.data.chat.rendering import ChatTokenizer, render, template_text
from holdfast.data.chat.thinking_formats import Switch, switches
from holdfast.errors import InputError

_USER: Final = "holdfast-user"
_THOUGHT: Final = "holdfast-thought"
_REPLY: Final = "holdfast-reply"
MARK: Final = re.compile(r"\s*(<[^<>\s][^<>]*>|\[[^\[\]\s]+\])+\s*")
"""Marks, and nothing else."""


class Fresh(NamedTuple):
    """What a template writes around a single user message, and behind it."""

    whole: str
    tail: str


class Thought(NamedTuple):
    """What a template writes around a thought of the last turn."""

    before: str
    end: str


def fresh_prompt(tokenizer: ChatTokenizer, **options: Any) -> Fresh:
    """Return the prompt of a single user message, with options of the template."""
    whole = render(tokenizer, [_said("user", _USER)], **options)
    return Fresh(whole, whole.rpartition(_USER)[2])


def switched(tokenizer: ChatTokenizer, switch: Switch, value: Any) -> Fresh | None:
    """Return that prompt under a switch; None where the template refuses the value."""
    try:
        return fresh_prompt(tokenizer, **{switch.name: value})
    except InputError:
        return None


def found_switches(tokenizer: ChatTokenizer) -> Iterable[Switch]:
    """Yield the switches that the template has."""
    for switch in switches(template_text(tokenizer)):
        on, off = settings_of(tokenizer, switch)
        if on != off and (not switch.in_marks or _differ_in_marks(on, off)):
            yield switch


def settings_of(
    tokenizer: ChatTokenizer, switch: Switch
) -> tuple[Fresh | None, Fresh | None]:
    """Return the prompt of a single user message under both settings of a switch."""
    return switched(tokenizer, switch, switch.on), switched(
        tokenizer, switch, switch.off
    )


def _differ_in_marks(on: Fresh | None, off: Fresh | None) -> bool:
    """Return whether two prompts differ in what begins and ends with marks alone."""
    if on is None or off is None:
        return False
    shared = next(
        (i for i, (a, b) in enumerate(zip(on.tail, off.tail, strict=False)) if a != b),
        min(len(on.tail), len(off.tail)),
    )
    # Two tags may have their first letters in common.
    shared = max(on.tail.rfind(each, 0, shared) + 1 for each in "\n>]") or shared
    rests = [tail[shared:].strip() for tail in (on.tail, off.tail)]
    return rests[0] != rests[1] and all(
        not rest or (MARK.match(rest) and rest[-1] in ">]") for rest in rests
    )


def prompt_ends(tokenizer: ChatTokenizer) -> tuple[str, ...]:
    """Return the texts that may end with an empty thinking.

    They are the ends of a fresh prompt, as it comes and with each switch off, and last
    what stands before a reply whose thought was dropped.
    """
    fresh = (
        fresh_prompt(tokenizer),
        *(switched(tokenizer, each, each.off) for each in found_switches(tokenizer)),
    )
    return (*(each.tail for each in fresh if each), before_reply(tokenizer))


def thoughts_written(tokenizer: ChatTokenizer) -> tuple[Thought, ...]:
    """Return what the template writes around a thought of the last turn.

    A thought is handed over in a field, or in chunks of the content, whichever the
    template reads; where it drops it there is nothing.
    """
    chunk = {"type": "text", "text": _REPLY}
    inner = [{"type": "text", "text": _THOUGHT}]
    forms: tuple[dict[str, Any], ...] = (
        {"reasoning_content": _THOUGHT, "content": _REPLY},
        {"content": [{"type": "thinking", "thinking": _THOUGHT}, chunk]},
        {"content": [{"type": "thinking", "thinking": inner}, chunk]},
    )
    found = []
    for form in forms:
        rendered = _tried(
            tokenizer,
            [_said("user", _USER), {"role": "assistant", **form}],
            add_generation_prompt=False,
        )
        before, thought, after = (rendered or "").partition(_THOUGHT)
        end, reply, _ = after.partition(_REPLY)
        if thought and reply:
            found.append(Thought(before.rpartition(_USER)[2], end))
    return tuple(found)


def before_reply(tokenizer: ChatTokenizer) -> str:
    """Return what stands before a reply whose thought is dropped; "" where it is not.

    Some templates put an empty thinking there.
    """
    messages = [
        _said("user", _USER),
        {"role": "assistant", "reasoning_content": _THOUGHT, "content": _REPLY},
    ]
    rendered = _tried(tokenizer, messages, add_generation_prompt=False) or ""
    between = rendered.rpartition(_REPLY)[0].rpartition(_USER)[2]
    return "" if _THOUGHT in between else between


def behind_reply(tokenizer: ChatTokenizer) -> str:
    """Return what the template writes behind a reply; "" for nothing."""
    said = [_said("user", _USER), _said("assistant", _REPLY)]
    # Some templates end a turn by nothing but the mark of the one that follows.
    for messages in (said, [*said, _said("user", _USER)]):
        rendered = _tried(tokenizer, messages, add_generation_prompt=False)
        _, found, after = (rendered or "").rpartition(_REPLY)
        after = after.partition(_USER)[0]
        if found and after.strip():
            return after
    return ""


def end_token(tokenizer: ChatTokenizer, behind: str, inside: str) -> int | None:
    """Return the token that ends a turn, of what stands behind a reply.

    `inside`: What stands between a thought and its answer; no token of it ends a turn.
    """
    first = next(iter(ids_of(tokenizer, behind.lstrip())), None)
    added = getattr(tokenizer, "added_tokens_decoder", {})
    inner = ids_of(tokenizer, inside)
    return first if first in added and first not in inner else None


def _tried(
    tokenizer: ChatTokenizer, messages: list[dict[str, Any]], **how: Any
) -> str | None:
    """Render what some templates do not take; they still say where thinking starts."""
    try:
        return render(tokenizer, messages, **how)
    except InputError:
        return None


def _said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def ids_of(tokenizer: ChatTokenizer, text: str) -> list[int]:
    """Return the tokens of a text, without special ones around it."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []
