"""Every answer of a study as a table to browse, filter and search in the page."""

import base64
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from holdfast.report.text import OUTCOMES, still, title

LONGEST = 6000
"""Characters after which a text of the table is cut; it is whole in the study."""
NO_WRAPPER = "no wrapper"
_FILTERS = ("group", "wrapper", "outcome")
_TEXTS = ("prompt", "thinking", "answer", "note")
_ESCAPES = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}


class BrowsedAnswer(NamedTuple):
    """One line of the table."""

    group: str  # Kind of request in words: a role of an audit, or suite and kind.
    wrapper: str | None  # Jailbreak wrapper or attack; None for none.
    outcome: str  # What the judge made of the answer.
    prompt: str  # What was asked.
    thinking: str  # What the model thought.
    answer: str  # What it answered.
    note: str  # The judge's reason, and what else a reader has to know.
    file: str  # File of the study that holds the answer.


def browse_context(
    answers: Sequence[BrowsedAnswer], script: str
) -> dict[str, Any] | None:
    """Prepare the table.

    Texts are data that the script sets as text, so that nothing in them is markup.

    Returns: What the template shows; None where there is no answer.
    """
    if not answers:
        return None
    named = [_named(answer) for answer in answers]
    choices = {
        key: sorted(Counter(each[key] for each in named).items()) for key in _FILTERS
    }
    places = {
        key: {name: place for place, (name, _) in enumerate(found)}
        for key, found in choices.items()
    }
    data = {f"{key}s": [name for name, _ in found] for key, found in choices.items()}
    rows = [
        [
            *(places[key][each[key]] for key in _FILTERS),
            *(each[key] for key in _TEXTS),
        ]
        for each in named
    ]
    return {
        **{f"{key}s": found for key, found in choices.items()},
        "data": _embedded({**data, "rows": rows}),
        "files": " and ".join(sorted({answer.file for answer in answers})),
        "longest": f"{LONGEST:,}",
        "script": script,
        "total": f"{len(answers):,}",
    }


def policy_hash(script: str) -> str:
    """Return the source expression that lets a page run this script and no other."""
    digest = hashlib.sha256(script.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"


def _named(answer: BrowsedAnswer) -> dict[str, str]:
    """Return the words of one line, harmless in a page and cut where too long."""
    found = {key: _cut(still(getattr(answer, key) or "")) for key in _TEXTS}
    return found | {
        "group": still(answer.group),
        "wrapper": still(answer.wrapper or NO_WRAPPER),
        "outcome": title(answer.outcome, OUTCOMES),
    }


def _cut(text: str) -> str:
    if len(text) <= LONGEST:
        return text
    return f"{text[:LONGEST]}… ({len(text) - LONGEST:,} more characters)"


def _embedded(data: Mapping[str, Any]) -> str:
    """Return JSON that no text of it can break out of a script element of the page."""
    written = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    for sign, escape in _ESCAPES.items():
        written = written.replace(sign, escape)
    return written
