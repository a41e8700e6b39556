"""Draw docs/picture.svg from a finished study: `python docs/draw_picture.py STUDY`."""

import json
import sys
from pathlib import Path

from holdfast.cliff.panel import picture


def main(study: str) -> None:
    """Draw the picture of the README."""
    folder = Path(study)
    report = json.loads((folder / "report.json").read_text("utf-8"))
    curves = json.loads((folder / "trace.json").read_text("utf-8"))["curves"]
    target = Path(__file__).with_name("picture.svg")
    target.write_text(picture(report, curves), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
