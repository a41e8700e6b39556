"""A verdict as a gate: what `--fail-if` makes of it."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from holdfast.cli.options import about
from holdfast.errors import EvidenceError, SettingsError
from holdfast.flags import Several

Condition = Literal["cliff", "attack", "sparse"]
Conditions = Annotated[
    tuple[Condition, ...],
    Several,
    about("Exit with status 1 if the verdict says so; may be repeated.", "Output"),
]
IfNull = Annotated[
    Literal["fail", "pass"],
    about(
        "Where --fail-if asks and the verdict is null: fail with status 4, or pass "
        "with a warning.",
        "Output",
    ),
]
VERDICTS = {"cliff": "cliff", "attack": "attack_succeeds", "sparse": "sparse"}
FAILED = 1


def check_asked(conditions: Sequence[Condition], *, with_heads: bool) -> None:
    """Refuse a condition that nothing in this run could ever decide."""
    if "sparse" in conditions and not with_heads:
        raise SettingsError(
            "--heads with --fail-if sparse", "--no-heads", "Drop one of the two."
        )


def exit_status(
    verdict: Mapping[str, Any], conditions: Sequence[Condition], if_null: IfNull
) -> int:
    """Return the exit status of an audit: 1 if any condition holds.

    A null is no pass: it says that the evidence does not suffice.
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
    from holdfast.report.terminal import Shown

    Shown().warn(f"--if-null pass: {error.found}")
    return 0
