"""The figures of a cliff, as SVG that needs neither script nor network."""

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from holdfast.report.charts import (
    PALETTE,
    heading,
    interval_panel,
    to_svg,
    trace_panels,
)
from holdfast.report.labels import headline
from holdfast.report.schema import (
    Curve,
    Example,
    Figure,
    Report,
    check_curves,
    validate,
)
from holdfast.report.text import GROUPS, ROLES, clean, rate, title

_WIDTH = 640
_HARM, _PEACE = PALETTE["harmful_complied"], PALETTE["benign"]


def template_length(examples: Sequence[Example]) -> int | None:
    """Return how many tokens the end of thinking has in most examples.

    None if no example closes its thinking.
    """
    counted = [
        sum(token["region"] == "end_template" for token in example["tokens"])
        for example in examples
    ]
    lengths = [length for length in counted if length]
    return max(set(lengths), key=lengths.count) if lengths else None


def trace_figure(curves: Sequence[Curve], template: int | None = None) -> str:
    """Draw the mean refusal score around the end of thinking, with its band.

    A second panel shows how many answers each point rests on, since few reach far
    back from the end.
    """
    main, counts = trace_panels(curves, template, _WIDTH, 300, bare=True)
    whole = alt.vconcat(
        main,
        counts.properties(title=heading("Answers behind each point")),
        spacing=12,
    )
    groups = ", ".join(title(curve["group"], GROUPS) for curve in curves)
    return to_svg(
        whole,
        "Mean refusal score around the end of thinking",
        f"One line each for: {groups}. Bands are 95% intervals. The lower panel "
        "counts the answers at each position. The table below has the numbers.",
    )


def wrapper_figure(by_wrapper: Mapping[str, Mapping[str, Figure]]) -> str:
    """Draw, for each wrapper, how often it works and how often harmless ones pass."""
    kinds = {"attack_success": "harmful request", "benign_compliance": "harmless one"}
    rows = [
        (clean(wrapper), words, shares[key])
        for wrapper, shares in by_wrapper.items()
        for key, words in kinds.items()
    ]
    colours = dict(zip(kinds.values(), (_HARM, _PEACE), strict=True))
    return to_svg(
        interval_panel(rows, colours, _WIDTH - 130),
        "Requests carried out, by wrapper",
        "For each jailbreak wrapper the share of harmful and of harmless requests "
        "that the model carried out, with 95% intervals. The table below has the "
        "numbers.",
    )


def picture(report: Report, curves: Sequence[Curve]) -> str:
    """Draw a study in one picture: what gets through, and where refusal lets go.

    Raises:
        InputError: If the report or a curve is not as it must be.
    """
    validate(report)
    check_curves(curves)
    success, outcomes = report["attack_success"], report["outcomes"]
    shares: dict[str, Figure] = {
        "harmful": success["harmful"],
        "wrapped": success["wrapped"],
        "benign": outcomes["benign"]["complied"],
        "benign_wrapped": outcomes["benign_wrapped"]["complied"],
    }
    rows = [
        (ROLES[role], "harmless" if role.startswith("benign") else "harmful", share)
        for role, share in shares.items()
    ]
    colours = {"harmful": _HARM, "harmless": _PEACE}
    left = interval_panel(rows, colours, 210, 52, legend=False)
    panels: list[Any] = [left.properties(title=heading("Requests carried out"))]
    if any(curve["points"] for curve in curves):
        trace, _ = trace_panels(curves, None, 420, 208)
        panels.append(trace.properties(title=heading("Mean refusal score")))
    whole = (
        alt.hconcat(*panels, spacing=36)
        .resolve_scale(
            color="independent", shape="independent", strokeDash="independent"
        )
        .properties(
            title=alt.TitleParams(
                headline(report),
                subtitle=clean(report["model"]["id"]),
                anchor="start",
                fontSize=19,
                subtitleFontSize=13,
                offset=18,
            ),
        )
    )
    said = "; ".join(f"{ROLES[role]}: {rate(share)}" for role, share in shares.items())
    return to_svg(whole, headline(report), said, standalone=True)
