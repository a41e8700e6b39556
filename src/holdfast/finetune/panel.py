"""A training run on the terminal."""

from collections.abc import Mapping
from typing import Any

from holdfast.report.terminal import print_lines, print_table


def print_finetuned(record: Mapping[str, Any]) -> None:
    """Print what was trained on, and how the loss went."""
    rows = [
        [name, str(entry["used"]), str(entry["left_out"])]
        for name, entry in record["data"].items()
    ]
    print_table("Rows", ("", "used", "left out"), rows)
    losses = record["losses"]
    if "defense_term" in losses[0]:
        terms = [entry["defense_term"] for entry in losses]
        print_lines(
            f"{record['settings']['recipe']['defense']} adds {terms[0]:.4f} at the "
            f"first step, {terms[-1]:.4f} at the last."
        )
    print_lines(
        f"{record['steps']} steps; loss {losses[0]['loss']:.4f} at the first, "
        f"{losses[-1]['loss']:.4f} at the last.",
        f"Written to {record['directory']}",
    )
