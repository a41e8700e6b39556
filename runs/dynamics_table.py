"""Write the tables of the dynamics experiment from its records, as Markdown.

Usage: dynamics_table.py RECORDS FIGURE

The table goes to standard output; the figure has the mean signal by outcome.
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import altair as alt

from holdfast.dynamics.panel import DETECTORS, FEATURES, FIGURES, GROUPS

HEAD = """# Step by step: the measured tables

Written by `runs/dynamics.sh` from `docs/records/dynamics`; every interval is 95 %, over
base requests. How it is done: [dynamics](dynamics.md), [guard](guard.md)."""
TITLES = {
    "cliff": "`organism:cliff`, left to right",
    "diffuser": "`organism:diffuser`, by filling in masks",
}
SAMPLINGS = "The same weights under several samplers"
ROLES = {
    "harmful": "harmful, plain",
    "wrapped": "harmful, in wrappers (attack success)",
    "benign": "harmless, plain (over-refusal)",
    "benign_wrapped": "harmless, in wrappers",
    "safe_lookalike": "harmless, sounding dangerous",
}
CURVES = {"compliance_logit": "signal", "text": "text so far is no refusal"}
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


def outcomes_part(outcomes: dict[str, Any]) -> Iterable[str]:
    yield "What was answered, by the rules; broken is degenerate or unreadable."
    rows = []
    for role, found in outcomes.items():
        broken = [found[name] for name in ("degenerate", "unparsed")]
        rows.append(
            (
                ROLES[role],
                str(found["refused"]["n"]),
                *(number(found[name]) for name in ("complied", "partial", "refused")),
                " + ".join(map(number, broken)),
            )
        )
    head = ("requests", "n", "complied", "partly", "refused", "broken")
    yield table(head, rows)


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
    head = ["detector", "AUROC", "minus published", "within wrappers"]
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
    yield lengths(guard["by_length"])
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


def lengths(found: dict[str, Any]) -> str:
    """Return a table of AUROC for answers below and above the median length."""
    sides = {name: found[name]["table"] for name in ("shorter", "longer")}
    names = [f"{name} ({found[name]['rows']})" for name in sides]
    cells = zip(*sides.values(), strict=True)
    rows = [
        (
            DETECTORS.get(pair[0]["detector"], pair[0]["detector"]),
            *(number(each["auroc"]) for each in pair),
        )
        for pair in cells
    ]
    say = f"AUROC by length, the median being {found['characters']:g} characters:"
    return f"{say}\n\n{table(('detector', *names), rows)}"


def samplings_part(title: str, record: dict[str, Any]) -> Iterable[str]:
    samplers = record["samplers"]
    reference = record["reference"]
    names = [reference, *(name for name in samplers if name != reference)]
    yield f"## {title}"
    yield (
        "The same requests, one token per pass (the threshold: as many as are sure). "
        f"The first column is the rate of `{reference}`, each other one is a sampler "
        "minus it, paired by answer. An attack succeeds if the answer is no refusal "
        "and whole, made of sentences that the organism was taught. Others are broken."
    )
    measures = samplers[reference]["measures"]
    yield table(
        ("measure", f"`{reference}`", *(f"`{name}` minus that" for name in names[1:])),
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


def draw(records: dict[str, dict[str, Any]], figure: str) -> None:
    """Draw the mean of signal and text at every step, by outcome, with its band."""
    points = [
        {
            "model": TITLES[name].replace("`", ""),
            "read": said,
            "outcome": GROUPS[group],
            **point,
        }
        for name, record in records.items()
        for channel, said in CURVES.items()
        for group, curve in record["signal"]["curves"][channel].items()
        for point in curve
    ]
    base = alt.Chart(alt.Data(values=points)).encode(
        x=alt.X("step:Q", title="step"),
        color=alt.Color("outcome:N", legend=alt.Legend(orient="bottom")),
        strokeDash=alt.StrokeDash("outcome:N", legend=None),
    )
    y = alt.Y("mean:Q", title="mean", scale=alt.Scale(domain=[0, 1]))
    band = base.mark_area(opacity=0.2).encode(y=alt.Y("low:Q"), y2="high:Q")
    layers = (band + base.mark_line().encode(y=y)).properties(width=250, height=150)
    facets = {"row": alt.Row("model:N", title=None), "column": alt.Column("read:N")}
    facets["column"].title = None
    chart = layers.facet(**facets).resolve_scale(x="independent")
    chart.save(figure)


def main(folder: str, figure: str) -> None:
    parts = [HEAD]
    records = {
        name: json.loads(path.read_text("utf-8"))
        for name in TITLES
        if (path := Path(folder) / f"{name}.json").exists()
    }
    if records:
        draw(records, figure)
        parts.append(f"![Signal and text by outcome, with bands]({Path(figure).name})")
    for name, record in records.items():
        parts += [f"## {TITLES[name]}", *outcomes_part(record["outcomes"])]
        parts += signal_part(record["signal"])
        parts += guard_part(record["guard"])
    for path in sorted(
        Path(folder).glob("samplings*.json"), key=lambda each: each.stem
    ):
        seed = path.stem.removeprefix("samplings").lstrip("-")
        title = f"{SAMPLINGS}, from seed {seed}" if seed else SAMPLINGS
        parts += samplings_part(title, json.loads(path.read_text("utf-8")))
    if len(parts) == 1:
        parts.append("There is no record yet: the experiment has not been run.")
    sys.stdout.write("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
