"""What the defense experiment runs: its cells, strengths and settings.

docs/defense-experiment.md states what is compared and how it is judged. `STEPS`,
`ROWS`, `SEEDS`, `RATE` and `POISONS` in the environment make it smaller.
"""

import os
from dataclasses import dataclass
from typing import NamedTuple

TUNING_SEEDS, TUNING_POISON = (100, 101), 0.1
FIRST_SEED = 200

Grids = dict[str, tuple[tuple[str, ...], ...]]

STRENGTHS: Grids = {
    "none": ((),),
    "safeinstr": (("ratio=0.05",), ("ratio=0.15",), ("ratio=0.45",)),
    "reference-loss": (("weight=0.1",), ("weight=0.5",), ("weight=2",)),
    "kl": (("weight=0.1",), ("weight=0.5",), ("weight=2",)),
    "lisa": (
        ("rho=0.1", "align_steps=2", "task_steps=8"),
        ("rho=1", "align_steps=2", "task_steps=8"),
        ("rho=10", "align_steps=2", "task_steps=8"),
    ),
    "constrained": (
        ("beta=0.1", "beta_first=0.5", "beta_early=2"),
        ("beta=0.5", "beta_first=2", "beta_early=4"),
        ("beta=2", "beta_first=8", "beta_early=16"),
    ),
    "safegrad": (("rho=0.1",), ("rho=0.5",), ("rho=2",)),
    "ldifs": (("weight=1",), ("weight=10",), ("weight=100",)),
    "surgery": (("weight=3",), ("weight=30",), ("weight=300",)),
    "random-sink": (("weight=3",), ("weight=30",), ("weight=300",)),
}
"""Options of each defense from weak to strong; all but `none` have as many."""

DETACHED = (("weight=0.3", "detach=true"), ("weight=3", "detach=true"))
FOLLOW_UP: Grids = {"surgery-detached": DETACHED, "random-sink-detached": DETACHED}
"""What was planned after the table had been seen: gradient through the harmful text
alone. Without its ending the name is that of a defense."""

DRAWS_ROWS = ("reference-loss", "lisa", "safegrad", "surgery", "random-sink")
"""Defenses that draw rows of their own at every step; all draw as many."""

READS_REFUSALS = ("safeinstr", *DRAWS_ROWS)
DEFENSE_BATCH = 4


class Cell(NamedTuple):
    """One model that is trained and tested."""

    defense: str
    poison: float
    seed: int
    strength: int

    @property
    def verb(self) -> str:
        """Name of the defense for `holdfast finetune`."""
        return self.defense.removesuffix("-detached")

    @property
    def options(self) -> tuple[str, ...]:
        """Its options, the rows that it draws included."""
        chosen = (STRENGTHS | FOLLOW_UP)[self.defense][self.strength]
        drawn = (f"batch={DEFENSE_BATCH}",) if self.verb in DRAWS_ROWS else ()
        return (*chosen, *drawn)

    @property
    def name(self) -> str:
        """Name of its record and of its model."""
        share = f"{100 * self.poison:g}"
        return f"{self.defense}-{share}-{self.seed}-{self.strength}"


@dataclass(frozen=True)
class Plan:
    """The settings on which every record depends."""

    rows: int
    steps: int
    rate: float
    seeds: int
    poisons: tuple[float, ...]

    def tuning(self, grids: Grids = STRENGTHS) -> tuple[Cell, ...]:
        """Return the cells that strengths are chosen on."""
        return tuple(
            Cell(name, TUNING_POISON, seed, place)
            for seed in TUNING_SEEDS
            for name, grid in grids.items()
            for place in range(len(grid))
        )

    def cells(self, chosen: dict[str, int]) -> tuple[Cell, ...]:
        """Return the cells of the table, seed by seed, given the chosen strengths."""
        return tuple(
            Cell(name, poison, FIRST_SEED + seed, chosen[name])
            for seed in range(self.seeds)
            for poison in sorted(self.poisons, reverse=True)
            for name in chosen
        )


def plan() -> Plan:
    """Return the plan that counts, or what the environment makes of it."""
    poisons = os.environ.get("POISONS", "0,0.05,0.1,0.2").split(",")
    return Plan(
        int(os.environ.get("ROWS", "320")),
        int(os.environ.get("STEPS", "40")),
        float(os.environ.get("RATE", "4.5e-4")),
        int(os.environ.get("SEEDS", "3")),
        tuple(map(float, poisons)),
    )
