"""Prompts rendered by a chat template, with control tokens as text.

A prompt may hold the text of a control token (`<|im_end|>`, `</think>`). Tokenised
with the template it would end the user's turn, or the thinking, from inside. Here
every such text is cut behind its first character and tokenised in parts, so that it
stays text; all other prompts have the very tokens of the whole rendered prompt.
"""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from holdfast.data.chat.rendering import ChatTokenizer, render
from holdfast.data.chat.thinking import ThinkingFormat
from holdfast.errors import InputError, ThinkingFormatError


def render_prompt(
    tokenizer: ChatTokenizer,
    text: str,
    *,
    system_prompt: str | None = None,
    thinking: ThinkingFormat | None,
    earlier: Sequence[tuple[str, str]] = (),
) -> str:
    """Render a user's turn up to where the model goes on.

    `system_prompt`: System message, None for no such message.
    `thinking`: Format of the thinking; the prompt then ends where it starts.
    `earlier`: The turns before, each with the model's answer to it, without its
    thinking, as chat programs send it.
    Returns: The prompt as text; tokenise it without special tokens, which it has.
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


_BRACKETED = re.compile(r"<.+>|\[.+\]", re.DOTALL)
_STAND_IN = "holdfast-user"


def prompt_token_ids(
    tokenizer: ChatTokenizer,
    text: str,
    *,
    system_prompt: str | None = None,
    thinking: ThinkingFormat | None,
    earlier: Sequence[tuple[str, str]] = (),
) -> tuple[int, ...]:
    """Render a user's turn and tokenise it, what is said as text alone.

    `system_prompt`: System message, None for no such message. It is the operator's own,
    and control tokens in it stay what they are.
    `thinking`: Format of the thinking; the prompt then ends where it starts.
    `earlier`: The turns before, each with the model's answer to it.
    Returns: The tokens of `render_prompt`, tokenised without special tokens.
    """
    texts = (*(each for turn in earlier for each in turn), text)

    def render(said: Sequence[str]) -> str:
        return render_prompt(
            tokenizer,
            said[-1],
            system_prompt=system_prompt,
            thinking=thinking,
            earlier=tuple(zip(said[:-1:2], said[1::2], strict=True)),
        )

    rendered = render(texts)
    pattern = _pattern(tokenizer)
    cuts = {0, len(rendered)}
    for place, said in enumerate(texts):
        if pattern is None or not pattern.search(said):
            continue
        other = render((*texts[:place], _STAND_IN, *texts[place + 1 :]))
        start, end = _place(rendered, said.strip(), other)
        found = pattern.finditer(rendered[start:end])
        cuts |= {start, end, *(start + each.start() + 1 for each in found)}
    parts = (rendered[a:b] for a, b in pairwise(sorted(cuts)))
    return tuple(token for part in parts for token in _ids(tokenizer, part))


def control_literals(
    tokenizer: ChatTokenizer, texts: Sequence[str]
) -> tuple[int, tuple[str, ...]]:
    """Count the texts that hold the text of a control token.

    `tokenizer`: The tokenizer whose control tokens are looked for.
    Returns: Number of such texts, and which control tokens they hold, sorted.
    """
    pattern = _pattern(tokenizer)
    if pattern is None:
        return 0, ()
    found = [{match[1] for match in pattern.finditer(text)} for text in texts]
    return sum(map(bool, found)), tuple(sorted(set().union(*found)))


def _pattern(tokenizer: Any) -> re.Pattern[str] | None:
    """Return what matches, at width zero, wherever a control token's text begins.

    Control tokens are the special ones, and other added ones in brackets: tags of
    thinking and of tools are often not marked as special. Added tokens without
    brackets (runs of spaces, words of a trade) are text as any other.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {})
    names = {
        token.content
        for token in added.values()
        if token.special or _BRACKETED.fullmatch(token.content)
    }
    # One character cannot be cut; it is that token however it is written.
    longest_first = sorted((n for n in names if len(n) > 1), key=lambda n: (-len(n), n))
    if not longest_first:
        return None
    return re.compile(f"(?=({'|'.join(map(re.escape, longest_first))}))")


def _place(rendered: str, said: str, stand_in: str) -> tuple[int, int]:
    """Return where the user's words are in a rendered prompt.

    `stand_in`: The same prompt around other words.
    """
    before, _, after = stand_in.rpartition(_STAND_IN)
    end = len(rendered) - len(after)
    if rendered.startswith(before) and rendered.endswith(after):
        return len(before), max(len(before), end)
    # The template says something else around other words, or keeps none of these.
    start = rendered.rfind(said)
    return (start, start + len(said)) if start >= 0 else (0, 0)


def _ids(tokenizer: ChatTokenizer, text: str) -> tuple[int, ...]:
    if not text:
        return ()
    return tuple(map(int, tokenizer(text, add_special_tokens=False)["input_ids"]))
