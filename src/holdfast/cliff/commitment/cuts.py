"""Where a thinking is cut, and what stands behind the cut until the answer begins."""

from collections.abc import Sequence
from typing import NamedTuple

from holdfast.models.model import Adapter
from holdfast.rollout.rows import Rollout

SHARES = (0.0, 0.05, 0.10, 0.20, 0.35, 0.50, 0.80, 1.0)
"""Parts of a thinking that are kept."""


class Cut(NamedTuple):
    """A place where a thinking is cut.

    At the last cut of a row nothing is cut: the row is as it was generated, up to the
    answer, behind the end template that the model itself has written.
    """

    n_thinking: int  # Tokens of the thinking that are kept.
    share: float  # The same as a part of the thinking.
    is_whole: bool = False  # Whether the model's own end template is kept too.

    @property
    def name(self) -> str:
        """Name of the cut within its row."""
        return "whole" if self.is_whole else str(self.n_thinking)


def cuts_of(row: Rollout, shares: Sequence[float] = SHARES) -> list[Cut]:
    """Return the cuts of a row in order, the whole one last; none of them twice."""
    start, end = row.spans.thinking
    total = end - start
    kept = sorted({round(share * total) for share in shares})
    cuts = [Cut(n, n / total if total else 0.0) for n in kept]
    return [*cuts, Cut(total, 1.0, is_whole=True)]


def end_template(adapter: Adapter) -> tuple[int, ...]:
    """Return the tokens by which the model closes a thinking."""
    assert adapter.thinking is not None
    text = adapter.thinking.end_template
    return tuple(adapter.tokenizer(text, add_special_tokens=False)["input_ids"])


def closed_at(row: Rollout, cut: Cut, template: Sequence[int]) -> tuple[int, ...]:
    """Return the tokens of a row up to a cut, closed, so that the answer is next."""
    if cut.is_whole:
        return row.token_ids[: row.final + 1]
    return (*open_at(row, cut), *template)


def open_at(row: Rollout, cut: Cut) -> tuple[int, ...]:
    """Return the tokens of a row up to a cut, the thinking left open."""
    return row.token_ids[: row.spans.thinking[0] + cut.n_thinking]
