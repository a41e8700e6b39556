"""Write the record of one audited organism: what was found, and the hash of all of it.

Usage: organisms_record.py MODEL STUDY RECORD [ALONE]

ALONE is the record of the same audit before `holdfast decide` was run: its verdict goes
into RECORD as `audit_alone`.
"""

import json
import sys
from pathlib import Path

from experiment import write_record

KEPT = (
    "schema",
    "model",
    "settings",
    "verdict",
    "probe",
    "trace",
    "controls",
    "outcomes",
    "attack_success",
)


def main(model: str, study: str, record: str, alone: str | None = None) -> None:
    report = json.loads((Path(study) / "report.json").read_text("utf-8"))
    truth = json.loads((Path(model) / "truth.json").read_text("utf-8"))
    kept = {key: report[key] for key in KEPT}
    kept["model"] = {**kept["model"], "id": Path(model).name}
    for paths in ("model", "harmful", "benign", "output"):
        kept["settings"].pop(paths, None)
    for block in ("heads", "ablation"):
        if report.get(block):
            kept[block] = report[block]
    body = {"truth": truth, "report": kept}
    if alone is not None:
        earlier = json.loads(Path(alone).read_text("utf-8"))["report"]
        if earlier["model"] != kept["model"] or earlier["verdict"].get("account"):
            raise SystemExit(
                f"{alone} is not of this model before `decide`: remove it and {study}."
            )
        body["audit_alone"] = earlier["verdict"]
    write_record(Path(record), body)


if __name__ == "__main__":
    main(*sys.argv[1:])
