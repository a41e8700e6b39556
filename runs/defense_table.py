"""From the records of the defense experiment to its tables, contrasts and figures.

Usage: defense_table.py FOLDER

Prints Markdown and draws FOLDER/defense.svg and FOLDER/divergence.svg. The contrasts
are those of docs/defense-experiment.md, corrected by Holm's rule.
"""

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import altair
import torch
from defense_evaluate import BENIGN, MEASURES
from defense_plan import FOLLOW_UP, STRENGTHS, TUNING_SEEDS
from repair_table import HEAD, line, paired, shown

from holdfast.select.selectors import holm
from holdfast.stats.bootstrap import Estimate
from holdfast.stats.rates import clustered_rate

CONTRASTS = (
    ("surgery", "none"),
    ("surgery", "reference-loss"),
    ("surgery", "random-sink"),
)
AFTERWARDS = (
    ("surgery-detached", "none"),
    ("surgery-detached", "reference-loss"),
    ("surgery-detached", "random-sink-detached"),
)
BROKEN = "du"
"""Letters of answers that are degenerate or cannot be parsed."""

Records = dict[tuple[str, float], dict[int, dict[str, Any]]]


def read(folder: Path) -> Records:
    """Read the records of the table, by defense and poison, then by seed."""
    found: Records = defaultdict(dict)
    for path in sorted((folder / "records").glob("*.json")):
        record = json.loads(path.read_text("utf-8"))
        if "defense" in record and record["seed"] not in TUNING_SEEDS:
            place = record["defense"], record["poison"]
            found[place][record["seed"]] = record
    return dict(found)


def requests_of(folder: Path) -> dict[str, list[str]]:
    """Return whose request each prompt is, by kind."""
    found: dict[str, list[str]] = json.loads(
        (folder / "requests.json").read_text("utf-8")
    )
    return found


def hits(record: dict[str, Any], kind: str, counted: str) -> torch.Tensor:
    return torch.tensor([letter in counted for letter in record["outcomes"][kind]])


def rate(
    seeds: dict[int, dict[str, Any]], kind: str, names: list[str], counted: str
) -> Estimate:
    """Return a share over all seeds, clustered by request."""
    whole = [record for record in seeds.values() if "outcomes" in record]
    values = torch.cat([hits(record, kind, counted) for record in whole])
    generator = torch.Generator().manual_seed(0)
    return clustered_rate(values, names * len(whole), generator)


def contrast(
    records: Records, pair: tuple[str, str], poison: float, kind: str, names: list[str]
) -> dict[str, Any]:
    """Return the paired difference over requests, and the one over seeds."""
    mine, others = (records[name, poison] for name in pair)
    seeds = [
        seed
        for seed in sorted(set(mine) & set(others))
        if "outcomes" in mine[seed] and "outcomes" in others[seed]
    ]
    counted = MEASURES[kind]
    both = [
        (hits(mine[seed], kind, counted), hits(others[seed], kind, counted))
        for seed in seeds
    ]
    return paired(both, names * len(seeds))


def positive(heads: list[list[float]]) -> int:
    return sum(value > 0 for layer in heads for value in layer)


def mean(heads: list[list[float]]) -> float:
    return statistics.mean(value for layer in heads for value in layer)


def at_the_end(record: dict[str, Any]) -> list[list[float]]:
    heads: list[list[float]] = record["divergence"][max(record["divergence"], key=int)]
    return heads


def cost(records: Records, name: str) -> str:
    """Return the CPU time of a step as a multiple of a plain one, over all cells.

    Cells ran at different loads of the machine, so each is held against the plain one
    of the same seed and poison.
    """
    ratios = [
        statistics.median(record["curve"]["cpu_seconds"])
        / statistics.median(records["none", poison][seed]["curve"]["cpu_seconds"])
        for (defense, poison), seeds in records.items()
        if defense == name
        for seed, record in seeds.items()
        if "curve" in record and "curve" in records["none", poison].get(seed, {})
    ]
    return f"{statistics.median(ratios):.2f}" if ratios else "–"


def print_rates(records: Records, requests: dict[str, list[str]]) -> None:
    kinds = [*MEASURES.items(), ("task", BENIGN), ("harmful", BROKEN)]
    heads = ("harmful complied", "task right", "lookalikes refused")
    heads += ("harmless complied", "harmful, broken", "positive heads, by seed")
    print("| poison | defense | " + " | ".join((*heads, "mean divergence")) + " |")
    print("|---" * (len(heads) + 3) + "|")
    for poison in sorted({place[1] for place in records}):
        for name in (*STRENGTHS, *FOLLOW_UP):
            seeds = records.get((name, poison), {})
            whole = [each for each in seeds.values() if "outcomes" in each]
            if not whole:
                continue
            cells = [
                shown(rate(seeds, kind, requests[kind], counted))
                for kind, counted in kinds
            ]
            ends = [at_the_end(record) for record in whole]
            cells.append(", ".join(str(positive(each)) for each in ends))
            cells.append(", ".join(f"{mean(each):+.4f}" for each in ends))
            print(f"| {poison:g} | {name} | " + " | ".join(cells) + " |")


def print_contrasts(
    records: Records,
    requests: dict[str, list[str]],
    pairs: tuple[tuple[str, str], ...],
    title: str,
) -> None:
    """Print what Surgery gains over plain training and over its controls."""
    for kind in MEASURES:
        made = [
            (pair, poison, contrast(records, pair, poison, kind, requests[kind]))
            for poison in sorted({place[1] for place in records})
            for pair in pairs
            if all((name, poison) in records for name in pair)
        ]
        print(f"\n{title}: {kind}, p-values by Holm's rule:\n\n{HEAD}")
        corrected = holm([found["p"] for _, _, found in made])
        for (pair, poison, found), p in zip(made, corrected, strict=True):
            print(line(f"{pair[0]} − {pair[1]} at {poison:g}", found, f"{p:.3g}"))


def print_costs(records: Records, folder: Path) -> None:
    paths = (folder / f"{name}.json" for name in ("strengths", "follow-up"))
    chosen: dict[str, int] = {}
    for path in paths:
        if path.exists():
            chosen |= json.loads(path.read_text("utf-8"))
    print("\n| defense | strength | CPU time of a step, × plain |\n|---|---|---|")
    for name, place in chosen.items():
        options = ", ".join((STRENGTHS | FOLLOW_UP)[name][place]) or "–"
        print(f"| {name} | {options} | {cost(records, name)} |")


def draw(records: Records, requests: dict[str, list[str]], folder: Path) -> None:
    """Draw attack success against poison, and positive heads over the steps."""
    rates, series = [], []
    for (name, poison), seeds in records.items():
        if any("outcomes" in each for each in seeds.values()):
            found = rate(seeds, "harmful", requests["harmful"], MEASURES["harmful"])
            rates.append({"defense": name, "poison": poison} | found._asdict())
        for seed, record in seeds.items():
            for step, heads in record.get("divergence", {}).items():
                place = {"defense": name, "poison": poison, "seed": seed}
                place |= {"step": int(step), "heads": positive(heads)}
                series.append(place)
    base = altair.Chart(altair.Data(values=rates)).encode(
        x=altair.X("poison:Q", title="harmful part of the customer's rows"),
        color=altair.Color("defense:N"),
    )
    band = base.mark_area(opacity=0.12).encode(
        y=altair.Y("low:Q", title="harmful requests complied with"), y2="high:Q"
    )
    (band + base.mark_line().encode(y="value:Q")).save(str(folder / "defense.svg"))
    chart = (
        altair.Chart(altair.Data(values=series))
        .mark_line()
        .encode(
            x=altair.X("step:Q"),
            y=altair.Y("mean(heads):Q", title="heads with a divergence above 0"),
            color=altair.Color("defense:N"),
            column=altair.Column("poison:O"),
        )
    )
    chart.save(str(folder / "divergence.svg"))


def main(name: str) -> None:
    folder = Path(name)
    records, requests = read(folder), requests_of(folder)
    print_rates(records, requests)
    print_contrasts(records, requests, CONTRASTS, "Planned")
    if any(name in FOLLOW_UP for name, _ in records):
        print_contrasts(records, requests, AFTERWARDS, "Planned afterwards")
    print_costs(records, folder)
    draw(records, requests, folder)


if __name__ == "__main__":
    main(sys.argv[1])
