"""Options of each defense; this module loads no tensors."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Final, Literal, get_args, get_origin, get_type_hints

from holdfast.errors import SettingsError

Where = Literal["task", "reference"]


@dataclass(frozen=True)
class Options:
    """What every defense's options know of themselves."""

    def __post_init__(self) -> None:
        """Refuse what is below the least that can be meant."""
        for name, least in _LEAST.items():
            found = getattr(self, name, least)
            if found is not None and found < least:
                raise SettingsError(
                    f"--defense-option {name}= of {least} or more",
                    str(found),
                    "Choose another.",
                )

    @property
    def aligned(self) -> bool:
        """Whether the model as it was before training is looked at."""
        return False

    @property
    def reference(self) -> bool:
        """Whether rows with a safe answer are needed (--defense-data)."""
        return False

    @property
    def harmful(self) -> bool:
        """Whether the same prompts with a harmful answer are (--defense-harmful)."""
        return False


@dataclass(frozen=True)
class NoOptions(Options):
    """Options of `none`: there are none."""


@dataclass(frozen=True)
class SafeInstrOptions(Options):
    """Options of `safeinstr`."""

    ratio: float = 0.03
    """Safe rows for each row of the task; the paper adds 3 %."""

    @property
    def reference(self) -> bool:
        """It trains on safe answers."""
        return True


@dataclass(frozen=True)
class ReferenceLossOptions(Options):
    """Options of `reference-loss`."""

    weight: float = 1.0
    """Weight of the cross-entropy on the safe answers."""

    batch: int = 8
    """Safe rows per pass."""

    @property
    def reference(self) -> bool:
        """It trains on safe answers."""
        return True


@dataclass(frozen=True)
class AnchorOptions(Options):
    """What the terms that hold on to the aligned model have in common."""

    weight: float = 1.0
    """Weight of the divergence or distance."""

    on: Where = "task"
    """On which rows: the task's own, or those of --defense-data."""

    batch: int = 8
    """Rows a pass, where they are those of --defense-data."""

    @property
    def aligned(self) -> bool:
        """It holds on to the model as it was."""
        return True

    @property
    def reference(self) -> bool:
        """It reads --defense-data if it is told to."""
        return self.on == "reference"


@dataclass(frozen=True)
class KLOptions(AnchorOptions):
    """Options of `kl`."""


@dataclass(frozen=True)
class LisaOptions(Options):
    """Options of `lisa`."""

    rho: float = 1.0
    """Strength of the pull to where the weights were when the state last changed."""

    align_steps: int = 10
    """Steps on the safe rows before each turn of the task; the authors take 100."""

    task_steps: int = 90
    """Steps on the task's rows in each turn; the authors take 900."""

    begin: float = 0.1
    """Share of all steps before the pull begins, as in the authors' code."""

    batch: int = 8
    """Safe rows per pass."""

    def __post_init__(self) -> None:
        """Refuse a cycle without steps."""
        super().__post_init__()
        if self.align_steps + self.task_steps < 1:
            raise SettingsError(
                "--defense-option align_steps= or task_steps= above 0",
                "0 and 0",
                "Choose one of them.",
            )

    @property
    def reference(self) -> bool:
        """It trains on safe answers, unless it is never in that state."""
        return self.align_steps > 0


@dataclass(frozen=True)
class ConstrainedOptions(Options):
    """Options of `constrained`."""

    beta: float = 0.1
    """Strength at the tokens of an answer after the early ones."""

    beta_first: float = 0.5
    """Strength at the first token of an answer."""

    beta_early: float = 2.0
    """Strength at the other early tokens."""

    early: int = 5
    """How many tokens are early, the first included."""

    @property
    def aligned(self) -> bool:
        """It holds on to the model as it was."""
        return True


@dataclass(frozen=True)
class SafeGradOptions(Options):
    """Options of `safegrad`."""

    rho: float = 1.0
    """Weight of the alignment gradient in the step."""

    batch: int = 8
    """Safe rows per step."""

    @property
    def aligned(self) -> bool:
        """Its alignment loss is the divergence from the model as it was."""
        return True

    @property
    def reference(self) -> bool:
        """It measures that divergence on safe answers."""
        return True


@dataclass(frozen=True)
class LDIFSOptions(AnchorOptions):
    """Options of `ldifs`."""


@dataclass(frozen=True)
class SinkOptions(Options):
    """What the sink term and its control have in common."""

    weight: float = 300.0
    """Weight of the mean over heads of what is above 0 in the divergence; the
    authors' script takes 300."""

    detach: bool = False
    """Let the gradient through the harmful text alone. Otherwise the optimiser may as
    well raise the mass on the reference text, as in the authors' code."""

    batch: int = 8
    """Pairs of texts a pass; of one pair alone, noise is above 0 half of the time."""

    layers: str = "all"
    """Layers whose heads count, such as 0-3,7; counted from 0."""

    interval: int = 1
    """Steps between two steps with the term."""

    mean: float = 0.0
    """Share that the running mean of the divergence keeps at each step; it decides
    which heads are above 0. 0 keeps none."""

    def __post_init__(self) -> None:
        """Refuse a running mean that never moves."""
        super().__post_init__()
        if self.mean >= 1:
            raise SettingsError(
                "--defense-option mean= below 1", str(self.mean), "Choose another."
            )

    @property
    def reference(self) -> bool:
        """It compares with the reference text."""
        return True


@dataclass(frozen=True)
class SurgeryOptions(SinkOptions):
    """Options of `surgery`."""

    against: Literal["refusal", "safe"] = "refusal"
    """What --defense-data holds: refusals, as in the paper (rows that do not refuse
    are left out), or any safe answers, as in the authors' code."""

    paired: bool = True
    """Compare answers to the same prompt over equal positions. Otherwise texts are
    drawn apart and taken whole, and their lengths differ, as in the authors' code."""

    parity: bool = False
    """The authors' loop: one unpaired draw of each text a pass, cut at 512 tokens,
    every head, both gradients, against any safe answer. Goes with weight alone."""

    @property
    def harmful(self) -> bool:
        """It compares with the harmful text."""
        return True


@dataclass(frozen=True)
class RandomSinkOptions(SinkOptions):
    """Options of `random-sink`."""


_LEAST = {
    **dict.fromkeys(("weight", "ratio", "rho", "begin", "beta", "mean"), 0),
    **dict.fromkeys(("beta_first", "beta_early", "early"), 0),
    **dict.fromkeys(("align_steps", "task_steps"), 0),
    **dict.fromkeys(("batch", "interval"), 1),
}
OPTIONS: dict[str, type[Options]] = {
    "none": NoOptions,
    "safeinstr": SafeInstrOptions,
    "reference-loss": ReferenceLossOptions,
    "kl": KLOptions,
    "lisa": LisaOptions,
    "constrained": ConstrainedOptions,
    "safegrad": SafeGradOptions,
    "ldifs": LDIFSOptions,
    "surgery": SurgeryOptions,
    "random-sink": RandomSinkOptions,
}
"""The defenses there are, by name, and what can be set of each."""
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

    `given`: Entries `key=value`; what is not named keeps its default.
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
