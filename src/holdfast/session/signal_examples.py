"""Single answers with their signal, step by step, for a person to look at."""

from collections.abc import Mapping
from typing import Any

import torch

from holdfast.data.conversation import ChatTokenizer, token_texts
from holdfast.session.rows import Rollout
from holdfast.session.signal_reading import LOGIT, TEXT, step_indices
from holdfast.session.signal_records import Read, typical
from holdfast.session.signal_rows import Window, groups_of
from holdfast.session.signal_settings import SignalSettings


def step_examples(
    read: Read,
    windows: Mapping[str, Window],
    settings: SignalSettings,
    tokenizer: ChatTokenizer,
) -> list[dict[str, Any]]:
    """Return a few answers with the signal of every step.

    Args:
        read: What was read.
        windows: The watched tokens of each row, by its id.
        settings: Steps, and what a step is.
        tokenizer: For the text of the tokens.

    Returns:
        One record a row: its group, its verdict, and for each step the text that it
        added, the signal, and the text-level signal beside it.
    """
    rows = typical(read)
    return [
        _example(read, row, group, windows[row.row_id], settings, tokenizer)
        for row, group in zip(rows, groups_of(rows), strict=True)
    ]


def _example(
    read: Read,
    row: Rollout,
    group: str,
    window: Window,
    settings: SignalSettings,
    tokenizer: ChatTokenizer,
) -> dict[str, Any]:
    start = len(window.token_ids) + 1 - window.n
    texts = token_texts(tokenizer, row.token_ids[start : start + window.n])
    compliance = torch.sigmoid(read.of(LOGIT, [row])[0]).tolist()
    said = read.of(TEXT, [row])[0].tolist()
    steps, before = [], 0
    for step, index in enumerate(step_indices(window.n, settings).tolist()):
        if step and index + 1 == before:
            # The text has ended; what follows says the same again.
            break
        steps.append(
            {
                "text": "".join(texts[before : index + 1]),
                "compliance": round(compliance[step], 4),
                "text_signal": said[step],
            }
        )
        before = index + 1
    return {
        "title": row.wrapper or row.role,
        "group": group,
        "verdict": f"{row.verdict}: {row.reason}",
        "steps": steps,
    }
