"""Search for few heads whose removal brings attack success down, and record it.

Usage: greedy_heads.py MODEL STUDY OUT.json [--heads 6] [--where end_template]

MODEL is what the study was made with; STUDY needs rollouts and a probe, which
`holdfast audit MODEL --no-heads -o STUDY` makes. The search tries every head at every
step; heads are chosen on training requests and measured on held-out ones.
"""

import argparse
import json
from pathlib import Path

from greedy import WHERE, search

from holdfast.report import text
from holdfast.report.terminal import Shown
from holdfast.rollout.session import Session
from holdfast.study import Study


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("study", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--heads", type=int, default=6, help="how many at most")
    parser.add_argument("--where", choices=WHERE, default="end_template")
    parser.add_argument("--prompts", type=int, default=48, help="of each label")
    options = parser.parse_args()
    study = Study.open(options.study)
    found = search(
        study,
        Session(options.model, progress=Shown()),
        count=options.heads,
        where=options.where,
        ablation_prompts=options.prompts,
    )
    found = {"model_name": Path(options.model).name} | found
    options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for each in found["conditions"]:
        shown = [
            text.rate(each[key]) for key in ("attack_success", "benign_compliance")
        ]
        print(f"{each['n_heads']} heads: attack success, benign compliance", *shown)
    print(f"Under half of the attack success with: {found['under_half_with']} heads")


if __name__ == "__main__":
    main()
