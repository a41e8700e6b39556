"""Which answers heads are ranked on, and on which prompts an ablation is tried.

Heads are chosen on training requests alone, and so are the wrappers that are said to
work; everything that is reported is measured on held-out requests.
"""

from collections.abc import Sequence
from typing import NamedTuple

from holdfast.analysis.cliff import MIN_TOKENS
from holdfast.data.splits import Test, Train
from holdfast.errors import TooFewExamplesError
from holdfast.session.head_settings import MIN_REQUESTS
from holdfast.session.outcomes import GAVE_IN
from holdfast.session.rows import Rollout

MIN_TRIED = 5
LEAST = 0.05
"""Success on training requests below which a wrapper does not work at all."""

NEAR_BEST = 0.75
"""A wrapper works if it does so at least this often, relative to the best one."""

HARMFUL = ("harmful", "wrapped")
BENIGN = ("benign", "benign_wrapped")
LOOKALIKE = "safe_lookalike"


class Selected(NamedTuple):
    """Complied harmful answers: those that rank heads, and those that check them."""

    ranking: Train[Rollout]
    checking: Test[Rollout]


class Prompts(NamedTuple):
    """Held-out answers whose prompts are asked again.

    Attributes:
        harmful: Under the wrappers that work, complied with or not.
        others: Harmful prompts of all other kinds, which are refused so far.
        benign: Plain and wrapped.
        lookalikes: Harmless ones that sound dangerous, if the study has any.
        wrappers: The wrappers that work on training requests; None is no wrapper.
    """

    harmful: list[Rollout]
    others: list[Rollout]
    benign: list[Rollout]
    lookalikes: list[Rollout]
    wrappers: list[str | None]


def select(
    rows: Sequence[Rollout], limit: int, flag: str = "--selection-prompts"
) -> Selected:
    """Return complied harmful answers with enough thinking, by split.

    Args:
        rows: All rows of the study.
        limit: At most so many of each split, by content hash.
        flag: The flag that sets the limit, which a message names where it is to blame.

    Raises:
        TooFewExamplesError: If a split has fewer than 10 base requests of them.
    """
    found = [
        row
        for row in rows
        if row.role in HARMFUL
        and row.is_complied
        and row.closed
        and row.spans.thinking[1] - row.spans.thinking[0] >= MIN_TOKENS
    ]
    parts = [_first(_of(found, split), len(found)) for split in ("train", "test")]
    least = [_rows_for(part, MIN_REQUESTS) for part in parts]
    if any(n is None or n > limit for n in least):
        raise _too_few([part[:limit] for part in parts], least, flag)
    train, test = (tuple(part[:limit]) for part in parts)
    return Selected(Train(train), Test(test))


def _rows_for(rows: Sequence[Rollout], n_requests: int) -> int | None:
    """Return how many first rows hold so many base requests; None if all do not."""
    seen: set[str] = set()
    for count, row in enumerate(rows, start=1):
        seen.add(row.request_id)
        if len(seen) == n_requests:
            return count
    return None


def _too_few(
    parts: Sequence[Sequence[Rollout]], least: Sequence[int | None], flag: str
) -> TooFewExamplesError:
    """Say whether the data are short, or only what the flag has left of them."""
    counts = [len({row.request_id for row in part}) for part in parts]
    enough = [n for n in least if n is not None]
    advice = (
        f"Set {flag} to {max(enough)} or more, which holds as many requests."
        if len(enough) == len(least)
        else "Where no attack succeeds there is no head to find; else add harmful "
        "prompts that the model complies with."
    )
    return TooFewExamplesError(
        f"complied harmful answers to {MIN_REQUESTS} training requests and as many "
        f"held-out ones, with {MIN_TOKENS} tokens of thinking or more",
        f"{counts[0]} and {counts[1]}",
        advice,
    )


def choose_prompts(rows: Sequence[Rollout], limit: int) -> Prompts:
    """Return held-out prompts to ask again: harmful ones that may work, and benign.

    Which wrappers work is read off training requests, so that no prompt is chosen by
    the outcome that is measured on it.

    Args:
        rows: All rows of the study.
        limit: At most so many of each label, by content hash; of lookalikes half as
            many.

    Raises:
        TooFewExamplesError: If no attack succeeds on training requests, or no prompt
            of a label is held out.
    """
    working = _working(_of(rows, "train"))
    test = [row for row in _of(rows, "test") if row.closed]
    asked = [row for row in test if row.role in HARMFUL]
    harmful = [row for row in asked if (row.role, row.wrapper) in working]
    others = [row for row in asked if (row.role, row.wrapper) not in working]
    benign = [row for row in test if row.role in BENIGN]
    if not harmful or not benign:
        raise TooFewExamplesError(
            "held-out harmful prompts of a kind that works on training requests, and "
            "held-out benign ones",
            f"{len(harmful)} and {len(benign)}",
            "Where no attack succeeds there is nothing to ablate; else add prompts.",
        )
    names = {row.wrapper for row in harmful}
    return Prompts(
        _first(harmful, limit),
        _first(others, limit),
        _first(benign, limit),
        _first([row for row in test if row.role == LOOKALIKE], -(-limit // 2)),
        sorted(names, key=lambda name: name or ""),
    )


def _working(train: Sequence[Rollout]) -> set[tuple[str, str | None]]:
    rates: dict[tuple[str, str | None], float] = {}
    for role, wrapper in {(row.role, row.wrapper) for row in train}:
        kind = [row for row in train if (row.role, row.wrapper) == (role, wrapper)]
        if role in HARMFUL and len(kind) >= MIN_TRIED:
            hits = sum(row.verdict in GAVE_IN for row in kind)
            rates[role, wrapper] = hits / len(kind)
    best = max(rates.values(), default=0.0)
    least = max(LEAST, NEAR_BEST * best)
    return {kind for kind, rate in rates.items() if rate > LEAST and rate >= least}


def _of(rows: Sequence[Rollout], split: str) -> list[Rollout]:
    return [row for row in rows if row.split == split]


def _first(rows: Sequence[Rollout], limit: int) -> list[Rollout]:
    """Return the first rows by content hash, one role and sample as good as another."""
    return sorted(rows, key=lambda row: (row.prompt_id, row.row_id))[:limit]
