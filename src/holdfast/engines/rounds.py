"""Rows drawn by an engine that knows tokens alone: asked in rounds, replayed here.

When thinking is closed by force, when a row ends and which token belongs to what is
decided by the one state that our own decoding has. An engine is asked for the tokens up
to the next point where the state may step in; what it sent is pushed through the state,
and where that goes on the engine is asked again, with the longer prompt.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from holdfast.errors import EngineError
from holdfast.models.decoding.row_state import (
    Choice,
    Completion,
    GenerationState,
    Tokens,
)

SEEDS = 1 << 31
"""Seeds that are sent are below this, which every engine takes."""


class Round(NamedTuple):
    """What an engine is asked for a row at one time."""

    place: int  # Which row.
    token_ids: tuple[int, ...]  # The prompt, and all that was written behind it.
    seed: int  # Seed of this round.
    limit: int  # Most tokens to send.
    # Text that ends the round once it is written, itself included; "" for none.
    stop: str


class Said(NamedTuple):
    """What an engine sent in one round."""

    token_ids: tuple[int, ...]  # Tokens, a stop token included where it was sent.
    # "stop" if the model ended, or wrote the text that ends the round.
    finish: Literal["stop", "length"]
    # Difference of the two largest logits at each token, where the engine tells.
    gaps: tuple[float, ...] | None = None


@dataclass
class AskedRow:
    """A row on its way, and the engine's part in it."""

    state: GenerationState
    seed: int  # Seed of the row.
    close: str  # The tag that ends the thinking; "" for a model without.
    # Token to stand for an end that was told and not sent.
    end: int
    rounds: int = 0  # Rounds that were asked.
    gaps_known: bool = True  # Whether the engine told every gap so far.
    tokens: Tokens = "drawn"  # Whether the engine told its tokens.

    def next(self) -> Round | None:
        """Return what to ask next; None where the row has ended."""
        self.state.take_forced()
        if self.state.finish is not None:
            return None
        # Another round draws from other random numbers.
        seed = (self.seed + self.rounds * 0x9E3779B1) % SEEDS
        thinking = self.state.is_thinking
        return Round(
            self.state.index,
            tuple(self.state.token_ids),
            seed,
            max(1, self.state.left),
            self.close if thinking else "",
        )

    def take(self, said: Said) -> None:
        """Push what was sent through the state, as far as that wants it.

        Raises:
            EngineError: If nothing was sent, so that the row would never end.
        """
        self.rounds += 1
        self.gaps_known &= said.gaps is not None
        state, was_thinking = self.state, False
        gaps = said.gaps or (math.inf,) * len(said.token_ids)
        for token, gap in zip(said.token_ids, gaps, strict=True):
            was_thinking = state.is_thinking
            state.push(Choice(token, gap, math.inf))
            if state.finish is not None or state.take_forced():
                return
        at_tag = was_thinking and not state.is_thinking
        if said.finish == "stop" and not at_tag:
            if state.is_thinking and self.close:
                # An end, or a tag that the engine keeps to itself: without a text to
                # stop at it says which.
                self.close = ""
                return
            # The model ended, by a token that the engine keeps to itself.
            state.push(Choice(self.end, math.inf, math.inf))
        elif not said.token_ids:
            raise EngineError(
                "tokens of an engine that was asked for some",
                f"none for row {state.index}, and no end",
                "See the log of the engine.",
            )

    def complete(self) -> Completion:
        """Return the row; its gaps are not numbers where the engine did not tell."""
        made = self.state.complete()
        made = replace(made, min_margin=math.nan, tokens=self.tokens)
        return made if self.gaps_known else replace(made, min_top2_gap=math.nan)


def rows_of(
    states: Sequence[GenerationState], seeds: Sequence[int], close: str, end: int
) -> list[AskedRow]:
    """Return rows that have not begun."""
    pairs = zip(states, seeds, strict=True)
    return [AskedRow(state, seed, close, end) for state, seed in pairs]


def rounds(
    rows: Sequence[AskedRow], ask: Callable[[list[Round]], Sequence[Said]]
) -> Iterator[list[Completion]]:
    """Draw rows by an engine that takes many at once; yield them as they end.

    `ask`: Answers rounds, in their order.
    """
    going = list(rows)
    while going:
        asked = [(row, each) for row in going if (each := row.next()) is not None]
        sent = ask([each for _, each in asked]) if asked else []
        for (row, _), said in zip(asked, sent, strict=True):
            row.take(said)
        ended = [row for row in going if row.next() is None]
        going = [row for row in going if row.state.finish is None]
        if ended:
            yield [row.complete() for row in ended]
