"""A selection on the terminal."""

from collections.abc import Mapping
from typing import Any

from holdfast.report.terminal import print_lines, print_table


def print_selection(found: Mapping[str, Any]) -> None:
    """Print what was chosen, and what was left out and why."""
    if found["chosen"] is None:
        return print_lines(f"{found['done']} of {found['shards']} shards are scored.")
    rows = [
        ["rows of the pool", str(found["pool"]["n_rows"]), ""],
        ["may be chosen", str(found["eligible"]), ""],
    ]
    rows += [
        [why, str(entry["rows"]), ", ".join(entry["first"])]
        for why, entry in found["left_out"].items()
    ]
    if found["forced_close"]:
        rows.append(["thinking closed by force", str(found["forced_close"]), ""])
    rows += [
        ["near copies passed over", str(found["near_copies_passed_over"]), ""],
        ["tied with the last and left out", str(found["tied_and_left_out"]), ""],
        ["chosen", str(found["chosen"]), f"score {found['threshold']:.4g} and above"],
    ]
    rows += [
        [f"  of {name}", str(n), ""] for name, n in found.get("by_category", {}).items()
    ]
    title = f"Chosen by {found['settings']['by']}"
    print_table(title, ("", "rows", "first places"), rows)
    return print_lines(
        f"The chosen rows lie in {found['output']}, every score in {found['table']}"
    )
