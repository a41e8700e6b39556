"""Which numbers a setting may be: one place that refuses the others."""

import math
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from holdfast.errors import SettingsError

SEEDS = 1 << 32
"""Seeds are below this; every library that takes one takes these."""


def flag_of(name: str) -> str:
    """Return the flag of a setting."""
    return "--" + name.replace("_", "-")


def require_numbers(settings: Any, **least: float | int) -> None:
    """Refuse infinity, what is not a number, and seeds that no library takes.

    `least`: The least that some settings can mean, by name.
    """
    for each in fields(settings):
        found = getattr(settings, each.name)
        several = found if isinstance(found, tuple) else (found,)
        require_finite(flag_of(each.name), several)
        if each.name == "seed" and not 0 <= found < SEEDS:
            what = f"--seed from 0 to {SEEDS - 1}"
            raise SettingsError(what, str(found), "Choose another.")
    for name, lowest in least.items():
        at_least(flag_of(name), getattr(settings, name), lowest)


def require_finite(flag: str, values: Iterable[Any]) -> None:
    """Refuse infinity and what is not a number; what is no float at all passes."""
    for value in values:
        if isinstance(value, float) and not math.isfinite(value):
            raise SettingsError(f"{flag} as a number", str(value), "Choose another.")


def require_all(rules: Iterable[tuple[str, Any, bool]]) -> None:
    """Refuse the first setting whose rule does not hold."""
    for expected, found, holds in rules:
        if not holds:
            raise SettingsError(expected, str(found), "Change that setting.")


def a_share(flag: str, *values: float) -> None:
    """Refuse what is no share of a whole: none of it, or more than all."""
    for value in values:
        if not 0 < value <= 1:
            raise SettingsError(
                f"{flag} above 0 and up to 1", f"{value:g}", "Choose another."
            )


def at_least(flag: str, value: float | int | None, least: float | int) -> None:
    """Refuse a number below the least that can be meant; None was not given."""
    require_finite(flag, (value,))
    if value is not None and value < least:
        raise SettingsError(f"{flag} of {least} or more", str(value), "Choose another.")
