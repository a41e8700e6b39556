"""Write the record of one organism that `decide` was run on.

Usage: accounts_record.py MODEL STUDY RECORD
"""

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from experiment import write_record

from holdfast.cliff.commitment.accounts import ACCOUNTS
from holdfast.stats.rates import clustered_rate
from holdfast.study.figures import figure_of, generator

KEPT = ("schema", "model", "verdict", "outcomes", "attack_success", "decide")


def main(model: str, study: str, record: str) -> None:
    report = json.loads((Path(study) / "report.json").read_text("utf-8"))
    truth = json.loads((Path(model) / "truth.json").read_text("utf-8"))
    kept = {key: report[key] for key in KEPT}
    kept["model"] = {**kept["model"], "id": Path(model).name}
    if interchange := (report.get("heads") or {}).get("interchange"):
        kept["interchange"] = interchange
    if report.get("ablation"):
        kept["ablation"] = report["ablation"]
    body = {"truth": truth, "report": kept, "planted_rows": planted_rows(study, truth)}
    write_record(Path(record), body)


def planted_rows(study: str, truth: dict[str, Any]) -> dict[str, Any]:
    """Return the share of each account among rows under the planted wrappers alone.

    What gets through without one is a leak of `aligned`, of which nothing was planted.
    """
    table = pq.read_table(Path(study) / "decide_curve.parquet").to_pylist()
    rows = [
        row
        for row in table
        if row["group"] == "harmful_complied"
        and row["wrapper"] in truth["planted_wrappers"]
    ]
    requests = [row["request_id"] for row in rows]
    found = {}
    for name in ACCOUNTS:
        counted = torch.tensor([row["account"] == name for row in rows])
        draws = generator(0, f"planted_rows/{name}")
        found[name] = figure_of(clustered_rate(counted, requests, draws))
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
