"""Which prompts an audit asks: files where given, authored ones where not."""

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from holdfast.data.attacks import authored_wrappers, wrap
from holdfast.data.harm_labels import Label
from holdfast.data.prompts import Prompt, is_bare, prompt_id, read_prompts
from holdfast.data.requests import authored_prompts, lookalike_prompts
from holdfast.data.splits import overlap
from holdfast.errors import PromptFileError
from holdfast.rollout.settings import ROLES, RolloutSettings

AUTHORED_ROWS = 200
AUTHORED_LOOKALIKES = 100
AUTHORED, UNNAMED_WRAPPER = "authored", "unnamed"
_BENIGN = ("benign", "benign_wrapped", "safe_lookalike")
Given = Mapping[str, Sequence[str | Prompt]]


@dataclass(frozen=True)
class GatheredPrompts:
    """The prompts of every role, and where they come from."""

    # Role and its prompts, in the order of their content hashes.
    prompts: dict[str, tuple[Prompt, ...]]
    # One record per source, as `report.json` wants it.
    sources: tuple[dict[str, Any], ...]
    # Counts of exact and of similar prompts between pairs of roles.
    overlap: dict[str, dict[str, int]]

    @property
    def sha256(self) -> str:
        """One hash over every prompt, its role and its cluster."""
        lines = [
            f"{role}\t{row.prompt_id}\t{row.request_id}\t{row.wrapper}"
            for role, rows in self.prompts.items()
            for row in rows
        ]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


class Collector:
    """Gathers prompts role by role; a prompt is kept once."""

    def __init__(self, settings: RolloutSettings) -> None:
        """Start empty."""
        self.settings = settings
        self.roles: dict[str, dict[str, Prompt]] = {role: {} for role in ROLES}
        self.sources: list[dict[str, Any]] = []
        self._kept: list[set[str]] = []
        self._known: dict[str, tuple[Prompt, str]] = {}

    def add(
        self, role: str, prompts: Iterable[Prompt], source: Mapping[str, Any]
    ) -> None:
        """Put prompts under their role, rows of another label beside them.

        A prompt that an earlier source has given is left out, and counted.
        """
        rows = list(prompts)
        kept: set[str] = set()
        repeated = bare = 0
        for row in rows:
            place = place_of(role, row)
            bare += role.endswith("wrapped") and not place.endswith("wrapped")
            known = self._known.setdefault(row.prompt_id, (row, role))
            if known[0] is not row:
                if not str(source["source"]).startswith(AUTHORED):
                    _require_one_label(*known, row, role)
                repeated += 1
                continue
            if place.endswith("wrapped") and row.wrapper is None:
                row = replace(row, wrapper=UNNAMED_WRAPPER)
            self.roles[place][row.prompt_id] = row
            kept.add(row.prompt_id)
        notes = list(source.get("notes", ()))
        if repeated:
            notes.append(
                f"{repeated} prompts are in an earlier source as well and were left "
                "out here."
            )
        if bare:
            notes.append(
                f"{bare} prompts are the bare requests, as the source says, and count "
                "as plain."
            )
        self.sources.append(
            {"column": None, "rows": len(rows), "duplicates": 0, "sha256": _hash(rows)}
            | dict(source)
            | {"role": role, "notes": notes}
        )
        self._kept.append(kept)

    def read(self, role: str, source: str) -> None:
        """Add the prompts of a file or a Hub dataset."""
        file = read_prompts(
            source,
            label=role_label(role),
            column=self.settings.columns().get(role),
            revision=self.settings.data_revision,
            attacked=role.endswith("wrapped"),
            role=role,
            accept=self.settings.yes,
            first_turn=self.settings.turns == "first",
        )
        self.add(role, file.prompts, file.record)

    def limited(self, role: str) -> tuple[Prompt, ...]:
        """Return the prompts of a role in hash order, no more than the limit."""
        rows = sorted(self.roles[role].values(), key=lambda row: row.prompt_id)
        return tuple(rows[: self.settings.limit])

    def finish(self) -> GatheredPrompts:
        """Return what was gathered."""
        prompts = {role: self.limited(role) for role in ROLES}
        self._count({row.prompt_id for rows in prompts.values() for row in rows})
        return GatheredPrompts(prompts, tuple(self.sources), _overlaps(prompts))

    def _count(self, asked: Collection[str]) -> None:
        """Say of every source how many of its prompts are asked."""
        for source, names in zip(self.sources, self._kept, strict=True):
            source["asked"] = sum(name in asked for name in names)
            if left := len(names) - source["asked"]:
                source["notes"].append(
                    f"{left} prompts were left out by --limit {self.settings.limit}."
                )


def gather(settings: RolloutSettings, given: Given | None = None) -> GatheredPrompts:
    """Return the prompts of an audit.

    A role is filled from what is given in memory, else from its file, else from the
    default: authored requests, which organisms were never trained on, and authored
    wrappers around them.
    """
    collector = Collector(settings)
    for role in ROLES:
        source = getattr(settings, role)
        if given and role in given:
            collector.add(role, _in_memory(role, given[role]), {"source": "in memory"})
        elif source is not None:
            collector.read(role, source)
        elif role in ("harmful", "benign"):
            count = settings.limit or AUTHORED_ROWS
            rows = authored_prompts(role_label(role), count, settings.seed)
            collector.add(role, rows, {"source": AUTHORED})
        elif role == "safe_lookalike":
            count = settings.limit or AUTHORED_LOOKALIKES
            lookalikes = lookalike_prompts(count, settings.seed)
            collector.add(role, lookalikes, {"source": AUTHORED})
        elif role != "second" and not collector.roles[role]:
            plain = collector.limited(
                role.replace("_wrapped", "").replace("wrapped", "harmful")
            )
            rows = wrapped(plain, settings.wrappers_per_request, settings.seed)
            collector.add(role, rows, {"source": "authored wrappers"})
    return collector.finish()


def wrapped(prompts: Iterable[Prompt], most: int, seed: int) -> tuple[Prompt, ...]:
    """Put authored wrappers around requests.

    Which wrappers and which wording a request gets depends on its own hash and the
    seed, so that adding a request changes nothing for the others.

    Returns: Wrapped prompts; each keeps the `request_id` and the label of its request.
    """
    wrappers = authored_wrappers()
    rows = []
    for prompt in prompts:
        start = row_seed(seed, prompt.request_id, 0)
        for step in range(min(most, len(wrappers))):
            wrapper = wrappers[(start + step) % len(wrappers)]
            template = row_seed(seed, prompt.request_id, 1 + step)
            rows.append(wrap(prompt, wrapper, template % len(wrapper.templates)))
    return tuple(rows)


def row_seed(seed: int, prompt_id: str, sample: int) -> int:
    """Return the seed of one row: 63 bits of a hash, whatever batch it runs in."""
    digest = hashlib.sha256(f"{seed}/{prompt_id}/{sample}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def role_label(role: str) -> Label:
    """Return the label of the rows that a role was named for."""
    return "benign" if role in _BENIGN else "harmful"


def place_of(role: str, row: Prompt) -> str:
    """Return the role that a row belongs to, by its own label and wrapper."""
    if role == "second" or (role == "safe_lookalike" and row.label == "benign"):
        return role
    named = role.endswith("wrapped") or row.wrapper is not None
    is_wrapped = named and not is_bare(row.said, row.request)
    if row.label == "benign":
        return "benign_wrapped" if is_wrapped else "benign"
    return "wrapped" if is_wrapped else "harmful"


def some_of(names: Sequence[str], most: int = 3) -> str:
    """Return a few names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _require_one_label(known: Prompt, other: str, row: Prompt, role: str) -> None:
    """Refuse a prompt that one source calls harmful and another benign."""
    if known.label != row.label:
        raise PromptFileError(
            "prompts that are harmful in every source, or in none",
            f"one that is {known.label} in `{known.source}` ({other}) and {row.label}"
            f" in `{row.source}` ({role}): {row.text[:60]!r}",
            "Leave it out of one of them.",
        )


def _in_memory(role: str, rows: Sequence[str | Prompt]) -> list[Prompt]:
    """Turn texts into prompts."""
    label = role_label(role)
    prompts = []
    for row in rows:
        if isinstance(row, str):
            name = prompt_id(row)
            row = Prompt(name, name, row, label, "in memory", None)
        prompts.append(row)
    return prompts


def _overlaps(prompts: Mapping[str, Sequence[Prompt]]) -> dict[str, dict[str, int]]:
    """Count what pairs of roles share; a role that is empty has no entry."""
    pairs = (("harmful", "second"), ("harmful", "benign"), ("wrapped", "second"))
    shares = {}
    for one, other in pairs:
        a, b = ([row.said for row in prompts[role]] for role in (one, other))
        if a and b:
            both = overlap(a, b)
            shares[f"{one}/{other}"] = {"exact": both.exact, "similar": both.similar}
    return shares


def _hash(rows: Sequence[Prompt]) -> str:
    text = "\n".join(row.prompt_id for row in rows)
    return hashlib.sha256(text.encode()).hexdigest()
