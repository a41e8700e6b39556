"""From estimates of the sink mass to the block of the report, and its sentences."""

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from holdfast.analysis.sinks import SinkFigures
from holdfast.session.checkpoint_series import Step
from holdfast.session.figures import figure_of
from holdfast.session.sink_texts import Text, Texts

GROUPS = ("harmful", "reference", "divergence")
TABLE = pa.schema(
    [
        ("checkpoint", pa.int32()),
        ("name", pa.string()),
        ("step", pa.int64()),
        ("layer", pa.int32()),
        ("head", pa.int32()),
        *(
            (f"{group}{end}", pa.float64())
            for group in GROUPS
            for end in ("", "_low", "_high")
        ),
        ("reason", pa.string()),
    ]
)
CHANCE = 0.05
"""Share of heads that do not diverge whose 95 % interval still misses 0."""


def checkpoint_record(
    step: Step, identity: Mapping[str, Any], found: SinkFigures, texts: Texts
) -> dict[str, Any]:
    """Return what the report says of one checkpoint.

    Args:
        step: Which one.
        identity: What tells it from others.
        found: Its figures.
        texts: What they were read on.
    """
    return {
        "name": step.name,
        "step": step.step,
        "weights_sha256": identity["weights_sha256"],
        "positive": figure_of(found.positive),
        "by_chance": figure_of(found.by_chance),
        "above": found.n_above,
        "below": found.n_below,
        "measured": found.n_measured,
        "mean_divergence": figure_of(found.mean_divergence),
        "penalty": figure_of(found.penalty),
        "harmful": figure_of(found.mean_harmful),
        "reference": figure_of(found.mean_reference),
        "uniform": round(_uniform([*texts.harmful, *texts.reference]), 6),
    }


def head_records(found: SinkFigures, n_heads: int) -> list[dict[str, Any]]:
    """Return the figures of every head, layer by layer.

    Args:
        found: Figures of one checkpoint.
        n_heads: Heads of a layer.
    """
    rows = zip(found.harmful, found.reference, found.divergence, strict=True)
    return [
        {"layer": place // n_heads, "head": place % n_heads}
        | {
            group: figure_of(each)
            for group, each in zip(GROUPS, estimates, strict=True)
        }
        for place, estimates in enumerate(rows)
    ]


def table_of(heads: Sequence[tuple[Step, Sequence[Mapping[str, Any]]]]) -> pa.Table:
    """Return one row a checkpoint and head.

    Args:
        heads: Each checkpoint with what `head_records` returned.
    """
    rows = [
        {
            "checkpoint": place,
            "name": step.name,
            "step": step.step,
            "layer": each["layer"],
            "head": each["head"],
            "reason": each["divergence"].get("reason"),
        }
        | {
            f"{group}{end}": each[group][key]
            for group in GROUPS
            for end, key in (("", "value"), ("_low", "low"), ("_high", "high"))
        }
        for place, (step, records) in enumerate(heads)
        for each in records
    ]
    return pa.Table.from_pylist(rows, schema=TABLE)


def lengths_of(texts: Texts) -> dict[str, float]:
    """Return the mean length of the whole texts of each group, in tokens."""
    groups = {"harmful": texts.harmful, "reference": texts.reference}
    return {
        name: round(sum(text.length for text in group) / len(group), 1)
        for name, group in groups.items()
    }


def found_in_words(block: Mapping[str, Any]) -> list[str]:
    """Say what was found of the last checkpoint, and what it may rest on.

    Args:
        block: The block `sinks` of the report.
    """
    last = block["checkpoints"][-1]
    total, positive, chance = last["measured"], last["positive"], last["by_chance"]
    said = [_counted(positive, chance, total)]
    said.append(
        f"The intervals of {last['above']} heads lie above 0 and of {last['below']} "
        f"below; of {total} heads that do not diverge about {CHANCE * total:.0f} "
        "would miss 0 by chance."
    )
    masses = [last[group]["value"] for group in ("harmful", "reference")]
    if None not in masses:
        said.append(
            f"A head gives the first token {100 * masses[0]:.1f}% of its attention on "
            f"harmful and {100 * masses[1]:.1f}% on reference text on average; looking "
            f"at all tokens alike would give {100 * last['uniform']:.1f}%."
        )
        if max(masses) < 2 * last["uniform"]:
            said.append(
                "That is less than twice as much: the model hardly has a sink, and its "
                "divergences are differences of small numbers."
            )
    return said


def _counted(positive: Mapping[str, Any], chance: Mapping[str, Any], total: int) -> str:
    """Say how many heads are positive and how many would be by chance, in one go."""
    if positive["value"] is None:
        return f"Positive heads could not be counted: {positive['reason']}."
    counted = (
        f"{positive['value']:.0f} of {total} heads ({positive['low']:.0f} to "
        f"{positive['high']:.0f}) give more of their attention to the first token on "
        "harmful text"
    )
    if chance["value"] is None:
        return f"{counted}; how many would by chance is unknown: {chance['reason']}."
    low, high = chance["low"], chance["high"]
    if low <= positive["value"] <= high:
        place = "as many as chance makes"
    else:
        more = positive["value"] > high
        place = f"{'more' if more else 'fewer'} than chance makes"
    return (
        f"{counted}, {place}: {low:.0f} to {high:.0f} on prompts that differ as these "
        "do, if no head diverged."
    )


def notes_on(block: Mapping[str, Any], left_out: Mapping[str, int]) -> list[str]:
    """Say what a reader has to know of the texts.

    Args:
        block: The block `sinks` of the report.
        left_out: Rows or pairs that were left out, by reason.
    """
    said, lengths = [], block["tokens"]
    if block["pairing"] == "none":
        said.append(
            "Texts were not paired. They have "
            f"{lengths['harmful']:.0f} (harmful) and {lengths['reference']:.0f} "
            "(reference) tokens on average and stand on different prompts, and both "
            "move the sink mass by themselves."
        )
    else:
        unpaired = [
            f"{source['rows'] - source['paired']} {name}"
            for name, source in block["sources"].items()
            if source["rows"] > source["paired"]
        ]
        if unpaired:
            said.append(
                f"Rows without a partner, or beyond --limit, were left out: "
                f"{' and '.join(unpaired)}."
            )
    said += [f"{n} left out: {reason}." for reason, n in left_out.items()]
    return said


def _uniform(texts: Sequence[Text]) -> float:
    """Return the sink mass of a head that looks at all it sees alike."""
    means = []
    for text in texts:
        queries = range(text.start, len(text.token_ids))
        means.append(sum(1 / (place + 1) for place in queries) / len(queries))
    return sum(means) / len(means)
