"""Chat template of a tokenizer: its thinking format, and prompts rendered by it."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, runtime_checkable

from jinja2 import TemplateError

from holdfast.errors import InputError, ThinkingFormatError

_TAGS: Final = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("[THINK]", "[/THINK]"),
)
_USER: Final = "holdfast-user"
_THOUGHT: Final = "holdfast-thought"
_REPLY: Final = "holdfast-reply"


@runtime_checkable
class ChatTokenizer(Protocol):
    """What this module asks of a tokenizer."""

    chat_template: Any

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        """Render messages by the chat template."""

    def __call__(self, text: Any, **options: Any) -> Any:
        """Tokenise; the result holds `input_ids`."""

    def decode(self, token_ids: Any, **options: Any) -> Any:
        """Return the text of tokens."""


@dataclass(frozen=True)
class ThinkingFormat:
    r"""How a model marks its thinking.

    Attributes:
        open: Tag before the thinking, "<think>".
        close: Tag after it, "</think>".
        end_template: Everything between thinking and answer, "\n</think>\n\n".
        opened_by_template: True if a prompt as rendered ends inside the thinking.
        open_template: What is appended to a prompt where it does not, "<think>\n".
    """

    open: str
    close: str
    end_template: str
    opened_by_template: bool
    open_template: str = "<think>\n"


def thinking_format(tokenizer: ChatTokenizer) -> ThinkingFormat | None:
    r"""Read the thinking format off the chat template.

    The template decides, not the vocabulary: models that do not think share their
    tokenizer with siblings that do. The end template is what the template itself puts
    between a thought and a reply, and "\n</think>\n\n" where it drops thoughts.

    Args:
        tokenizer: Tokenizer with a chat template.

    Returns:
        The format; None if the template knows no thinking, or switches it off.

    Raises:
        InputError: If the template fails on a single user message.
    """
    if not tokenizer.chat_template:
        return None
    rendered = _render(tokenizer, [{"role": "user", "content": _USER}]).rstrip()
    source = _template_text(tokenizer)
    for opening, closing in _TAGS:
        if rendered.endswith(closing):
            return None
        if opening not in source and closing not in source:
            continue
        before, after = _around_thought(tokenizer, opening, closing)
        return ThinkingFormat(
            open=opening,
            close=closing,
            end_template=after,
            opened_by_template=rendered.endswith(opening),
            open_template=before,
        )
    return None


def template_sha256(tokenizer: ChatTokenizer) -> str:
    """Return the SHA-256 of the chat template; of the empty text if there is none."""
    return hashlib.sha256(_template_text(tokenizer).encode()).hexdigest()


def render_prompt(
    tokenizer: ChatTokenizer,
    text: str,
    *,
    system_prompt: str | None = None,
    thinking: ThinkingFormat | None,
    earlier: Sequence[tuple[str, str]] = (),
) -> str:
    """Render a user's turn up to where the model goes on.

    Args:
        tokenizer: Tokenizer with a chat template.
        text: What the user says.
        system_prompt: System message, None for no such message.
        thinking: Format of the thinking; the prompt then ends where it starts.
        earlier: The turns before, each with the model's answer to it, without its
            thinking, as chat programs send it.

    Returns:
        The prompt as text; tokenise it without special tokens, which it has.

    Raises:
        InputError: If there is no template, or it refuses, drops or rewrites a
            message.
        ThinkingFormatError: If the template closes the thinking at once.
    """
    messages = [
        {"role": role, "content": content}
        for turn in earlier
        for role, content in zip(("user", "assistant"), turn, strict=True)
    ]
    messages.append({"role": "user", "content": text})
    if system_prompt is not None:
        messages = [{"role": "system", "content": system_prompt}, *messages]
        _require_system_role(tokenizer, messages)
    rendered = _render(tokenizer, messages)
    kept = [("system", system_prompt), *(("user", said) for said, _ in earlier)]
    for role, said in (*kept, ("user", text)):
        if said is not None and said.strip() not in rendered:
            raise InputError(
                f"a chat template that keeps the {role} message",
                "one that drops or rewrites it",
                "Leave the system prompt out."
                if role == "system"
                else "Give the prompt without the characters that the template strips.",
            )
    if thinking is None:
        return rendered
    end = rendered.rstrip()
    if end.endswith(thinking.close):
        raise ThinkingFormatError(
            "a prompt that leaves the thinking open",
            f"one that ends with `{thinking.close}`",
            "Leave out the system prompt that switches thinking off.",
        )
    opened = end.endswith(thinking.open)
    return rendered if opened else rendered + thinking.open_template


def _render(
    tokenizer: ChatTokenizer, messages: list[dict[str, str]], **how: Any
) -> str:
    options = {"tokenize": False, "add_generation_prompt": True} | how
    if not tokenizer.chat_template:
        raise InputError(
            "a tokenizer with a chat template",
            "one without",
            "Use the chat version of the model, or add its `chat_template.jinja`.",
        )
    try:
        return str(tokenizer.apply_chat_template(messages, **options))
    except (TemplateError, TypeError, ValueError) as error:
        roles = ", ".join(message["role"] for message in messages)
        raise InputError(
            f"a chat template that takes messages of the roles {roles}",
            f"{type(error).__name__}: {error}",
            "Check the template that comes with the model.",
        ) from error


def _require_system_role(
    tokenizer: ChatTokenizer, messages: list[dict[str, str]]
) -> None:
    # A template that fails on the user message alone has another fault, named there.
    _render(tokenizer, messages[1:])
    try:
        _render(tokenizer, messages)
    except InputError as error:
        raise InputError(
            "a chat template that takes a system message",
            f"one that refuses it ({error.found})",
            "Leave the system prompt out, or put its text into the user's message.",
        ) from error


def _template_text(tokenizer: ChatTokenizer) -> str:
    template = tokenizer.chat_template or ""
    if isinstance(template, str):
        return template
    return json.dumps(template, sort_keys=True, ensure_ascii=False)


def _around_thought(
    tokenizer: ChatTokenizer, opening: str, closing: str
) -> tuple[str, str]:
    """Return what the template writes before and after a thought, or the usual."""
    usual = f"{opening}\n", f"\n{closing}\n\n"
    reply = {"role": "assistant", "reasoning_content": _THOUGHT, "content": _REPLY}
    user = {"role": "user", "content": _USER}
    try:
        rendered = _render(tokenizer, [user, reply], add_generation_prompt=False)
    except InputError:
        # Some templates take no finished reply; they still say where thinking starts.
        return usual
    _, thought, after = rendered.partition(_THOUGHT)
    before = rendered.partition(_THOUGHT)[0]
    end, reply_found, _ = after.partition(_REPLY)
    if not thought or not reply_found or closing not in end or opening not in before:
        return usual
    return before[before.rindex(opening) :], end
