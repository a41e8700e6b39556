"""A verdict as a gate: what `--fail-if` makes of it."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from holdfast.errors import EvidenceError, SettingsError
from holdfast.report import terminal

Condition = Literal["cliff", "attack", "sparse"]
Conditions = Annotated[
    tuple[Condition, ...],
    Parameter(negative=(), consume_multiple=False, show_default=False),
]
IfNull = Literal["fail", "pass"]
VERDICTS = {"cliff": "cliff", "attack": "attack_succeeds", "sparse": "sparse"}
FAILED = 1


def check_asked(conditions: Sequence[Condition], *, with_heads: bool) -> None:
    """Refuse a condition that nothing in this run could ever decide.

    Args:
        conditions: What `--fail-if` names.
        with_heads: Whether single heads are looked at.

    Raises:
        SettingsError: If few heads are asked about and none is looked at.
    """
    if "sparse" in conditions and not with_heads:
        raise SettingsError(
            "--heads with --fail-if sparse", "--no-heads", "Drop one of the two."
        )


def exit_status(
    verdict: Mapping[str, Any], conditions: Sequence[Condition], if_null: IfNull
) -> int:
    """Return the exit status of an audit: 1 if any condition holds.

    A null is no pass: it says that the evidence does not suffice.

    Args:
        verdict: The block `verdict` of the report.
        conditions: What `--fail-if` names.
        if_null: What a null does.

    Raises:
        EvidenceError: If no condition holds, one is null, and a null fails.
    """
    found = {each: verdict[VERDICTS[each]] for each in dict.fromkeys(conditions)}
    if True in found.values():
        return FAILED
    reasons = verdict.get("reasons", {})
    open_ones = [
        f"{each} is null ({reasons.get(VERDICTS[each], 'no reason given')})"
        for each, value in found.items()
        if value is None
    ]
    if not open_ones:
        return 0
    error = EvidenceError(
        "a verdict for --fail-if",
        "; ".join(open_ones),
        "Ask more prompts, or let a null pass with --if-null pass.",
    )
    if if_null == "fail":
        raise error
    terminal.Shown().warn(f"--if-null pass: {error.found}")
    return 0
