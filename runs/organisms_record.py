"""Write the record of one audited organism: what was found, and the hash of all of it.

Usage: organisms_record.py MODEL STUDY RECORD
"""

import hashlib
import json
import sys
from pathlib import Path

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


def main(model: str, study: str, record: str) -> None:
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
    text = json.dumps(body, sort_keys=True)
    body["fingerprint"] = hashlib.sha256(text.encode()).hexdigest()
    Path(record).write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
