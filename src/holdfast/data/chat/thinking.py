"""How a model thinks, read off what its chat template renders.

What a fresh prompt renders counts, and the switches that the template has. A tag that
a template only mentions (in a comment, in a sentence, to cut past turns at it) is no
sign that the model thinks: its siblings that do not think share the very words.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

from holdfast.data.chat.rendering import (
    ChatTokenizer,
    Rendering,
    render,
    rendering_of,
    rendering_record,
    set_rendering,
    template_text,
    uses,
)
from holdfast.data.chat.thinking_formats import (
    HTML,
    SWITCHES,
    TAGS,
    Switch,
    Tags,
    named_thinker,
    tags_of,
)
from holdfast.errors import InputError, SettingsError, ThinkingFormatError

_USER: Final = "holdfast-user"
_THOUGHT: Final = "holdfast-thought"
_REPLY: Final = "holdfast-reply"
_NEGATED: Final = re.compile(
    r"\b(not|no|never|without|avoid|omit|skip|cannot|don't|disabled?)\b", re.IGNORECASE
)
_OPENING: Final = re.compile(
    r"\s*(<\|channel\|>\w+|<\|?[A-Za-z][\w:.-]*\|?>|\[[A-Z][A-Z_ ]*\])"
)
_LEAST: Final = 2
_SHARE: Final = 0.1


@dataclass(frozen=True)
class ThinkingFormat:
    """How a model marks its thinking."""

    open: str  # Tag before the thinking, "<think>".
    close: str  # Tag after it, "</think>".
    end_template: str  # Everything between thinking and answer, "\n</think>\n\n".
    opened_by_template: bool  # True if a prompt as rendered ends inside the thinking.
    # What is appended to a prompt where it does not, "<think>\n".
    open_template: str = "<think>\n"


class _Fresh(NamedTuple):
    """What a template writes around a single user message, and behind it."""

    whole: str
    tail: str


def configure(tokenizer: ChatTokenizer, rendering: Rendering) -> None:
    """Say how a tokenizer's template is rendered, thinking switched as asked for.

    `rendering`: How it is rendered. Where thinking is required or off and the template
    has it otherwise, the template's own switch is added to the options.
    """
    for name in rendering.options:
        if not uses(tokenizer, name):
            raise SettingsError(
                "--template-option of a variable that the chat template has",
                f"`{name}`, which is not in it",
                "Check the spelling in the model's chat_template.jinja.",
            )
    # Frozen here, so that a run over midnight does not mix two days.
    set_rendering(tokenizer, rendering)
    rendering = replace(rendering, date=rendering_record(tokenizer)["date"])
    set_rendering(tokenizer, rendering)
    if rendering.thinking == "auto" or not tokenizer.chat_template:
        return
    wanted = rendering.thinking == "required"
    if (thinking_format(tokenizer) is not None) == wanted:
        return
    for switch in _switches(tokenizer):
        if switch.name in rendering.options:
            continue
        options = {**rendering.options, switch.name: switch[1 if wanted else 2]}
        set_rendering(tokenizer, replace(rendering, options=options))
        if (thinking_format(tokenizer) is not None) == wanted:
            return
    set_rendering(tokenizer, rendering)
    name = rendering.name or "the model"
    if wanted:
        raise ThinkingFormatError(
            "a chat template with a thinking format",
            f"none in the template of {name}",
            "Use a reasoning model, name its tags with --thinking-tags, or take "
            "--thinking auto for its outcomes alone.",
        )
    raise ThinkingFormatError(
        "a chat template with a switch that turns thinking off",
        f"none in the template of {name}",
        "Use --max-thinking 0, which closes every thinking at once.",
    )


def thinking_format(tokenizer: ChatTokenizer) -> ThinkingFormat | None:
    r"""Read the thinking format off what the chat template renders.

    A model thinks if a fresh prompt ends inside a thinking; if a switch that is on by
    default turns it off; if the template writes a thought of the last turn in tags; if
    the prompt itself tells the model how to mark its thinking; or if it is known by
    name. It does not if a fresh prompt ends behind a thinking, or a switch is off.

    `tokenizer`: Tokenizer with a chat template, rendered as `configure` said.
    Returns: The format; None if the model does not think as its prompts are rendered.
    """
    if not tokenizer.chat_template:
        return None
    rendering = rendering_of(tokenizer)
    fresh = _fresh(tokenizer)
    named = None if rendering.tags is None else tags_of(*rendering.tags)
    pairs = TAGS if named is None else (named, *TAGS)
    end = fresh.tail.rstrip()
    if _closed_by(end, pairs):
        if named is not None and rendering.thinking == "auto":
            raise ThinkingFormatError(
                f"prompts that leave `{named.open}` open",
                "a template that closes the thinking at once",
                "Switch it on: --thinking required, or --template-option NAME=VALUE.",
            )
        return None
    opened = next((each for each in pairs if end.endswith(each.open)), None)
    if opened is not None:
        shown = _shown(tokenizer, opened)
        return ThinkingFormat(
            opened.open,
            opened.close,
            shown.end_template,
            True,
            fresh.tail[fresh.tail.rindex(opened.open) :],
        )
    tags = named or _bare(tokenizer, fresh)
    if tags is None:
        return None
    shown = _shown(tokenizer, tags)
    return ThinkingFormat(
        tags.open, tags.close, shown.end_template, False, shown.open_template
    )


def turn_end(tokenizer: ChatTokenizer, fmt: ThinkingFormat | None) -> int | None:
    """Return the token that the template writes behind a reply to end the turn.

    Where it writes nothing there, it is the token that begins the user's next turn.

    Returns: The token; None where the reply is followed by no token of its own.
    """
    if not tokenizer.chat_template:
        return None
    said = [_said("user", _USER), _said("assistant", _REPLY)]
    # Some templates end a turn by nothing but the mark of the one that follows.
    for messages in (said, [*said, _said("user", _USER)]):
        rendered = _tried(tokenizer, messages, add_generation_prompt=False)
        _, found, after = (rendered or "").rpartition(_REPLY)
        after = after.partition(_USER)[0]
        if found and after.strip():
            break
    else:
        return None
    added = getattr(tokenizer, "added_tokens_decoder", {})

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    first = next(iter(ids(after.lstrip())), None)
    inside = () if fmt is None else ids(fmt.end_template)
    return first if first in added and first not in inside else None


def strange_openings(openings: Sequence[str]) -> dict[str, int]:
    """Count tags with which answers begin that look like thinking in another format.

    `openings`: The first words of answers, special tokens included.
    Returns: Answers by tag: known ones however few; others from two answers and a tenth
    of all on, unless it is a tag of a page.
    """
    known = {each.open for each in TAGS}
    counted: dict[str, int] = {}
    for text in openings:
        found = _OPENING.match(text)
        starts = (each for each in known if text.lstrip().startswith(each))
        tag = next(starts, found[1] if found else None)
        if tag is not None:
            counted[tag] = counted.get(tag, 0) + 1
    least = max(_LEAST, _SHARE * len(openings))
    return {
        tag: n
        for tag, n in sorted(counted.items())
        if tag in known or (n >= least and tag.strip("<|>").lower() not in HTML)
    }


def _bare(tokenizer: ChatTokenizer, fresh: _Fresh) -> Tags | None:
    """Return the tags of a model whose prompts end before its thinking, or None."""
    on, source = False, template_text(tokenizer)
    for switch in _switches(tokenizer):
        with_on, with_off = (_with(tokenizer, switch, each) for each in switch[1:])
        if with_off == fresh and with_on != fresh:
            return None
        on = on or (with_on == fresh and with_off != fresh)
    written = [tags for tags in TAGS if _around(tokenizer, tags) is not None]
    told = [tags for tags in TAGS if _tells(fresh.whole, tags)]
    by_switch = [tags for tags in TAGS if on and _closed(tokenizer, tags) is not None]
    spoken = [
        tags for tags in TAGS if on and tags.open in source and tags.close in source
    ]
    for found in (by_switch, written, told, spoken):
        if found:
            return found[0]
    return named_thinker(rendering_of(tokenizer).name)


def _switches(tokenizer: ChatTokenizer) -> Iterable[Switch]:
    """Yield the switches that the template has."""
    for switch in SWITCHES:
        settings = (_with(tokenizer, switch, each) for each in switch[1:])
        if uses(tokenizer, switch.name) and len(set(settings)) > 1:
            yield switch


def _with(tokenizer: ChatTokenizer, switch: Switch, value: Any) -> _Fresh | None:
    try:
        return _fresh(tokenizer, **{switch.name: value})
    except InputError:
        return None


def _fresh(tokenizer: ChatTokenizer, **options: Any) -> _Fresh:
    whole = render(tokenizer, [_said("user", _USER)], **options)
    return _Fresh(whole, whole.rpartition(_USER)[2])


def _closed_by(end: str, pairs: Sequence[Tags]) -> bool:
    return any(
        end.endswith((each.close, each.end_template.rstrip() or each.close))
        for each in pairs
    )


def _tells(rendered: str, tags: Tags) -> bool:
    """Return whether a prompt shows the model how to mark its thinking.

    That is both tags with something between them, in a sentence that forbids nothing.
    """
    shown = re.escape(tags.open) + r"(.*?)" + re.escape(tags.close)
    return any(
        found[1].strip()
        and not _NEGATED.search(re.split(r"[.!?\n]\s", rendered[: found.start()])[-1])
        for found in re.finditer(shown, rendered, re.DOTALL)
    )


def _shown(tokenizer: ChatTokenizer, tags: Tags) -> Tags:
    """Return tags with what the template itself writes around a thought, or the usual.

    A thought of the last turn shows it; where that is dropped, the empty thinking
    that a switch writes does.
    """
    around = _around(tokenizer, tags) or _closed(tokenizer, tags)
    if around is None:
        return tags
    return tags._replace(open_template=around[0], end_template=around[1])


def _around(tokenizer: ChatTokenizer, tags: Tags) -> tuple[str, str] | None:
    """Return what the template writes before and after a thought of the last turn."""
    chunk = {"type": "text", "text": _REPLY}
    forms: tuple[dict[str, Any], ...] = (
        {"reasoning_content": _THOUGHT, "content": _REPLY},
        {"content": [{"type": "thinking", "thinking": _THOUGHT}, chunk]},
        {
            "content": [
                {"type": "thinking", "thinking": [{"type": "text", "text": _THOUGHT}]},
                chunk,
            ]
        },
    )
    for form in forms:
        rendered = _tried(
            tokenizer,
            [_said("user", _USER), {"role": "assistant", **form}],
            add_generation_prompt=False,
        )
        before, thought, after = (rendered or "").partition(_THOUGHT)
        before = before.rpartition(_USER)[2]
        end, reply, _ = after.partition(_REPLY)
        if thought and reply and tags.close in end and tags.open in before:
            return _opening(before, tags.open, _fresh(tokenizer).tail), end
    return None


def _opening(before: str, tag: str, prompt_end: str) -> str:
    """Return what opens a thought, with white space that no fresh prompt ends with."""
    start = before.rindex(tag)
    behind = before[len(prompt_end) : start]
    whole = before.startswith(prompt_end) and not behind.strip()
    return before[len(prompt_end) if whole and len(prompt_end) < start else start :]


def _closed(tokenizer: ChatTokenizer, tags: Tags) -> tuple[str, str] | None:
    """Return what stands around an empty thinking that a switch writes."""
    for switch in (None, *_switches(tokenizer)):
        fresh = (
            _fresh(tokenizer)
            if switch is None
            else _with(tokenizer, switch, switch.off)
        )
        _, opened, inside = (fresh.tail if fresh else "").rpartition(tags.open)
        empty, closed, behind = inside.partition(tags.close)
        if opened and closed and not empty.strip() and not behind.strip():
            half = (len(empty) + 1) // 2
            return tags.open + empty[:half], empty[half:] + tags.close + behind
    return None


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
