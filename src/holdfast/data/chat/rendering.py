"""Render messages by a chat template, the same way at every time.

What is rendered beside the messages (options of the template, a frozen date) is told
to a tokenizer once and goes with it, so that every verb renders alike.
"""

import datetime
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Protocol, runtime_checkable

from holdfast.errors import InputError, SettingsError

ThinkingMode = Literal["auto", "required", "off"]
_ATTRIBUTE: Final = "holdfast_rendering"
_CHANCE: Final = re.compile(r"\|\s*random\b|\blipsum\s*\(")
_DIRECTIVES: Final = "aAwdbBmyYHIpMSfzZjUWcxXGuVeDFTRhnt"
"""Letters of `strftime`."""
_OURS: Final = frozenset(
    "messages conversation tokenize add_generation_prompt continue_final_message "
    "chat_template return_dict return_tensors return_assistant_tokens_mask padding "
    "truncation max_length tokenizer_kwargs documents tools strftime_now".split()
)


@runtime_checkable
class ChatTokenizer(Protocol):
    """What is asked of a tokenizer."""

    chat_template: Any

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        """Render messages by the chat template."""

    def __call__(self, text: Any, **options: Any) -> Any:
        """Tokenise; the result holds `input_ids`."""

    def decode(self, token_ids: Any, **options: Any) -> Any:
        """Return the text of tokens."""


@dataclass(frozen=True)
class Rendering:
    """How a chat template is rendered, beside the messages."""

    # Variables of the template, such as `enable_thinking`.
    options: Mapping[str, Any] = field(default_factory=dict)
    # The day that a template is told if it asks, as YYYY-MM-DD; None for today.
    date: str | None = None
    # Whether the model is to think: as the template has it by default, required, or
    # off.
    thinking: ThinkingMode = "auto"
    # What opens and closes the thinking, where the user says so.
    tags: tuple[str, str] | None = None
    # Names of the model, by which those that think are known whose template has no word
    # of it.
    name: str = ""


AS_IT_IS: Final = Rendering()
"""A template as it comes, on the day that it is."""


def rendering_of(tokenizer: ChatTokenizer) -> Rendering:
    """Return how a tokenizer's template is rendered."""
    found = getattr(tokenizer, _ATTRIBUTE, None)
    return found if isinstance(found, Rendering) else AS_IT_IS


def set_rendering(tokenizer: ChatTokenizer, rendering: Rendering) -> None:
    """Say how a tokenizer's template is rendered from now on."""
    setattr(tokenizer, _ATTRIBUTE, rendering)


def rendering_record(tokenizer: ChatTokenizer | None) -> dict[str, Any]:
    """Return what a study records of the rendering: what another one would change."""
    if tokenizer is None:
        return {"options": {}, "date": None}
    rendering = rendering_of(tokenizer)
    date = rendering.date or datetime.date.today().isoformat()
    return {
        "options": dict(sorted(rendering.options.items())),
        "date": date if states_date(tokenizer) else None,
    }


def parse_options(entries: Sequence[str]) -> dict[str, Any]:
    """Return the variables of a template, from entries NAME=VALUE.

    `entries`: The entries; a VALUE that is JSON, or True, False or None, is taken as
    such, and any other as text.
    """
    options: dict[str, Any] = {}
    words = {"True": True, "False": False, "None": None}
    for entry in entries:
        name, found, value = entry.partition("=")
        if not found or not name.isidentifier() or name in options:
            raise SettingsError(
                "--template-option NAME=VALUE, each name once",
                repr(entry),
                "Write --template-option enable_thinking=false, for example.",
            )
        if name in _OURS:
            raise SettingsError(
                "--template-option of a variable that is the template's own",
                repr(entry),
                "Use --date." if name == "strftime_now" else "Leave it out.",
            )
        try:
            options[name] = words[value] if value in words else json.loads(value)
        except ValueError:
            options[name] = value
    return options


def parse_date(date: str) -> datetime.date:
    """Return the day that a text names."""
    try:
        return datetime.date.fromisoformat(date)
    except ValueError as error:
        raise SettingsError(
            "--date as YYYY-MM-DD", repr(date), "Write --date 2026-01-31, for example."
        ) from error


def states_date(tokenizer: ChatTokenizer) -> bool:
    """Return whether a chat template asks what day it is."""
    return uses(tokenizer, "strftime_now")


def uses(tokenizer: ChatTokenizer, name: str) -> bool:
    """Return whether a chat template has a variable."""
    return bool(re.search(rf"\b{re.escape(name)}\b", template_text(tokenizer)))


def template_text(tokenizer: ChatTokenizer) -> str:
    """Return the chat template as text; "" if there is none."""
    template = tokenizer.chat_template or ""
    if isinstance(template, str):
        return template
    return json.dumps(template, sort_keys=True, ensure_ascii=False, default=str)


def template_sha256(tokenizer: ChatTokenizer) -> str:
    """Return the SHA-256 of the chat template; of the empty text if there is none."""
    text = template_text(tokenizer).encode("utf-8", "surrogatepass")
    return hashlib.sha256(text).hexdigest()


def render(
    tokenizer: ChatTokenizer, messages: Sequence[Mapping[str, Any]], **how: Any
) -> str:
    """Render messages up to where the model goes on.

    `how`: Options that go before those of the tokenizer's rendering.
    """
    if not tokenizer.chat_template:
        raise InputError(
            "a tokenizer with a chat template",
            "one without",
            "Use the chat version of the model, or add its `chat_template.jinja`.",
        )
    _refuse_chance(tokenizer)
    rendering = rendering_of(tokenizer)
    options = {"tokenize": False, "add_generation_prompt": True, **rendering.options}
    day = parse_date(rendering.date or datetime.date.today().isoformat())
    try:
        if states_date(tokenizer):
            options["chat_template"] = _dated(tokenizer, day)
        options |= how
        return str(tokenizer.apply_chat_template(list(messages), **options))
    except Exception as error:  # A template is a program and may raise anything.
        roles = ", ".join(str(message["role"]) for message in messages)
        said = " ".join(str(error).split())[:300]
        raise InputError(
            f"a chat template that takes messages of the roles {roles}",
            f"{type(error).__name__}: {said}",
            "Check the template that comes with the model.",
        ) from error


def _refuse_chance(tokenizer: ChatTokenizer) -> None:
    chance = _CHANCE.search(template_text(tokenizer))
    if chance is not None:
        raise InputError(
            "a chat template that renders a prompt the same way every time",
            f"one that draws by chance (`{chance[0].strip()}`)",
            "Take that part out of the template.",
        )


def _dated(tokenizer: Any, day: datetime.date) -> str:
    """Return the template with a calendar of its own, which stands still at a day.

    Functions cannot be handed to a template, but it may define them. The line of the
    definition ends in a newline, which templates drop behind a block, so that not a
    character of what is rendered changes.
    """
    moment = datetime.datetime.combine(day, datetime.time())
    codes = [f"%{dash}{letter}" for dash in ("", "-") for letter in _DIRECTIVES]
    known = [("%%", "\0"), *((code, moment.strftime(code)) for code in codes)]
    steps = [f"replace({json.dumps(a)}, {json.dumps(b)})" for a, b in known]
    steps.append('replace("\\u0000", "%")')
    macro = (
        "{% macro strftime_now(form) %}{{ form | "
        + " | ".join(steps)
        + " }}{% endmacro %}\n"
    )
    return macro + str(tokenizer.get_chat_template())
