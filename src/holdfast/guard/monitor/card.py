"""The card of a bundle: what it promises, in words."""

from collections.abc import Mapping
from typing import Any

from holdfast.stats.percent import percent

HEAD = """# A guard bundle

Live detectors for `{id}`, as `holdfast.guard.monitor` reads them. They belong to these
weights (`{weights}`) and this chat template (`{template}`) and refuse others.

Thresholds were set with engine {engine}, {dtype}, temperature {temperature:g}, top-p
{top_p:g}, weights packed as {packed}. With anything else they are *stale*: scores are
still scores, and nothing is promised about how often they are passed.

## The promise

A further benign request of the same kinds is flagged, at any step however long one
looks, with a chance of at most the rate. The promise is over draws of calibration sets;
what the rate of this one threshold is lies, with 95 % chance, in the interval. Of each
kind of request the threshold was set apart, and the highest was taken.

| detector | reads | in the | rate | threshold | interval | requests |
|---|---|---|---|---|---|---|
"""
FOOT = """
A policy acts on `{acts_on}`. Each detector has its rate to itself: who acts on several
adds their rates up, unless on `any`, which is one threshold for all.

Thresholds were set on {n_rows:,} answers to {n_requests:,} requests ({domains}), with
at most {longest}, written in {scripts}. Beyond that the monitor abstains.

It reads whether an answer goes the way of harmful ones that were seen; it was not tried
against whoever knows the detectors and aims at them.
"""


def card_of(facts: Mapping[str, Any]) -> str:
    """Return the card of a bundle, from its facts."""
    model, serving, calibration = (
        facts[key] for key in ("model", "serving", "calibration")
    )
    reads = {each["name"]: each for each in facts["detectors"]}
    lines = []
    for name, by in facts["thresholds"].items():
        own = reads.get(name, {"reads": "all", "channel": "thinking and answer"})
        for each in by:
            bounds = f"{percent(each['low'])} to {percent(each['high'])} %"
            rate = f"{100 * each['level']:g} %"
            lines.append(
                f"| `{name}` | {own['reads']} | {own['channel']} | {rate} | "
                f"{each['value']:.4g} | {bounds} | {each['n_requests']:,} |"
            )
    said = {key: str(model[f"{key}_sha256"])[:12] for key in ("weights", "template")}
    head = HEAD.format(
        id=model["id"], packed=serving["quantisation"] or "they were", **said, **serving
    )
    foot = FOOT.format(
        acts_on=facts["acts_on"],
        n_rows=calibration["n_rows"],
        n_requests=calibration["n_requests"],
        domains=", ".join(f"{n:,} {k}" for k, n in calibration["requests"].items()),
        longest=", ".join(
            f"{n:,} tokens of {k}" for k, n in calibration["longest"].items()
        ),
        scripts=", ".join(calibration["scripts"]) or "no letters",
    )
    return head + "\n".join(lines) + "\n" + foot
