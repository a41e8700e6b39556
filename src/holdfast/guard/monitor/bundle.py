"""A bundle: live detectors with their thresholds, and all that these belong to.

A directory of three files: tensors in safetensors, everything else in JSON, and a card
to read. Nothing in it is run.
"""

import json
import math
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, get_args

from jaxtyping import Float
from safetensors.torch import load, save
from torch import Tensor

from holdfast.dynamics.signal import AnchorSignal
from holdfast.errors import InputError, SettingsError
from holdfast.guard.conformal import Threshold
from holdfast.guard.monitor.card import card_of
from holdfast.guard.monitor.rules import (
    ANY,
    SIGNAL,
    TAILS,
    Channel,
    LiveDetector,
    Rule,
    Scale,
)
from holdfast.models.model import LanguageModel, ModelIdentity
from holdfast.study import atomic_write_bytes, atomic_write_text, file_sha256
from holdfast.study.files import staging

FORMAT = "holdfast-guard-bundle/1"
TENSORS, FACTS, CARD = "bundle.safetensors", "bundle.json", "README.md"
_ANCHORS = ("compliant", "refused", "origin", "kept")


class Serving(NamedTuple):
    """How a model is served: what may move a score, and leaves the model the same."""

    engine: str = "holdfast"  # What decodes: holdfast, transformers, vllm, ...
    dtype: str = "float32"  # Arithmetic the model runs in.
    temperature: float = 0.0
    top_p: float = 1.0
    quantisation: str = ""  # How weights are packed; empty if they are not.


class Calibration(NamedTuple):
    """The benign requests on which thresholds were set; nothing was fitted on them."""

    n_rows: int
    n_requests: int
    requests: Mapping[str, int]  # Base requests by domain.
    sha256: str  # Hash of what was read: requests and tokens of each row.
    longest: Mapping[str, int]  # Most tokens of prompt, thinking and answer.
    scripts: tuple[str, ...]  # Scripts that prompts are written in.


class Direction(NamedTuple):
    """A direction in the states after the final norm, and its offset."""

    weight: Float[Tensor, "d_model"]
    offset: float


@dataclass(frozen=True, eq=False, kw_only=True)
class Bundle:
    """Detectors, their thresholds, and what they belong to."""

    model: Mapping[str, str]  # `id`, `weights_sha256` and `template_sha256`.
    serving: Serving  # How the answers were drawn on which thresholds were set.
    detectors: tuple[LiveDetector, ...]
    directions: Mapping[str, Direction]  # By name, as detectors read them.
    # By detector (and `any`, all together), then by rate of false stops a request.
    thresholds: Mapping[str, Mapping[float, Threshold]]
    scales: Mapping[str, Scale]  # Of benign requests, by detector.
    calibration: Calibration
    anchors: AnchorSignal | None = None  # Of the step-wise signal.
    # Factors of heads, for the policies `steer` and `redraw`.
    edit: Float[Tensor, "layer head"] | None = None
    acts_on: str = ANY  # The detector on whose firing a policy acts.
    study: Mapping[str, Any] = field(default_factory=dict)  # Where it came from.

    @property
    def rates(self) -> tuple[float, ...]:
        """Rates of false stops that there are thresholds for."""
        return tuple(sorted({rate for by in self.thresholds.values() for rate in by}))

    def at(self, rate: float) -> dict[str, Threshold]:
        """Return the threshold of each detector at a rate.

        Raises:
            SettingsError: If there are none.
        """
        found = {name: by[rate] for name, by in self.thresholds.items() if rate in by}
        if not found:
            raise SettingsError(
                f"a rate among {', '.join(f'{each:g}' for each in self.rates)}",
                f"{rate:g}",
                "Choose one, or write a bundle for it (--rates).",
            )
        return found

    def facts(self) -> dict[str, Any]:
        """Return all but the tensors, as JSON holds it."""
        return {
            "format": FORMAT,
            "model": dict(self.model),
            "serving": self.serving._asdict(),
            "acts_on": self.acts_on,
            "detectors": [each._asdict() for each in self.detectors],
            "offsets": {name: each.offset for name, each in self.directions.items()},
            "thresholds": {
                name: [each._asdict() for each in by.values()]
                for name, by in self.thresholds.items()
            },
            "scales": {name: list(each.knots) for name, each in self.scales.items()},
            "calibration": self.calibration._asdict(),
            "study": dict(self.study),
        }

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name."""
        found = {f"direction/{name}": d.weight for name, d in self.directions.items()}
        if self.anchors is not None:
            found |= {f"anchors/{key}": getattr(self.anchors, key) for key in _ANCHORS}
        if self.edit is not None:
            found["edit"] = self.edit
        return {name: each.contiguous().cpu() for name, each in found.items()}


def write_bundle(directory: Path, bundle: Bundle) -> Path:
    """Write a bundle; the directory appears whole or not at all.

    Raises:
        InputError: If there is something in the directory.
        StorageError: If the disk is full or not ours to write.
    """
    tensors = save(bundle.tensors())
    with staging(directory) as staged:
        atomic_write_bytes(staged / TENSORS, tensors)
        facts = bundle.facts() | {"tensors_sha256": file_sha256(staged / TENSORS)}
        text = json.dumps(facts, indent=1, ensure_ascii=False)
        atomic_write_text(staged / FACTS, text + "\n")
        atomic_write_text(staged / CARD, card_of(facts))
    return directory


def read_bundle(directory: str | Path) -> Bundle:
    """Read a bundle.

    Raises:
        InputError: If there is none, it is damaged, or of another format.
    """
    again = "Write one with `holdfast guard bundle STUDY -o DIR`."
    directory = Path(directory)
    try:
        facts = json.loads((directory / FACTS).read_text(encoding="utf-8"))
        data = (directory / TENSORS).read_bytes()
        own = file_sha256(directory / TENSORS)
        if facts["format"] != FORMAT or facts["tensors_sha256"] != own:
            raise ValueError("another format, or tensors of another bundle")
        bundle = _unpack(facts, load(data))
        _check(bundle)
        return bundle
    # The reader of safetensors raises its own error, which is no ValueError.
    except Exception as error:
        raise InputError(
            f"a guard bundle in {directory}",
            _unread(error),
            again,
        ) from error


def _unread(error: Exception) -> str:
    """Return in words why there is no bundle."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"none that can be read ({error.filename}: {error.strerror})"
    return f"none that can be read ({type(error).__name__}: {error})"


def _unpack(facts: Mapping[str, Any], tensors: dict[str, Tensor]) -> Bundle:
    anchors = {key: tensors.pop(f"anchors/{key}", None) for key in _ANCHORS}
    own: Any = {key: each for key, each in anchors.items() if each is not None}
    calibration = dict(facts["calibration"])
    if not isinstance(calibration["scripts"], list):
        raise ValueError("scripts that are no list")
    calibration["scripts"] = tuple(calibration["scripts"])
    return Bundle(
        model=facts["model"],
        serving=Serving(**facts["serving"]),
        acts_on=facts["acts_on"],
        detectors=tuple(LiveDetector(**each) for each in facts["detectors"]),
        directions={
            name: Direction(tensors[f"direction/{name}"], offset)
            for name, offset in facts["offsets"].items()
        },
        thresholds={
            name: {each["level"]: Threshold(**each) for each in by}
            for name, by in facts["thresholds"].items()
        },
        scales={name: Scale(tuple(each)) for name, each in facts["scales"].items()},
        calibration=Calibration(**calibration),
        anchors=AnchorSignal(**own) if own else None,
        edit=tensors.get("edit"),
        study=facts["study"],
    )


def _check(bundle: Bundle) -> None:
    """Refuse what would score something else, or nothing, without a word.

    Raises:
        ValueError: If a part has no meaning here, or does not fit another.
    """
    names = [each.name for each in bundle.detectors]
    if len({*names, ANY}) <= len(names):
        raise ValueError("two detectors of one name")
    for detector in bundle.detectors:
        _check_detector(detector, bundle)
    for name, direction in bundle.directions.items():
        numbers = (*direction.weight.tolist(), direction.offset)
        if not all(map(math.isfinite, numbers)):
            raise ValueError(f"a direction `{name}` of numbers that are none")
    _check_thresholds(bundle, [*names, ANY])
    for name, scale in bundle.scales.items():
        knots = scale.knots
        rises = all(low < high for low, high in pairwise(knots))
        if name not in names or len(knots) != len(TAILS) or not rises:
            raise ValueError(f"a scale of `{name}` that is none")
    longest = bundle.calibration.longest
    for part in ("prompt", "thinking", "answer"):
        if not isinstance(longest.get(part), int):
            raise ValueError(f"no longest {part}")


def _check_thresholds(bundle: Bundle, names: list[str]) -> None:
    for name, by in bundle.thresholds.items():
        if name not in names:
            raise ValueError(f"thresholds of `{name}`, which no detector is")
        # One that is no number would never be passed.
        if any(math.isnan(each.value) or not 0 < rate < 1 for rate, each in by.items()):
            raise ValueError(f"a threshold of `{name}` that is none")
    own = bundle.thresholds.get(bundle.acts_on, {})
    if bundle.rates != tuple(sorted(own)):
        raise ValueError(f"no threshold for each rate of `{bundle.acts_on}`, acted on")


def _check_detector(detector: LiveDetector, bundle: Bundle) -> None:
    known = {*bundle.directions, *((SIGNAL,) if bundle.anchors is not None else ())}
    fits = (
        detector.rule in get_args(Rule)
        and detector.channel in get_args(Channel)
        and detector.reads in known
        and 1 <= detector.support <= detector.window
        and detector.sign in (1, -1)
        and 0 <= detector.band < math.inf
    )
    if not fits:
        raise ValueError(f"a detector `{detector.name}` that is none here")


def serving_of(model: LanguageModel, temperature: float, top_p: float) -> Serving:
    """Return how a model is served by our own decoding."""
    return Serving("holdfast", model.identity.dtype, temperature, top_p)


def require_match(
    bundle: Bundle, model: LanguageModel, serving: Serving | None = None
) -> list[str]:
    """Refuse a bundle of another model; say what thresholds were not set on.

    Args:
        bundle: The bundle.
        model: The model whose states are read.
        serving: How answers are drawn; None if nothing is known of that but the model's
            own arithmetic.

    Returns:
        A sentence for each difference that makes thresholds stale: scores are still
        scores, and nothing is promised about how often they are passed. Empty if there
        is none.

    Raises:
        InputError: If weights or chat template are others.
        AdapterError: If states of the model cannot be read.
    """
    model.require("states")
    return require_identity(bundle, model.identity, serving)


def require_identity(
    bundle: Bundle, identity: ModelIdentity, serving: Serving | None
) -> list[str]:
    """Do as `require_match` for a model that is known by its files alone."""
    own = {key: getattr(identity, key) for key in ("weights_sha256", "template_sha256")}
    different = [key for key in own if bundle.model.get(key) != own[key]]
    if different:
        raise InputError(
            f"a guard bundle of {identity.model_id}",
            f"one of {bundle.model.get('id')} that differs in {', '.join(different)}",
            "Write one from a study of this model (`holdfast guard bundle`); detectors "
            "read no other.",
        )
    if serving is None:
        serving = bundle.serving._replace(dtype=identity.dtype)
    return [
        f"Thresholds were set with {name} {_said(before)} and are stale with "
        f"{_said(now)}: measure their false stops again before you rely on them."
        for name, before, now in zip(
            Serving._fields, bundle.serving, serving, strict=True
        )
        if before != now
    ]


def _said(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value) or "none"


LEAST_SHARE = 0.1
"""Share of its letters that a script of a text has, at least."""


def scripts_of(text: str) -> tuple[str, ...]:
    """Return the scripts that have a tenth of the letters of a text, by name.

    The first word of a letter's name stands for its script: LATIN, CYRILLIC, CJK. It
    says which alphabet, and not which language.
    """
    letters = Counter(
        unicodedata.name(letter, "UNKNOWN").split()[0].split("-")[0]
        for letter in text
        if letter.isalpha()
    )
    total = sum(letters.values())
    return tuple(
        sorted(name for name, n in letters.items() if n >= LEAST_SHARE * total)
    )


def range_of(texts: Iterable[str]) -> tuple[str, ...]:
    """Return the scripts of some texts together."""
    return tuple(sorted({name for text in texts for name in scripts_of(text)}))
