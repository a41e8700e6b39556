"""What a person sees of a selection and of a training run."""

from collections.abc import Mapping
from typing import Any

from holdfast.cli.showing import print_lines, print_table

SHOWN = 12


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


def print_finetuned(found: Mapping[str, Any]) -> None:
    """Print what was trained on, and how the loss went."""
    rows = [
        [name, str(entry["used"]), str(entry["left_out"])]
        for name, entry in found["data"].items()
    ]
    print_table("Rows", ("", "used", "left out"), rows)
    losses = found["losses"]
    if "defense_term" in losses[0]:
        terms = [entry["defense_term"] for entry in losses]
        print_lines(
            f"{found['settings']['recipe']['defense']} adds {terms[0]:.4f} at the "
            f"first step, {terms[-1]:.4f} at the last."
        )
    print_lines(
        f"{found['steps']} steps; loss {losses[0]['loss']:.4f} at the first, "
        f"{losses[-1]['loss']:.4f} at the last.",
        f"Written to {found['directory']}",
    )


def print_sinks(block: Mapping[str, Any]) -> None:
    """Print what was found of each checkpoint, and of the heads that differ most."""
    from holdfast.report import sink_words as words

    rows = [
        [
            words.step_name(each),
            f"{words.count(each['positive'])} of {each['measured']}",
            words.count(each["by_chance"]),
            f"{each['above']} / {each['below']}",
            words.points(each["mean_divergence"]),
            f"{words.share(each['harmful'])} / {words.share(each['reference'])}",
        ]
        for each in block["checkpoints"]
    ]
    columns = (
        "",
        "positive heads",
        "if none diverged",
        "surely + / −",
        "mean divergence, points",
        "mass, harmful / reference",
    )
    n = block["rows"]
    print_table(
        f"Attention to the first token, {n['harmful']} harmful and {n['reference']} "
        f"reference texts on {block['requests']} prompts",
        columns,
        rows,
    )
    known = [each for each in block["heads"] if each["divergence"]["value"] is not None]
    known.sort(key=lambda each: -abs(each["divergence"]["value"]))
    heads = [
        [
            f"{each['layer']}:{each['head']}",
            words.points(each["divergence"]),
            words.mass(each["harmful"]),
            words.mass(each["reference"]),
        ]
        for each in known[:SHOWN]
    ]
    print_table(
        f"Heads that differ most (the first {len(heads)} of {len(block['heads'])})",
        ("layer:head", "divergence, points", "mass, harmful", "mass, reference"),
        heads,
    )
    print_lines(*block["evidence"], *(f"note: {note}" for note in block["notes"]))
