"""How a model thinks, read off what its chat template renders.

What a fresh prompt renders counts, and the switches that the template has. A tag that
a template only mentions (in a comment, in a sentence, to cut past turns at it) is no
sign that the model thinks: its siblings that do not think share the very words.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from holdfast.data.chat.rendered_turns import (
    MARK,
    Fresh,
    Thought,
    behind_reply,
    end_token,
    found_switches,
    fresh_prompt,
    prompt_ends,
    settings_of,
    thoughts_written,
)
from holdfast.data.chat.rendering import (
    ChatTokenizer,
    Rendering,
    rendering_of,
    rendering_record,
    set_rendering,
    template_text,
    uses,
)
from holdfast.data.chat.thinking_formats import (
    ANSWERS,
    TAGS,
    Tags,
    is_html,
    named_thinker,
    tags_of,
)
from holdfast.errors import InputError, SettingsError, ThinkingFormatError

_NEGATED: Final = re.compile(
    r"\b(not|no|never|without|avoid|omit|skip|cannot|don't|disabled?)\b", re.IGNORECASE
)
_OPENING: Final = re.compile(
    r"\s*(<\|channel\|>\w+|<\|?[A-Za-z][\w:.-]*\|?>|\[[A-Z][A-Z_ ]*\])"
)
_LEAST: Final = 2
_SHARE: Final = 0.1
_COMMENT: Final = re.compile(r"\{#.*?#\}", re.DOTALL)


@dataclass(frozen=True)
class ThinkingFormat:
    """How a model marks its thinking."""

    open: str  # Tag before the thinking, "<think>".
    close: str  # Tag after it, "</think>".
    end_template: str  # Everything between thinking and answer, "\n</think>\n\n".
    opened_by_template: bool  # True if a prompt as rendered ends inside the thinking.
    # What is appended to a prompt where it does not, "<think>\n".
    open_template: str = "<think>\n"
    # What ends the answer before the turn ends, "\n</answer>"; "" for nothing.
    answer_end: str = ""

    def record(self) -> dict[str, Any]:
        """Return it as records keep it; what is empty in most models is left out."""
        kept = asdict(self)
        return kept if self.answer_end else {k: kept[k] for k in list(kept)[:-1]}


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
    if _thinks(tokenizer) == wanted:
        return
    for switch in found_switches(tokenizer):
        if switch.name in rendering.options:
            continue
        options = {
            **rendering.options,
            switch.name: switch.on if wanted else switch.off,
        }
        set_rendering(tokenizer, replace(rendering, options=options))
        if _thinks(tokenizer) == wanted:
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


def _thinks(tokenizer: ChatTokenizer) -> bool:
    try:
        return thinking_format(tokenizer) is not None
    except ThinkingFormatError:
        # A thinking that is closed, but not as an answer begins; loading says so.
        return False


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
    fresh, thoughts = fresh_prompt(tokenizer), thoughts_written(tokenizer)
    named = None if rendering.tags is None else tags_of(*rendering.tags)
    pairs = TAGS if named is None else (named, *TAGS)
    pairs = (*pairs, *_written(thoughts, fresh))
    closed = next((each for each in pairs if _closes(fresh.tail, each)), None)
    if closed is not None:
        _require_begun(_shown(tokenizer, closed, fresh, thoughts), fresh)
        if named is not None and rendering.thinking == "auto":
            raise ThinkingFormatError(
                f"prompts that leave `{named.open}` open",
                "a template that closes the thinking at once",
                "Switch it on: --thinking required, or --template-option NAME=VALUE.",
            )
        return None
    end = fresh.tail.rstrip()
    opened = next((each for each in pairs if end.endswith(each.open)), None)
    tags = opened or named or _bare(tokenizer, fresh, thoughts)
    if tags is None:
        return None
    shown = _shown(tokenizer, tags, fresh, thoughts)
    if opened is not None:
        begun = fresh.tail[fresh.tail.rindex(opened.open) :]
        shown = shown._replace(open_template=begun)
    return ThinkingFormat(
        tags.open,
        tags.close,
        shown.end_template,
        opened is not None,
        shown.open_template,
        shown.answer_end,
    )


def settings_shown(tokenizer: ChatTokenizer) -> list[dict[str, Any]]:
    """Return how a prompt ends, and whether the model thinks, switch by switch.

    Returns: First how prompts are rendered; then each setting that the template takes,
    with `option` as `--template-option` names it.
    """
    rendering = rendering_of(tokenizer)
    asked: dict[str, tuple[str, Any]] = {}
    for switch in found_switches(tokenizer):
        for value in (switch.on, switch.off):
            said = value if isinstance(value, str) else json.dumps(value)
            asked.setdefault(f"{switch.name}={said}", (switch.name, value))
    found: list[dict[str, Any]] = []
    for option, chosen in [(None, None), *asked.items()]:
        options = {**rendering.options, **dict([chosen] if chosen else [])}
        set_rendering(tokenizer, replace(rendering, options=options))
        try:
            tail, thinks = fresh_prompt(tokenizer).tail, _thinks(tokenizer)
        except InputError:
            continue  # A value that the template refuses.
        finally:
            set_rendering(tokenizer, rendering)
        found.append({"option": option, "thinks": thinks, "prompt_end": tail})
    return found


def turn_end(tokenizer: ChatTokenizer, fmt: ThinkingFormat | None) -> int | None:
    """Return the token that the template writes behind a reply to end the turn.

    Where it writes nothing there, it is the token that begins the user's next turn.

    Returns: The token; None where the reply is followed by no token of its own.
    """
    if not tokenizer.chat_template:
        return None
    behind = behind_reply(tokenizer)
    if fmt is None:
        return end_token(tokenizer, behind, "")
    behind = behind.removeprefix(fmt.answer_end)
    return end_token(tokenizer, behind, fmt.end_template)


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
        if tag in known or (n >= least and not is_html(tag))
    }


def require_known_format(
    fmt: ThinkingFormat | None, said: Sequence[tuple[str, str]]
) -> None:
    """Refuse answers that are thinking, of a model that is not known to think.

    Its template has no word of it, and so says nothing of where the answer begins.

    `said`: What the user said, and the first words of the answer, special tokens
    included. A prompt may ask for the tag, which is then no thinking.
    Raises: ThinkingFormatError if most of them begin with a known opening tag.
    """
    known = {each.open: each for each in TAGS}
    openings = [
        opening for asked, opening in said if not any(tag in asked for tag in known)
    ]
    found = strange_openings(openings) if fmt is None else {}
    for tag, n in found.items():
        if tag in known and 2 * n > len(said):
            raise ThinkingFormatError(
                "answers of a model that does not think, as its chat template has it",
                f"{n} of {len(said)} that begin with `{tag}`",
                "Their thinking would be judged as the answer. Name its tags: "
                f"--thinking-tags '{tag}' '{known[tag].close}'.",
            )


def _bare(
    tokenizer: ChatTokenizer, fresh: Fresh, thoughts: Sequence[Thought]
) -> Tags | None:
    """Return the tags of a model whose prompts end before its thinking, or None."""
    on, source = False, template_text(tokenizer)
    always = any(tags.always and _around(thoughts, tags) for tags in TAGS)
    for switch in found_switches(tokenizer):
        with_on, with_off = settings_of(tokenizer, switch)
        if with_off == fresh and with_on != fresh and not always:
            return None
        # A setting that the template refuses says nothing of the default.
        on = on or (with_on == fresh and with_off not in (None, fresh))
    written = [tags for tags in TAGS if _around(thoughts, tags) is not None]
    told = [tags for tags in TAGS if _tells(fresh.whole, tags)]
    tails = prompt_ends(tokenizer)
    by_switch = [tags for tags in TAGS if on and _closed(tails, tags) is not None]
    spoken = [
        tags for tags in TAGS if on and tags.open in source and tags.close in source
    ]
    turn = tails[-1]
    emptied = [tags for tags in TAGS if tags.open in turn and _empty(turn, tags)]
    own = _written(thoughts, fresh)
    for found in (by_switch, written, own, emptied, told, spoken):
        if found:
            return found[0]
    return named_thinker(rendering_of(tokenizer).name)


def _closes(tail: str, tags: Tags) -> bool:
    """Return whether a fresh prompt ends behind a thinking, or within its end."""
    end = tail.rstrip()
    if end.endswith((tags.close, tags.end_template.rstrip() or tags.close)):
        return True
    _, opened, behind = end.rpartition(tags.open)
    return bool(opened and behind) and tags.end_template.strip().startswith(
        behind.strip()
    )


def _require_begun(shown: Tags, fresh: Fresh) -> None:
    """Refuse a closed thinking behind which the answer has yet to be begun by marks.

    They would be read as a part of the answer, and no position would be the last one
    before it.
    """
    begin = shown.end_template.partition(shown.close)[2].strip()
    if fresh.tail.rstrip().endswith(begin or shown.close):
        return
    raise ThinkingFormatError(
        "a prompt that closes the thinking and begins the answer "
        f"(`{begin or shown.close}`)",
        "one that leaves the marks of the answer to the model",
        "Switch the thinking on (--thinking required) and use --max-thinking 0, which "
        "closes every thinking at once and begins the answer.",
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


def _shown(
    tokenizer: ChatTokenizer, tags: Tags, fresh: Fresh, thoughts: Sequence[Thought]
) -> Tags:
    """Return tags with what the template itself writes around a thought, or the usual.

    A thought of the last turn shows it; where that is dropped, the empty thinking
    that a switch writes does, but for marks that begin the answer.
    """
    # A comment is no part of what a model was taught.
    source = _COMMENT.sub("", template_text(tokenizer))
    written, begin = _around(thoughts, tags), tags.end_template.partition(tags.close)[2]
    if written is not None:
        before = _opening(written.before, tags.open, fresh.tail)
        tags = tags._replace(open_template=before, end_template=written.end)
    elif (around := _closed(prompt_ends(tokenizer), tags)) is not None:
        end = around[1] + (begin if begin.strip() and begin in source else "")
        tags = tags._replace(open_template=around[0], end_template=end)
    return _answered(tokenizer, tags, source)


def _answered(tokenizer: ChatTokenizer, tags: Tags, source: str) -> Tags:
    """Return tags with what begins and ends the answer, as the template names it."""
    for answer in ANSWERS:
        begin, end = answer.begin.strip(), answer.end.strip()
        if begin in source and end in source and begin not in tags.end_template:
            lead, close, _ = tags.end_template.partition(tags.close)
            tags = tags._replace(
                end_template=lead + close + answer.begin, answer_end=answer.end
            )
    if tags.answer_end.strip() not in source:
        tags = tags._replace(answer_end="")
    behind = behind_reply(tokenizer)
    rest = behind.removeprefix(tags.answer_end)
    before, stop, _ = behind.partition(str(getattr(tokenizer, "eos_token", "")))
    begins = bool(tags.end_template.partition(tags.close)[2].strip())
    ended = end_token(tokenizer, rest, tags.end_template) is not None
    # What begins by a mark is ended by one, though that may be a token of its own.
    if stop and before.strip() and (not ended or (begins and not tags.answer_end)):
        return tags._replace(answer_end=before)
    return tags


def _around(thoughts: Sequence[Thought], tags: Tags) -> Thought | None:
    """Return what stands around a thought in these tags, or None."""
    return next(
        (each for each in thoughts if tags.close in each.end and tags.open in each[0]),
        None,
    )


def _written(thoughts: Sequence[Thought], fresh: Fresh) -> tuple[Tags, ...]:
    """Return tags in which a template writes a thought, and that no table has.

    They are marks and nothing else, behind what ends a fresh prompt or at its end.
    """
    found = []
    for before, end in thoughts:
        known = any(each.open in before and each.close in end for each in TAGS)
        start = before.removeprefix(fresh.tail)
        opening = (
            start or (re.search(r"(<[^<>]+>|\[[^\[\]]+\])\s*$", before) or [""])[0]
        )
        new = before.startswith(fresh.tail) and not known
        if new and MARK.fullmatch(opening) and MARK.fullmatch(end):
            found.append(Tags(opening.strip(), end.strip(), opening, end))
    return tuple(found)


def _opening(before: str, tag: str, prompt_end: str) -> str:
    """Return what opens a thought, with white space that no fresh prompt ends with."""
    start = before.rindex(tag)
    behind = before[len(prompt_end) : start]
    whole = before.startswith(prompt_end) and not behind.strip()
    return before[len(prompt_end) if whole and len(prompt_end) < start else start :]


def _closed(tails: Sequence[str], tags: Tags) -> tuple[str, str] | None:
    """Return what stands around the empty thinking of the first text that has one."""
    return next(filter(None, (_empty(tail, tags) for tail in tails)), None)


def _empty(tail: str, tags: Tags) -> tuple[str, str] | None:
    """Return what opens and what ends an empty thinking at the end of a text.

    Some templates close a thinking that they never open.
    """
    before, closed, behind = tail.rpartition(tags.close)
    if not closed or behind.strip():
        return None
    _, opened, inside = before.rpartition(tags.open)
    if not opened:
        return tags.open_template, tags.close + behind
    half = (len(inside) + 1) // 2
    if inside.strip():
        return None
    return tags.open + inside[:half], inside[half:] + tags.close + behind
