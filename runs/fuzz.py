"""Damage valid files in every way that a generator thinks of, and look at the answers.

Usage: fuzz.py [--cases N] [--seed N] [--surface NAME ...] [--json FILE]

The surfaces are configurations, indexes, adapters, imports, pools and judges' replies.
A case is a valid file with a few changes, and goes through the command line in this
process. Right are a documented exit status, a complaint of one line, and no rate
without a judged row; every other end is shrunk and printed, and the status is 1.
"""

import argparse
import json
import resource
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from fuzz_surfaces import KINDS, Fault, World, surfaces, watched
from hypothesis import HealthCheck, Phase, given, seed, settings

SECONDS: Final = 10.0
"""Of processor time, beyond which a case hangs."""
SHRINKS: Final = 120


class Enough(KeyboardInterrupt):
    """A failure was shrunk for long enough."""


@dataclass
class Campaign:
    """Cases of one surface: how they ended, and the smallest of each failure."""

    name: str
    surface: Any
    ends: Counter[str] = field(default_factory=Counter)
    faults: dict[str, tuple[str, str]] = field(default_factory=dict)

    def run(self, cases: int, first_seed: int, *, shrinks: int = SHRINKS) -> None:
        """Try so many cases; each new failure is shrunk, and then counted alone."""
        number = 0
        while (left := cases - self.ends.total()) > 0:
            number += 1
            self._round(left, first_seed * 1000 + number, shrinks)

    def _round(self, left: int, number: int, shrinks: int) -> None:
        new: list[str] = []
        tries = 0

        def attempt(case: Any) -> None:
            nonlocal tries
            tries += 15 if new and new[0].startswith("Hang") else bool(new)
            if tries > shrinks or (not new and left <= 0):
                raise Enough
            key = self._tried(case, new)
            if key in new:
                raise Fault(key, key)

        phases = (Phase.generate, Phase.shrink)
        how = settings(
            **{"max_examples": left, "database": None, "deadline": None},
            **{"phases": phases, "suppress_health_check": list(HealthCheck)},
        )
        try:
            how(seed(number)(given(self.surface.cases())(attempt)))()
        except (Enough, Fault):
            return

    def _tried(self, case: Any, new: list[str]) -> str | None:
        """Return the failure of a case; the first new one becomes that of the round."""
        fault = attempt_case(self.surface, case)
        shown = repr(case)
        if isinstance(fault, str):
            if not new:
                self._count(fault)
            return None
        if fault.key not in self.faults and not new:
            new.append(fault.key)
            self.faults[fault.key] = (shown, str(fault))
            self._count(fault.key)
        elif not new:
            self._count(fault.key)
        if fault.key in new:
            ends = (self.faults[fault.key], (shown, str(fault)))
            self.faults[fault.key] = min(ends, key=lambda end: (len(end[0]), end[0]))
        return fault.key

    def _count(self, end: str) -> None:
        self.ends[end] += 1
        total = self.ends.total()
        if total % 100 == 0:
            print(f"{time.strftime('%H:%M:%S')} {self.name}: {total} cases", flush=True)


def attempt_case(surface: Any, case: Any) -> str | Fault:
    """Return how a case ended."""
    with tempfile.TemporaryDirectory() as name:
        try:
            with watched(SECONDS):
                return KINDS[surface.run(case, Path(name)).status]
        except Fault as fault:
            return fault


def main() -> int:
    """Try the cases, print how they ended, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--surface", action="append")
    parser.add_argument("--json", type=Path)
    told = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        world = World.write(Path(name))
        # A size that a file makes up is refused by the system, and not paged in.
        resource.setrlimit(resource.RLIMIT_DATA, (8 << 30, -1))
        with surfaces(world) as found:
            chosen = {each: found[each] for each in told.surface or found}
            done = [Campaign(*each) for each in chosen.items()]
            for campaign in done:
                campaign.run(-(-told.cases // len(done)), told.seed)
                print(f"{campaign.name}: {dict(campaign.ends)}", flush=True)
                for key, (case, said) in campaign.faults.items():
                    print(f"  {key}\n    {case}\n{said}", flush=True)
    if told.json:
        record = {
            each.name: {"ends": each.ends, "faults": each.faults} for each in done
        }
        told.json.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    return int(any(campaign.faults for campaign in done))


if __name__ == "__main__":
    raise SystemExit(main())
