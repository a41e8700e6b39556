"""How models mark their thinking, as data: tags, what stands around them, switches.

What a template renders goes before everything here. The usual texts count only where
a template shows none of its own, which is where it drops thoughts.
"""

import re
from collections.abc import Mapping
from typing import Any, Final, NamedTuple


class Tags(NamedTuple):
    """One way to mark thinking."""

    open: str  # What opens it, "<think>".
    close: str  # What closes it, "</think>".
    open_template: str  # What is usually written to open it, "<think>\n".
    end_template: str  # What usually stands between a thought and its answer.


class Switch(NamedTuple):
    """A variable of chat templates that turns thinking on and off."""

    name: str
    on: Any
    off: Any


def tags_of(opening: str, closing: str) -> Tags:
    r"""Return tags with what usually stands around them.

    `opening`: What opens the thinking. With white space around it, it is taken as what
    is written to open it: "<plan>\n".
    Returns: The tags: of the table where it has them; else a tag in angle brackets has
    a line of its own, and any other mark stands alone, as models write them.
    """
    tag, end = opening.strip(), closing.strip()
    known = next((each for each in TAGS if (each.open, each.close) == (tag, end)), None)
    own_line = tag.startswith("<") and not tag.startswith("<|")
    usual = known or Tags(
        tag,
        end,
        f"{tag}\n" if own_line else tag,
        f"\n{end}\n\n" if own_line else end,
    )
    before = usual.open_template if opening == tag else opening
    after = usual.end_template if closing == end else closing
    return Tags(tag, end, before, after)


def _on_lines(name: str) -> Tags:
    return Tags(f"<{name}>", f"</{name}>", f"<{name}>\n", f"\n</{name}>\n\n")


TAGS: Final = (
    *map(_on_lines, ("think", "thinking", "thought", "reasoning")),
    *map(_on_lines, ("seed:think", "mm:think", "think:opensource")),
    Tags("[THINK]", "[/THINK]", "[THINK]", "[/THINK]"),
    Tags(
        "<|channel|>analysis<|message|>",
        "<|channel|>final<|message|>",
        "<|channel|>analysis<|message|>",
        "<|end|><|start|>assistant<|channel|>final<|message|>",
    ),
    Tags("<|channel>thought", "<channel|>", "<|channel>thought\n", "\n<channel|>"),
    Tags(
        "<|START_THINKING|>",
        "<|END_THINKING|>",
        "<|START_THINKING|>",
        "<|END_THINKING|><|START_RESPONSE|>",
    ),
    Tags(
        "Here are my reasoning steps:",
        "[BEGIN FINAL RESPONSE]",
        "Here are my reasoning steps:\n",
        "\n[BEGIN FINAL RESPONSE]\n",
    ),
)
"""Every known way to mark thinking, the usual one first."""
SWITCHES: Final = (
    Switch("enable_thinking", True, False),
    Switch("thinking", True, False),
    Switch("enable_reasoning", True, False),
    Switch("think", True, False),
    Switch("reasoning", True, False),
    Switch("thinking_mode", "on", "off"),
    Switch("thinking_budget", -1, 0),
    Switch("reasoning_effort", "high", "none"),
)
"""Known switches. A template has one if its two settings render differently."""
_THINKERS: Final[Mapping[str, str]] = {
    r"deepseek[-_]r1|r1[-_]distill|qwq[-_]32b": "<think>",
    r"phi-4-(mini-)?(flash-)?reasoning|deephermes-3": "<think>",
    r"qwen3[\w.-]*-thinking|olmo-3[\w.-]*-think": "<think>",
    r"exaone-deep": "<thought>",
    r"magistral|ministral-3[\w.-]*-reasoning": "[THINK]",
}
"""Models that think although their template may have no word of it, by their name."""
HTML: Final = frozenset(
    "a article b body blockquote br center code details div doctype em footer form "
    "h1 h2 h3 h4 h5 h6 head header hr html i img input label li link main meta nav ol "
    "p pre script section small span strong style sub sup svg table tbody td th thead "
    "title tr u ul video xml".split()
)
"""Tags with which an answer may begin that is a page, and no thinking."""


def named_thinker(name: str) -> Tags | None:
    """Return the tags of a model that is known to think, by its name; else None."""
    path = re.split(r"[/\\]", name.lower().rstrip("/\\"))
    parts = [*path[-2:], *(part for part in path if part.startswith("models--"))]
    for pattern, opening in _THINKERS.items():
        if any(re.search(pattern, part) for part in parts):
            return next(each for each in TAGS if each.open == opening)
    return None
