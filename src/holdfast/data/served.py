"""What a serving engine sent: the answer, the thinking beside it, and how it ended.

Engines agree on little. The thinking lies in `reasoning_content` (SGLang, llama.cpp,
LiteLLM), `reasoning` (vLLM, Ollama) or `thinking` (Ollama's own form), or in parts of
the content; the answer lies in a column, in a message, in a list of choices, or in the
body of a batch line, whose failure may stand in any of four places.
"""

import re
from collections.abc import Mapping
from typing import Any, Final, Literal, NamedTuple

from holdfast.data.tables import TableRow
from holdfast.errors import PromptFileError

COMPLETIONS: Final = ("completion", "response", "answer", "output", "content", "text")
REASONING: Final = ("reasoning_content", "reasoning", "thinking")
_FINISH: Final = ("finish_reason", "finish", "done_reason", "stop_reason")
_CUT: Final = re.compile(r"length|max|limit|exceed|incomplete", re.IGNORECASE)
_WITHHELD: Final = re.compile(
    r"filter|safety|recitation|prohibited|blocklist|spii|malformed|error|abort|cancel",
    re.IGNORECASE,
)
_OK: Final = 200
_SHOWN: Final = 60
Cells = Mapping[str, Any]


class Served(NamedTuple):
    """One answer as it was sent."""

    # The text, which may hold the thinking in tags; None for no text.
    content: str | None = None
    # The thinking where it was sent apart; None where it was not.
    reasoning: str | None = None
    field: str | None = None  # Where that thinking was found.
    # None where the file does not say.
    finish: Literal["stop", "length"] | None = None
    # Why there is no answer at all; None where there is one.
    failure: str | None = None


def ending(finish: str) -> Literal["stop", "length", "withheld"]:
    """Return how an answer ended, whatever word an engine has for it."""
    if _WITHHELD.search(finish):
        return "withheld"
    return "length" if _CUT.search(finish) else "stop"


def whole(text: str) -> str:
    """Return a text in which every half of a surrogate pair is a replacement character.

    JSON may spell one half alone, which no file and no tokenizer can hold.
    """
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def served(row: TableRow, name: str) -> tuple[Served, ...]:
    """Read what was sent for one prompt: one answer for each choice."""
    cells = row.cells
    if cells.get("error"):
        return (Served(failure=_brief(cells["error"])),)
    body: Any = cells
    sent = cells.get("response")
    if isinstance(sent, dict) or ("custom_id" in cells and "response" in cells):
        failure = _failed_response(sent)
        if failure is not None or not isinstance(sent, dict):
            return (Served(failure=failure),)
        body = sent.get("body", sent)
    if isinstance(body.get("completion"), dict):
        body = body["completion"]
    if "choices" in body:
        choices = body["choices"]
        if not isinstance(choices, list) or not choices:
            return (Served(failure="no choice in the answer"),)
        return tuple(
            _answer(choice if isinstance(choice, dict) else {}, row, name)
            for choice in choices
        )
    return (_answer(body, row, name),)


def _failed_response(sent: Any) -> str | None:
    """Return why the response of a batch line is none; vLLM's is never null."""
    if not isinstance(sent, dict):
        return "no response"
    status = sent.get("status_code", _OK)
    if status != _OK:
        return f"status {status}"
    body = sent.get("body", sent)
    if not isinstance(body, dict):
        return "no body in the response"
    return _brief(body["error"]) if body.get("error") else None


def _answer(body: Cells, row: TableRow, name: str) -> Served:
    message = body.get("message")
    said: Cells = message if isinstance(message, dict) else body
    found = next((each for each in COMPLETIONS if said.get(each) is not None), None)
    field = next((each for each in REASONING if _is_text(said.get(each))), None)
    named = any(each in said for each in (*COMPLETIONS, *REASONING))
    content = None if found is None else said[found]
    reasoning = None if field is None else str(said[field])
    if isinstance(content, list):
        content, reasoning, field = _parts(content, reasoning, field)
    if not content and _is_text(said.get("refusal")):
        # Where a server keeps a refusal apart, that is what the model answered.
        content = said["refusal"]
    if not named or not (content is None or isinstance(content, str)):
        raise PromptFileError(
            f"a text `completion` in every row of `{name}`",
            f"{type(content).__name__ if named else 'none'} at {row.place} (columns: "
            f"{', '.join(map(str, row.cells))})",
            'Write one object a line: {"prompt": "...", "completion": "..."}.',
        )
    ended = _finish(body)
    finish = None if ended is None else ending(ended)
    if finish == "withheld":
        return Served(failure=f"withheld by the server ({ended})")
    if content is None and not reasoning:
        return Served(failure="no text")
    return Served(content, reasoning, field, finish)


def _finish(body: Cells) -> str | None:
    """Return how an answer ended, in the words of the server."""
    meta = body.get("meta_info")
    for cells in (body, meta if isinstance(meta, dict) else {}):
        for key in _FINISH:
            value = cells.get(key)
            value = value.get("type") if isinstance(value, dict) else value
            if value:
                return str(value).casefold()
    return None


def _parts(
    parts: list[Any], reasoning: str | None, field: str | None
) -> tuple[str | None, str | None, str | None]:
    """Return content and thinking of a content in parts."""
    texts, thoughts = [], []
    for part in parts:
        if not isinstance(part, dict):
            continue
        kind = str(part.get("type"))
        if kind in ("reasoning", "thinking"):
            thoughts.append(str(part.get(kind) or part.get("text") or ""))
        elif isinstance(part.get("text"), str):
            texts.append(part["text"])
    if thoughts:
        reasoning, field = "".join(thoughts), "content"
    return ("".join(texts) if texts else None), reasoning, field


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _brief(value: Any) -> str:
    """Return an error as one short text, whatever shape it has."""
    while isinstance(value, dict):
        value = value.get("message") or value.get("error") or value.get("code") or "?"
    text = " ".join(str(value).split())
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
