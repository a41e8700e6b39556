"""The signal and its detectors as a person reads them on the terminal."""

from collections.abc import Mapping
from typing import Any

from holdfast.cli.showing import print_lines, print_table


def print_signal(found: Mapping[str, Any]) -> None:
    """Print how well the anchors read, and what each group's trajectories do."""
    from holdfast.report import text
    from holdfast.report.signal_words import FEATURES, FIGURES, GROUPS

    for name, each in found["anchors"].items():
        apart = each["separation"]
        print_lines(
            f"Anchors ({name}): {each['n_compliant']} complied and "
            f"{each['n_refused']} refused requests; distance {apart[0]:.3f} at the "
            f"first step, {apart[-1]:.3f} at the last."
        )
    if found["matched_reason"]:
        print_lines(f"No matched anchors: {found['matched_reason']}")
    rows = [
        [text.title(key, FIGURES), text.score(each)]
        for key, each in found["figures"].items()
    ]
    print_table("Do the anchors tell refusals from compliance?", ("", ""), rows)
    present = {key: each for key, each in found["groups"].items() if each["rows"]}
    measures = [key for key in FEATURES if any(key in e for e in present.values())]
    rows = [
        [FEATURES[key], *(_cell(each[key]) for each in present.values())]
        for key in measures
    ]
    rows.insert(0, ["answers", *(str(each["rows"]) for each in present.values())])
    names = [GROUPS[key] for key in present]
    print_table("Trajectories, held out", ("", *names), rows)
    print_lines(*found["missing_channels"])


def _cell(figure: Any) -> str:
    """Return a figure for a narrow column; the page says why one is missing."""
    from holdfast.report import text

    return "none" if figure["value"] is None else text.score(figure)


def print_fitted(found: Mapping[str, Any]) -> None:
    """Print how many requests were fitted on, and the thresholds."""
    from holdfast.report.signal_words import DETECTORS

    counts = found["requests"]
    print_lines(
        f"Fitted on {counts['train']} benign requests, calibrated on "
        f"{counts['calibration']} others."
    )
    rows = [
        [
            DETECTORS.get(name, name),
            f"{threshold['level']:g}",
            f"{threshold['value']:.4g}",
            f"{threshold['low']:.4f} to {threshold['high']:.4f}",
        ]
        for name, each in found["detectors"].items()
        for threshold in each["thresholds"]
    ]
    columns = ("detector", "false positives", "threshold", "of this one threshold")
    print_table("Thresholds", columns, rows)


def print_evaluated(found: Mapping[str, Any]) -> None:
    """Print the table on attack families that no choice was made on."""
    from holdfast.report import text
    from holdfast.report.signal_words import DETECTORS, recommendation

    print_lines(*(f"warning: {note}" for note in found["notes"]))
    print_lines(recommendation(found))
    reported = ", ".join(found["reported_on"]) or "none"
    rows = []
    for each in found["reported"]:
        levels = each["levels"]
        rows.append(
            [
                DETECTORS.get(each["detector"], each["detector"]),
                text.score(each["auroc"]),
                *(text.rate(level["attack_complied"]) for level in levels),
                *(text.rate(level["false_positives"]) for level in levels),
            ]
        )
    rates = [f"{level['level']:g}" for level in found["reported"][0]["levels"]]
    columns = (
        "detector",
        "AUROC",
        *(f"detected at {rate}" for rate in rates),
        *(f"false positives at {rate}" for rate in rates),
    )
    print_table(f"Detectors on attack families: {reported}", columns, rows)
