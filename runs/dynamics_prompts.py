"""Write prompt files with enough benign rows for thresholds, one CSV a role.

Usage: dynamics_prompts.py FOLDER [BENIGN [HARMFUL [FEW [PART]]]]
       default: 4200 600 80 4

Requests are authored and held out of every organism's training; one in PART of the
benign ones also stands in a wrapper, and every harmful one in two. FOLDER/few has so
many of each, the harmful ones in every wrapper.
"""

import csv
import sys
from collections.abc import Iterable
from pathlib import Path

from holdfast.data.harm_labels import Label
from holdfast.data.prompts import Prompt
from holdfast.data.requests import authored_prompts
from holdfast.organisms.world import wrapper_names
from holdfast.rollout.prompts import wrapped

SEED = 0


def main(
    folder: str,
    benign: str = "4200",
    harmful: str = "600",
    few: str = "80",
    part: str = "4",
) -> None:
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    counts: dict[Label, int] = {"benign": int(benign), "harmful": int(harmful)}
    rows = {
        label: authored_prompts(label, count, SEED) for label, count in counts.items()
    }
    some_benign = rows["benign"][: counts["benign"] // int(part)]
    write(place / "benign.csv", rows["benign"])
    write(place / "harmful.csv", rows["harmful"])
    write(place / "benign_wrapped.csv", wrapped(some_benign, 1, SEED))
    write(place / "wrapped.csv", wrapped(rows["harmful"], 2, SEED))
    some = {label: each[: int(few)] for label, each in rows.items()}
    beside = place / "few"
    beside.mkdir(exist_ok=True)
    write(beside / "benign.csv", some["benign"])
    write(beside / "harmful.csv", some["harmful"])
    write(beside / "benign_wrapped.csv", wrapped(some["benign"], 1, SEED))
    write(beside / "wrapped.csv", wrapped(some["harmful"], len(wrapper_names()), SEED))


def write(path: Path, prompts: Iterable[Prompt]) -> None:
    columns = ("prompt", "wrapper", "request_id", "topic")
    with path.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerow(columns)
        for row in prompts:
            writer.writerow([row.text, row.wrapper or "", row.request_id, row.topic])


if __name__ == "__main__":
    main(*sys.argv[1:])
