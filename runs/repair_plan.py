"""What the repair experiment runs: its cells in their order, and its settings.

`ROWS`, `TEST`, `STEPS`, `FULL_STEPS`, `SEEDS`, `FEW`, `AUDIT_LIMIT` and `MODEL` in the
environment make it smaller or move it to another model; docs/repair.md states the
experiment that counts.
"""

import os
from dataclasses import dataclass
from typing import NamedTuple

PRIMARY = "1%"
RIVALS = ("cliff", "random-flagged", "final")
OTHERS = ("length", "loss")
OTHER_BUDGETS = ("0.25%", "2%")
AT_OTHER_BUDGETS = ("cliff", "random-flagged", "final", "random")
DRAWN = ("random", "random-flagged")
"""Selectors that draw rows; the others choose the same ones under every seed."""


class Cell(NamedTuple):
    """One model that is trained and tested."""

    selector: str
    budget: str
    seed: int

    @property
    def name(self) -> str:
        """Name of its record and of its model."""
        return f"{self.selector}-{self.budget.rstrip('%')}-{self.seed}"

    @property
    def chosen(self) -> str:
        """Name of the selection that it is trained on."""
        seed = self.seed if self.selector in DRAWN else 0
        return f"{self.selector}-{self.budget.rstrip('%')}-{seed}"


@dataclass(frozen=True)
class Plan:
    """The settings on which every record depends."""

    model: str
    rows: int
    test: int
    steps: int
    full_steps: int
    audit_limit: int
    seeds: int
    few: int

    def cells(self) -> tuple[Cell, ...]:
        """Return all cells; what the primary contrasts need comes first."""
        many, few = range(self.seeds), range(self.few)
        return (
            *(Cell(by, PRIMARY, seed) for seed in many for by in RIVALS),
            *(Cell("random", PRIMARY, seed) for seed in many),
            Cell("all", "100%", 0),
            *(
                Cell(by, budget, seed)
                for budget in OTHER_BUDGETS
                for seed in few
                for by in AT_OTHER_BUDGETS
            ),
            *(Cell(by, PRIMARY, seed) for seed in few for by in OTHERS),
        )

    def mended(self) -> tuple[Cell, ...]:
        """Return the cells of the recommended setting, which are audited as well."""
        return tuple(Cell("cliff", PRIMARY, seed) for seed in range(self.seeds))

    def steps_of(self, cell: Cell) -> int:
        """Return the optimiser steps; equal for all but the whole pool."""
        return self.full_steps if cell.selector == "all" else self.steps


def plan() -> Plan:
    """Return the plan that counts, or what the environment makes of it."""

    def number(name: str, default: int) -> int:
        return int(os.environ.get(name, default))

    return Plan(
        os.environ.get("MODEL", "organism:cliff"),
        number("ROWS", 20_000),
        number("TEST", 1_000),
        number("STEPS", 120),
        number("FULL_STEPS", 1_000),
        number("AUDIT_LIMIT", 120),
        number("SEEDS", 5),
        number("FEW", 3),
    )
