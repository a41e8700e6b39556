"""What the experiments' scripts share: steps done once, rows, prompts and records."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from holdfast.data.chat.template import prompt_token_ids
from holdfast.models.model import Adapter
from holdfast.study import atomic_write_json, claim

BATCH = 128


def once(done: Path, work: Callable[[], None], *, wait: bool = False) -> None:
    """Do a step whose last act is to write a file, unless it is done or in work."""
    if done.exists():
        return
    # Not inside a study, which has to be empty where an audit begins.
    name = f".{done.parent.name}-{done.name}.lock"
    with claim(done.parent.parent / name, wait=wait) as ours:
        # Another process may have done it while this one waited.
        if ours and not done.exists():
            work()


def prompts_of(
    adapter: Adapter, rows: Sequence[dict[str, Any]]
) -> list[tuple[Sequence[int], int]]:
    """Return the prompt of every row, each with seed 0, as `generate` takes them."""
    tokenizer, thinking = adapter.tokenizer, adapter.thinking
    return [
        (prompt_token_ids(tokenizer, row["prompt"], thinking=thinking), 0)
        for row in rows
    ]


def write_record(path: Path, body: dict[str, Any]) -> None:
    """Write a record with the fingerprint of all that is in it."""
    text = json.dumps(body, sort_keys=True)
    mark = hashlib.sha256(text.encode()).hexdigest()
    atomic_write_json(path, body | {"fingerprint": mark})
