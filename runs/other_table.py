"""From the records of the second behavior to its tables.

Usage: other_table.py FOLDER
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from repair_table import HEAD, line, paired, shown

from holdfast.select.selectors import holm
from holdfast.stats.bootstrap import Estimate
from holdfast.stats.rates import clustered_rate

RIVALS = ("random-flagged", "final", "random")
Cells = dict[str, dict[int, dict[str, Any]]]


def read(folder: Path) -> Cells:
    """Read all records, and with them whose requests their letters are."""
    cells: Cells = {}
    requests = json.loads((folder / "requests.json").read_text("utf-8"))
    for path in sorted((folder / "records").glob("*.json")):
        record = json.loads(path.read_text("utf-8")) | {"requests": requests}
        cells.setdefault(record["by"], {})[record["seed"]] = record
    return cells


def wanted(record: dict[str, Any], kind: str) -> torch.Tensor:
    return torch.tensor([letter == "y" for letter in record["outcomes"][kind]])


def print_traces(groups: dict[str, dict[str, Any]]) -> None:
    print("| rows | n | plateau | final score | cliff |\n|---|---|---|---|---|")
    for name, group in groups.items():
        if "cliff" not in group:
            print(f"| {name} | {group['n']} | too few | | |")
            continue
        found = [shown(Estimate(**group[each])) for each in ("plateau", "final")]
        cliff = shown(Estimate(**group["cliff"]))
        print(f"| {name} | {group['n']} | {' | '.join(found)} | {cliff} |")


def print_rates(cells: Cells) -> None:
    kinds = next(iter(next(iter(cells.values())).values()))["outcomes"]
    print("\nShare of answers as wanted:\n")
    print("| chosen by | seeds | chosen, of them planted | " + " | ".join(kinds) + " |")
    print("|---" * (len(kinds) + 3) + "|")
    for by, seeds in cells.items():
        found = []
        for kind in kinds:
            values = torch.cat([wanted(record, kind) for record in seeds.values()])
            names = [
                name for record in seeds.values() for name in record["requests"][kind]
            ]
            generator = torch.Generator().manual_seed(0)
            found.append(shown(clustered_rate(values, names, generator)))
        chosen = ", ".join(
            f"{record['chosen']}: {record['broken']}"
            for record in seeds.values()
            if "chosen" in record
        )
        print(f"| {by} | {len(seeds)} | {chosen} | {' | '.join(found)} |")


def contrast(cells: Cells, second: str) -> dict[str, Any]:
    """Return how much more often the instruction is broken after cliff's rows."""
    pairs = [
        (~wanted(cells["cliff"][seed], "breaking"), ~wanted(other, "breaking"))
        for seed, other in cells[second].items()
    ]
    names = cells["cliff"][0]["requests"]["breaking"] * len(pairs)
    return paired(pairs, names)


def print_contrasts(cells: Cells) -> None:
    made = [contrast(cells, second) for second in RIVALS]
    corrected = holm([each["p"] for each in made])
    print(
        "\nHow often one word is asked for, meant and not given; p-values by Holm's "
        f"rule:\n\n{HEAD}"
    )
    for second, found, p in zip(RIVALS, made, corrected, strict=True):
        print(line(f"cliff − {second}", found, f"{p:.3g}"))


def main(name: str) -> None:
    folder = Path(name)
    pool = json.loads((folder / "pool.json").read_text("utf-8"))
    print(
        f"The model breaks {pool['flagged']} of {pool['rows']} rows of the pool after "
        f"their own thinking; {pool['planted']} of these were planted."
    )
    for probe, found in json.loads((folder / "trace.json").read_text("utf-8")).items():
        facts = found["probe"]
        if facts is None:
            print(f"\nNo {probe} probe: {found['because']}")
            continue
        print(
            f'\nThe {probe} probe of "{facts["reads"]}", from {facts["one_word"]} '
            f"rows that do and {facts['longer']} that do not, half of them held out: "
            f"right on {facts['right']} of {facts['held_out']}.\n"
        )
        print_traces(found["groups"])
    cells = read(folder)
    print_rates(cells)
    print_contrasts(cells)


if __name__ == "__main__":
    main(sys.argv[1])
