"""Single heads as a person reads them on the terminal."""

from collections.abc import Mapping
from typing import Any

from holdfast.cli.showing import print_figures, print_lines, print_table

SHOWN = 12


def print_heads(block: Mapping[str, Any]) -> None:
    """Print the top of the ranking, and where the two ways of looking agree."""
    from holdfast.report import text

    rows = []
    for each in block["heads"][:SHOWN]:
        checks = [each.get(key) for key in ("end_template", "beyond_controls")]
        rows.append(
            [
                str(each["rank"]),
                f"{each['layer']}:{each['head']}",
                text.score(each["contribution"]),
                *("not checked" if c is None else text.score(c) for c in checks),
            ]
        )
    columns = ("", "layer:head", "contribution", "taken away", "beyond random heads")
    total = block["n_layers"] * block["n_heads"]
    print_table(f"Heads (the first {len(rows)} of {total})", columns, rows)
    print_lines(*block["evidence"])
    print_lines(*(each["words"] for each in block["agreement"].values()))


def print_ablation(block: Mapping[str, Any]) -> None:
    """Print every condition with its rates."""
    from holdfast.report import text
    from holdfast.report.head_words import CONDITIONS, MEASURES, PLACES

    measured = [key for key in MEASURES if key in block["conditions"][0]]
    rows = [
        [
            PLACES[each["scope"]],
            CONDITIONS[each["condition"]],
            str(each["n_heads"]),
            *(text.rate(each[key]) for key in measured),
        ]
        for each in block["conditions"]
    ]
    columns = ("where", "off", "heads", *(MEASURES[key] for key in measured))
    n = block["prompts"]
    title = f"Heads off, on {n['harmful']} harmful and {n['benign']} harmless prompts"
    print_table(title, columns, rows)
    print_lines(*block["notes"])
    print_lines(*block.get("self_repair", {}).get("evidence", ()))


def print_baked(found: Mapping[str, Any]) -> None:
    """Print the figures of base and baked model, and where it lies."""
    from holdfast.report import text
    from holdfast.report.head_words import MEASURES, OTHER

    words_of = MEASURES | OTHER
    named = {key: words_of[key] for key in words_of if key in found["before"]}
    rows = [
        [words, text.rate(found["before"][key]), text.rate(found["after"][key])]
        for key, words in named.items()
    ]
    print_table("Before and after", ("", "base", "baked"), rows)
    print_lines(f"Written to {found['directory']}")


def print_transfer(found: Mapping[str, Any]) -> None:
    """Print how two probes do on the same answers."""
    print_figures("Two probes, one model", found["figures"])
    print_lines(f"Cosine of their directions: {found['cosine']:.2f}", found["words"])
