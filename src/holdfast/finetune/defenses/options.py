"""Options of each defense; this module loads no tensors."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Final, Literal, get_args, get_origin, get_type_hints

from holdfast.errors import SettingsError

Where = Literal["task", "reference"]
Need = Literal["aligned", "reference", "harmful"]
"""The model as it was before training; rows with a safe answer (--defense-data); the
same prompts with a harmful answer (--defense-harmful)."""


@dataclass(frozen=True)
class Options:
    """What every defense's options know of themselves; `none` has no others."""

    needs: ClassVar[frozenset[Need]] = frozenset()

    def __post_init__(self) -> None:
        """Refuse what is below the least that can be meant."""
        for name, least in _LEAST.items():
            value = getattr(self, name, least)
            if value < least:
                raise _out_of_range(f"{name}= of {least} or more", str(value))


@dataclass(frozen=True)
class SafeInstrOptions(Options):
    """Options of `safeinstr`."""

    needs = frozenset({"reference"})

    ratio: float = 0.03
    """Safe rows for each row of the task; the paper adds 3 %."""


@dataclass(frozen=True)
class ReferenceLossOptions(Options):
    """Options of `reference-loss`."""

    needs = frozenset({"reference"})

    weight: float = 1.0
    """Weight of the cross-entropy on the safe answers."""

    batch: int = 8
    """Safe rows per pass."""


@dataclass(frozen=True)
class AnchorOptions(Options):
    """Options of `kl` and `ldifs`, which hold on to the model as it was."""

    needs = frozenset({"aligned", "reference"})

    weight: float = 1.0
    """Weight of the divergence or distance."""

    on: Where = "task"
    """On which rows: the task's own, or those of --defense-data."""

    batch: int = 8
    """Rows a pass, where they are those of --defense-data."""


@dataclass(frozen=True)
class LisaOptions(Options):
    """Options of `lisa`."""

    needs = frozenset({"reference"})

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


@dataclass(frozen=True)
class ConstrainedOptions(Options):
    """Options of `constrained`."""

    needs = frozenset({"aligned"})

    beta: float = 0.1
    """Strength at the tokens of an answer after the early ones."""

    beta_first: float = 0.5
    """Strength at the first token of an answer."""

    beta_early: float = 2.0
    """Strength at the other early tokens."""

    early: int = 5
    """How many tokens are early, the first included."""


@dataclass(frozen=True)
class SafeGradOptions(Options):
    """Options of `safegrad`."""

    needs = frozenset({"aligned", "reference"})

    rho: float = 1.0
    """Weight of the alignment gradient in the step."""

    batch: int = 8
    """Safe rows per step."""


@dataclass(frozen=True)
class SinkOptions(Options):
    """Options of `random-sink`, and those that `surgery` shares with it."""

    needs = frozenset({"reference"})

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
            raise _out_of_range("mean= below 1", str(self.mean))


@dataclass(frozen=True)
class SurgeryOptions(SinkOptions):
    """Options of `surgery`."""

    needs = frozenset({"reference", "harmful"})

    against: Literal["refusal", "safe"] = "refusal"
    """What --defense-data holds: refusals, as in the paper (rows that do not refuse
    are left out), or any safe answers, as in the authors' code."""

    paired: bool = True
    """Compare answers to the same prompt over equal positions. Otherwise texts are
    drawn apart and taken whole, and their lengths differ, as in the authors' code."""

    parity: bool = False
    """The authors' loop: one unpaired draw of each text a pass, cut at 512 tokens,
    every head, both gradients, against any safe answer. Goes with weight alone."""


_LEAST = {
    **dict.fromkeys(("weight", "ratio", "rho", "begin", "beta", "mean"), 0),
    **dict.fromkeys(("beta_first", "beta_early", "early"), 0),
    **dict.fromkeys(("align_steps", "task_steps"), 0),
    **dict.fromkeys(("batch", "interval"), 1),
}
OPTIONS: dict[str, type[Options]] = {
    "none": Options,
    "safeinstr": SafeInstrOptions,
    "reference-loss": ReferenceLossOptions,
    "kl": AnchorOptions,
    "lisa": LisaOptions,
    "constrained": ConstrainedOptions,
    "safegrad": SafeGradOptions,
    "ldifs": AnchorOptions,
    "surgery": SurgeryOptions,
    "random-sink": SinkOptions,
}
"""The defenses there are, by name, and what can be set of each."""
PARITY: Final[dict[str, Any]] = {
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


def needs_of(options: Options) -> frozenset[Need]:
    """Return what a defense needs, set as it is."""
    of_task = isinstance(options, AnchorOptions) and options.on == "task"
    never_safe = isinstance(options, LisaOptions) and not options.align_steps
    return options.needs - {"reference"} if of_task or never_safe else options.needs


def read_options(name: str, given: Sequence[str] = ()) -> Options:
    """Return the options of a defense.

    `given`: Entries `key=value`; what is not named keeps its default.
    """
    if name not in OPTIONS:
        raise SettingsError(
            f"--defense {' or '.join(OPTIONS)}", repr(name), "Choose one of them."
        )
    kind = OPTIONS[name]
    known = [field.name for field in fields(kind)]
    types = get_type_hints(kind)
    values: dict[str, Any] = {}
    for entry in given:
        key, equals, value = entry.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or key not in known:
            what = f"KEY=VALUE with a key of {', '.join(known)}"
            raise SettingsError(
                f"--defense-option {what if known else 'left out'} for --defense "
                f"{name}",
                repr(entry),
                "Name one of these options."
                if known
                else "This defense has none; drop it.",
            )
        if key in values:
            raise SettingsError(
                f"--defense-option {key}= once", "it is named twice", "Drop one."
            )
        values[key] = _value(key, types[key], value.strip())
    if kind is not SurgeryOptions or not values.get("parity"):
        return kind(**values)
    if more := sorted(set(values) & set(PARITY)):
        raise SettingsError(
            "parity=true with weight= alone",
            f"also {', '.join(more)}",
            "The authors' loop fixes these; drop them, or drop parity.",
        )
    return kind(**(PARITY | values))


def _value(key: str, kind: Any, text: str) -> Any:
    if get_origin(kind) is Literal or kind is bool:
        known = _TRUTH if kind is bool else {str(each): each for each in get_args(kind)}
        text = text.lower() if kind is bool else text
        if text in known:
            return known[text]
        raise SettingsError(
            f"--defense-option {key}={' or '.join(known)}",
            repr(text),
            "Choose one of them.",
        )
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


def _out_of_range(expected: str, found: str) -> SettingsError:
    return SettingsError(f"--defense-option {expected}", found, "Choose another.")
