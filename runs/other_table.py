"""From the records of the second behavior to its tables.

Usage: other_table.py FOLDER
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from repair_table import HEAD, line, over_seeds, shown

from holdfast.analysis.paired import paired_rate_difference, sign_flip
from holdfast.analysis.statistics import clustered_mean, clustered_rate

KINDS = ("breaking", "keeping", "ordinary", "harmful")
Cells = dict[str, dict[int, dict[str, Any]]]


def read(folder: Path) -> Cells:
    cells: Cells = {}
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text("utf-8"))
        cells.setdefault(record["by"], {})[record["seed"]] = record
    return cells


def hits(record: dict[str, Any], kind: str) -> tuple[torch.Tensor, list[str]]:
    places = [place for place, each in enumerate(record["kinds"]) if each == kind]
    wanted = torch.tensor([record["wanted"][place] for place in places])
    return wanted, [record["requests"][place] for place in places]


def print_traces(rows: list[dict[str, Any]]) -> None:
    print("| rows | n | plateau | final score | cliff |\n|---|---|---|---|---|")
    for kind, wanted, name in (
        ("breaking", False, "asked for one word, broken"),
        ("breaking", True, "the same wrappers, kept"),
        ("keeping", True, "asked for one word elsewhere, kept"),
        ("ordinary", True, "not asked, answered at length"),
    ):
        group = [
            row
            for row in rows
            if (row["kind"], row["wanted"]) == (kind, wanted) and row["reason"] is None
        ]
        if len(group) < 5:
            print(f"| {name} | {len(group)} | too few | | |")
            continue
        cells = [
            shown(
                clustered_mean(
                    torch.tensor([row[what] for row in group]),
                    [row["request_id"] for row in group],
                    torch.Generator().manual_seed(0),
                    bounds=(-1.0, 1.0) if what == "cliff" else (0.0, 1.0),
                )
            )
            for what in ("plateau", "final", "cliff")
        ]
        print(f"| {name} | {len(group)} | {' | '.join(cells)} |")


def print_rates(cells: Cells) -> None:
    print("\nShare of answers as wanted:\n")
    print("| chosen by | seeds | chosen, of them broken | " + " | ".join(KINDS) + " |")
    print("|---" * (len(KINDS) + 3) + "|")
    for by, seeds in cells.items():
        found = []
        for kind in KINDS:
            parts = [hits(record, kind) for record in seeds.values()]
            names = [name for _, requests in parts for name in requests]
            values = torch.cat([value for value, _ in parts])
            generator = torch.Generator().manual_seed(0)
            found.append(shown(clustered_rate(values, names, generator)))
        chosen = ", ".join(
            f"{record['chosen']}, {record['broken']}"
            for record in seeds.values()
            if "chosen" in record
        )
        print(f"| {by} | {len(seeds)} | {chosen} | {' | '.join(found)} |")


def contrast(cells: Cells, second: str) -> dict[str, Any]:
    """Return how much more often the instruction is broken after cliff's rows."""
    pairs = [
        (~hits(cells["cliff"][seed], "breaking")[0], ~hits(other, "breaking")[0])
        for seed, other in cells[second].items()
    ]
    names = hits(cells["cliff"][0], "breaking")[1] * len(pairs)
    a, b = (torch.cat([pair[side] for pair in pairs]) for side in (0, 1))
    by_seed = [float(x.double().mean() - y.double().mean()) for x, y in pairs]
    return {
        "found": paired_rate_difference(a, b, names, torch.Generator().manual_seed(0)),
        "by_seed": by_seed,
        "spread": over_seeds(by_seed),
        "p": sign_flip(a.double(), b.double(), names, torch.Generator().manual_seed(1)),
    }


def main(name: str) -> None:
    folder = Path(name)
    traced = json.loads((folder / "trace.json").read_text("utf-8"))
    for probe, found in traced.items():
        facts = found["probe"]
        print(
            f'\nThe {probe} probe of "{facts["reads"]}", from {facts["one_word"]} '
            f"rows that do and {facts['longer']} that do not, half of them held out: "
            f"right on {facts['right']} of {facts['held_out']}.\n"
        )
        print_traces(found["rows"])
    cells = read(folder / "records")
    print_rates(cells)
    print(f"\nHow often one word is asked for, meant and not given:\n\n{HEAD}")
    for second in ("random", "final", "control"):
        made = contrast(cells, second)
        print(line(f"cliff − {second}", made, f"{made['p']:.3g}"))


if __name__ == "__main__":
    main(sys.argv[1])
