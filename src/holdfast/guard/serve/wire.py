"""What goes to an upstream and comes from it, as it stands on the wire."""

import json
from collections.abc import AsyncGenerator, Mapping
from typing import Any, NoReturn

import httpx

_USUAL: dict[str, Any] = {
    "add_generation_prompt": True,
    "add_special_tokens": False,
    "chat_template": None,
    "chat_template_kwargs": None,
    "continue_final_message": False,
    "documents": None,
    "echo": False,
    "functions": None,
    "include_reasoning": True,
    "reasoning_effort": None,
    "reasoning_format": None,
    "separate_reasoning": True,
    "stream_reasoning": True,
    "thinking_forced_open": False,
    "tools": None,
    "truncate_prompt_tokens": None,
}
"""Fields by which a request gives vLLM, SGLang or llama.cpp another prompt than the one
that is read here, or hides what they think; each with the value that does not."""


def odd_fields(body: Mapping[str, Any]) -> list[str]:
    """Return the fields of a request that change what is to be read."""
    return [
        name
        for name, usual in _USUAL.items()
        if body.get(name) not in (None, [], {}, usual)
    ]


_READ = ("role", "content", "reasoning", "reasoning_content")
"""Parts of an answer that are read along; thinking has one of two names, or both."""


def unread(delta: Mapping[str, Any]) -> list[str]:
    """Return the parts of an answer, or of its next piece, that nobody reads along."""
    odd = [name for name, part in delta.items() if part and name not in _READ]
    for name in _READ[1:]:
        if not isinstance(delta.get(name) or "", str):
            odd.append(name)
    first, second = (delta.get(name) for name in _READ[2:])
    return [*odd, "a second thinking"] if first and second and first != second else odd


def sendable(body: Mapping[str, Any]) -> bool:
    """Return whether a request is JSON, of numbers and texts that are some."""
    try:
        json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        return False
    return True


async def chunks_of(response: httpx.Response) -> AsyncGenerator[dict[str, Any] | None]:
    """Yield what an upstream sends; None where it only says that it is there."""
    async for line in _lines(response):
        if line.startswith(b":"):
            yield None
        if not line.startswith(b"data:"):
            continue
        data = line.removeprefix(b"data:").strip()
        if data == b"[DONE]":
            return
        yield dict(parsed(data))


async def _lines(response: httpx.Response) -> AsyncGenerator[bytes]:
    """Yield lines that a line feed ends; what else ends one stands in texts as well."""
    rest = b""
    async for part in response.aiter_bytes():
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            yield line
    yield rest


def parsed(data: bytes) -> Any:
    """Return what an upstream sends; numbers that are none cannot be passed on."""
    try:
        return json.loads(data, parse_constant=_no_number)
    except RecursionError as error:
        raise ValueError("deeper than can be read") from error


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name}, which is no JSON")
