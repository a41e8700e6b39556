"""Write the record of one organism that `decide` was run on.

Usage: accounts_record.py MODEL STUDY RECORD
"""

import hashlib
import json
import sys
from pathlib import Path

KEPT = ("schema", "model", "verdict", "outcomes", "attack_success", "decide")


def main(model: str, study: str, record: str) -> None:
    report = json.loads((Path(study) / "report.json").read_text("utf-8"))
    truth = json.loads((Path(model) / "truth.json").read_text("utf-8"))
    kept = {key: report[key] for key in KEPT}
    kept["model"] = {**kept["model"], "id": Path(model).name}
    if report.get("heads"):
        kept["interchange"] = report["heads"]["interchange"]
    if report.get("ablation"):
        kept["ablation"] = report["ablation"]
    body = {"truth": truth, "report": kept}
    text = json.dumps(body, sort_keys=True)
    body["fingerprint"] = hashlib.sha256(text.encode()).hexdigest()
    Path(record).write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
