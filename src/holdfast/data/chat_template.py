"""Prompts rendered by the chat template of a tokenizer."""

from collections.abc import Sequence

from holdfast.data.rendering import ChatTokenizer, render
from holdfast.data.thinking import ThinkingFormat
from holdfast.errors import InputError, ThinkingFormatError

__all__ = ["render_prompt"]


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
    rendered = render(tokenizer, messages)
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


def _require_system_role(
    tokenizer: ChatTokenizer, messages: list[dict[str, str]]
) -> None:
    # A template that fails on the user message alone has another fault, named there.
    render(tokenizer, messages[1:])
    try:
        render(tokenizer, messages)
    except InputError as error:
        raise InputError(
            "a chat template that takes a system message",
            f"one that refuses it ({error.found})",
            "Leave the system prompt out, or put its text into the user's message.",
        ) from error
