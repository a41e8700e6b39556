"""Write the tables of the dynamics experiment from its records, as Markdown.

Usage: dynamics_table.py RECORDS
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from holdfast.report.signal_words import DETECTORS, FEATURES, FIGURES, GROUPS

HEAD = """# Step by step: the measured tables

Written by `runs/dynamics.sh` from `docs/records/dynamics`; every interval is 95 %, over
base requests. How it is done: [dynamics](dynamics.md), [guard](guard.md)."""
TITLES = {
    "cliff": "`organism:cliff`, left to right",
    "diffuser": "`organism:diffuser`, by filling in masks",
}
FEATURES_SHOWN = (
    "recovered_below_0.5",
    "recovered_below_0.1",
    "incomplete_recovery",
    "variation",
    "below",
)


def number(figure: dict[str, Any] | None) -> str:
    if figure is None:
        return ""
    if figure.get("value") is None:
        return "—"
    text = f"{figure['value']:.3f}"
    if figure.get("low") is None or figure.get("high") is None:
        return text
    return f"{text} [{figure['low']:.3f}, {figure['high']:.3f}]"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    names = list(head)
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def signal_part(signal: dict[str, Any]) -> Iterable[str]:
    counts = "; ".join(
        f"{name}: {each['n_compliant']} complied, {each['n_refused']} refused"
        for name, each in signal["anchors"].items()
    )
    yield f"Anchors ({counts}); figures on {signal['held_out']} held-out answers."
    if signal["matched_reason"]:
        yield f"No matched anchors: {signal['matched_reason']}"
    yield table(
        ("check", "value", "n"),
        (
            (FIGURES.get(key, key), number(each), str(each["n"]))
            for key, each in signal["figures"].items()
        ),
    )
    groups = {key: each for key, each in signal["groups"].items() if each["rows"]}
    yield trajectories(groups)


def trajectories(groups: dict[str, Any]) -> str:
    return table(
        (
            "what trajectories do",
            *(f"{GROUPS[k]} ({g['rows']})" for k, g in groups.items()),
        ),
        (
            (FEATURES[key], *(number(group.get(key)) for group in groups.values()))
            for key in FEATURES_SHOWN
        ),
    )


def guard_part(guard: dict[str, Any]) -> Iterable[str]:
    best = guard["recommended"]
    requests = guard["facts"]["requests"]
    yield (
        f"Fitted on {requests['train']} benign requests, thresholds from "
        f"{requests['calibration']} others. Chosen on {', '.join(guard['chosen_on'])}: "
        f"{DETECTORS.get(best['detector'], best['detector'])}"
        f" ({number(best.get('auroc'))}). Reported on "
        f"{', '.join(guard['reported_on'])}, whose answers nothing was chosen on:"
    )
    within = {row["detector"]: row["auroc"] for row in guard["within_wrappers"]}
    levels = [level["level"] for level in guard["reported"][0]["levels"]]
    head = ["detector", "AUROC", "less published", "within wrappers"]
    for level in levels:
        head += [f"detected at {level:g}", f"benign complied flagged at {level:g}"]
    head += ["refused attacks flagged"]
    rows = []
    for row in guard["reported"]:
        cells = [
            DETECTORS.get(row["detector"], row["detector"]),
            number(row["auroc"]),
            number(row.get("auroc_minus_published")),
            number(within.get(row["detector"])),
        ]
        for level in row["levels"]:
            cells += [
                number(level["attack_complied"]),
                number(level["benign_complied"]),
            ]
        cells.append(number(row["levels"][0]["attack_refused"]))
        rows.append(cells)
    yield table(head, rows)
    domains = guard["by_domain"]
    yield "Benign answers that are flagged, by domain, at the first level:"
    yield table(
        ("detector", *(f"{name} ({each['rows']})" for name, each in domains.items())),
        (
            (
                DETECTORS.get(name, name),
                *(
                    number(
                        next(
                            row["levels"][0]["false_positives"]
                            for row in each["table"]
                            if row["detector"] == name
                        )
                    )
                    for each in domains.values()
                ),
            )
            for name in (row["detector"] for row in guard["reported"])
        ),
    )
    streaming = guard["streaming"]
    yield f"Asked after every step, at {streaming['level']:g} over all steps together:"
    yield table(
        ("detector", "detected", "at step, median", "benign flagged"),
        (
            (
                DETECTORS.get(row["detector"], row["detector"]),
                number(row["detected"]),
                str(row.get("detected_median_step")),
                number(row["false_positives"]),
            )
            for row in streaming["table"]
        ),
    )


def samplings_part(record: dict[str, Any]) -> Iterable[str]:
    samplers = record["samplers"]
    reference = record["reference"]
    names = [reference, *(name for name in samplers if name != reference)]
    yield "## The same weights under several samplers"
    yield (
        "The same requests, one token a pass (the threshold: as many as are sure). The "
        f"first column is the rate of `{reference}`, each other one a sampler less it, "
        "paired by answer. Rates are of rules that measure refusal."
    )
    measures = samplers[reference]["measures"]
    yield table(
        ("measure", f"`{reference}`", *(f"`{name}` less that" for name in names[1:])),
        (
            (
                measure,
                number(found["rate"]),
                *(
                    number(samplers[name]["measures"][measure]["less_reference"])
                    for name in names[1:]
                ),
            )
            for measure, found in measures.items()
        ),
    )
    for name in names:
        signal = samplers[name].get("signal")
        if signal is None:
            continue
        groups = {key: each for key, each in signal["groups"].items() if each["rows"]}
        yield (
            f"`{name}`, a step being a sixteenth of the response; anchors of its own "
            f"(last step: {number(signal['figures'].get('last_step_auroc'))})."
        )
        yield trajectories(groups)


def main(records: str) -> None:
    parts = [HEAD]
    for name, title in TITLES.items():
        path = Path(records) / f"{name}.json"
        if path.exists():
            record = json.loads(path.read_text("utf-8"))
            parts += [f"## {title}", *signal_part(record["signal"])]
            parts += guard_part(record["guard"])
    path = Path(records) / "samplings.json"
    if path.exists():
        parts += samplings_part(json.loads(path.read_text("utf-8")))
    if len(parts) == 1:
        parts.append("There is no record yet: the experiment has not been run.")
    sys.stdout.write("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
