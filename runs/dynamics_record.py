"""Keep what a watched study has found: figures of the signal and of every detector.

Usage: dynamics_record.py STUDY RECORD
"""

import json
import sys
from pathlib import Path
from typing import Any

from experiment import write_record

GUARD = (
    "facts",
    "chosen_on",
    "reported_on",
    "recommended",
    "chosen",
    "reported",
    "by_domain",
    "by_length",
    "within_wrappers",
    "streaming",
    "notes",
)


def main(study: str, record: str) -> None:
    report = json.loads((Path(study) / "report.json").read_text("utf-8"))
    signal = report["signal"]
    model = {**report["model"], "id": Path(report["model"]["id"]).name}
    body: dict[str, Any] = {
        "model": model,
        "outcomes": report["outcomes"],
        "attack_success": report["attack_success"],
        "signal": signal,
        "guard": {key: report["guard"][key] for key in GUARD if key in report["guard"]},
    }
    write_record(Path(record), body)


if __name__ == "__main__":
    main(*sys.argv[1:])
