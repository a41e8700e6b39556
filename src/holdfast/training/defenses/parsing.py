"""`--defense-option key=value`, read into the options of a defense."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, Final, Literal, get_args, get_origin, get_type_hints

from holdfast.errors import SettingsError
from holdfast.training.defenses.options import OPTIONS, Options, SurgeryOptions

PARITY: Final = {
    "against": "safe",
    "paired": False,
    "batch": 1,
    "detach": False,
    "layers": "all",
    "interval": 1,
    "mean": 0.0,
}
"""What the authors' loop does, as options of `surgery`."""

_TRUTH = {"true": True, "yes": True, "false": False, "no": False}


def read_options(name: str, given: Sequence[str] = ()) -> Options:
    """Return the options of a defense.

    Args:
        name: The defense.
        given: Entries `key=value`; what is not named keeps its default.

    Raises:
        SettingsError: If there is no such defense or option, if an option is named
            twice, or if its value is none that it can have.
    """
    if name not in OPTIONS:
        raise SettingsError(
            f"--defense {' or '.join(OPTIONS)}", repr(name), "Choose one of them."
        )
    kind = OPTIONS[name]
    types = get_type_hints(kind)
    found: dict[str, Any] = {}
    for entry in given:
        key, equals, value = entry.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or key not in types:
            raise _unknown(name, kind, entry)
        if key in found:
            raise SettingsError(
                f"--defense-option {key}= once", "it is named twice", "Drop one."
            )
        found[key] = _value(key, types[key], value.strip())
    return kind(**_whole(kind, found))


def _whole(kind: type[Options], found: dict[str, Any]) -> dict[str, Any]:
    """Return the options with what `parity` stands for."""
    if not (kind is SurgeryOptions and found.get("parity")):
        return found
    more = sorted(set(found) & set(PARITY))
    if more:
        raise SettingsError(
            "parity=true with weight= alone",
            f"also {', '.join(more)}",
            "The authors' loop fixes these; drop them, or drop parity.",
        )
    return PARITY | found


def _unknown(name: str, kind: type[Options], entry: str) -> SettingsError:
    known = [field.name for field in fields(kind)]
    what = f"KEY=VALUE with a key of {', '.join(known)}" if known else "left out"
    return SettingsError(
        f"--defense-option {what} for --defense {name}",
        repr(entry),
        "Name one of these options." if known else "This defense has none; drop it.",
    )


def _value(key: str, kind: Any, text: str) -> Any:
    if get_origin(kind) is Literal:
        return _one_of(key, text, {str(each): each for each in get_args(kind)})
    if kind is bool:
        return _one_of(key, text.lower(), _TRUTH)
    try:
        value = kind(text)
    except ValueError:
        value = None
    # Infinity and not-a-number are floats to Python.
    if value is None or (kind is float and not abs(value) < float("inf")):
        what = "a whole number" if kind is int else "a number"
        raise SettingsError(
            f"--defense-option {key}= with {what}", repr(text), "Give a number."
        )
    return value


def _one_of(key: str, text: str, known: dict[str, Any]) -> Any:
    if text in known:
        return known[text]
    raise SettingsError(
        f"--defense-option {key}={' or '.join(known)}",
        repr(text),
        "Choose one of them.",
    )
