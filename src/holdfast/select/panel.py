"""A selection on the terminal."""

from collections.abc import Mapping
from typing import Any

from holdfast.report.section import Section, Sentences, Table


def section(record: Mapping[str, Any]) -> Section:
    """Return what was chosen, and what was left out and why."""
    if record["chosen"] is None:
        scored = f"{record['done']} of {record['shards']} shards are scored."
        return Section("", [Sentences([scored])])
    rows = [
        ["rows of the pool", str(record["pool"]["n_rows"]), ""],
        ["may be chosen", str(record["eligible"]), ""],
    ]
    rows += [
        [why, str(entry["rows"]), ", ".join(entry["first"])]
        for why, entry in record["left_out"].items()
    ]
    if record["forced_close"]:
        rows.append(["thinking closed by force", str(record["forced_close"]), ""])
    threshold = f"score {record['threshold']:.4g} and above"
    rows += [
        ["near copies passed over", str(record["near_copies_passed_over"]), ""],
        ["tied with the last and left out", str(record["tied_and_left_out"]), ""],
        ["chosen", str(record["chosen"]), threshold],
    ]
    rows += [
        [f"  of {name}", str(n), ""]
        for name, n in record.get("by_category", {}).items()
    ]
    title = f"Chosen by {record['settings']['by']}"
    lies = (
        f"The chosen rows lie in {record['output']}, every score in {record['table']}"
    )
    table = Table(title, ("", "rows", "first places"), rows)
    return Section("", [table, Sentences([lies])])
