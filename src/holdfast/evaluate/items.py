"""Which prompts an evaluation asks: suites, limited, and attacked."""

from dataclasses import dataclass
from typing import Any

from holdfast.data.attacks import ALL, attack, choose_attacks, read_translations
from holdfast.data.prompts import Prompt
from holdfast.data.requests import authored_prompts, lookalike_prompts
from holdfast.data.suites import Item, Kind, Reading, SuiteFile, read_suite
from holdfast.errors import SettingsError
from holdfast.evaluate.settings import AUTHORED, EvaluateSettings
from holdfast.study import fingerprint

AUTHORED_REQUESTS = 100


@dataclass(frozen=True)
class AskedItems:
    """The items of an evaluation, and where they come from."""

    items: tuple[Item, ...]
    sources: tuple[dict[str, Any], ...]

    @property
    def sha256(self) -> str:
        """One hash over every prompt, what it counts for, and its target."""
        return fingerprint(
            [
                [each.name, each.prompt.request_id, each.request, each.target]
                for each in self.items
            ]
        )


def gather_items(settings: EvaluateSettings) -> AskedItems:
    """Return the items of an evaluation."""
    names = settings.suite or (AUTHORED,)
    if len(set(names)) < len(names):
        raise SettingsError("suites, each named once", ", ".join(names), "Drop one.")
    table = settings.translations
    translations = None if table is None else read_translations(table)
    choose_attacks(settings.attack, translations)
    items: list[Item] = []
    sources = []
    for name in names:
        file = _read(name, settings)
        plain = _limited(file.items, settings.limit)
        wanted = settings.attack or ((ALL,) if name == AUTHORED else ())
        targets = [item for item in plain if _is_attacked(item, settings)]
        wrapped, without = attack(
            targets, choose_attacks(wanted, translations), settings.seed
        )
        items += [*plain, *wrapped]
        notes = list(file.record["notes"])
        if len(plain) < len(file.items):
            notes.append(f"{len(plain)} of {len(file.items)} requests were asked.")
        notes += [
            f"The attack {attack_name} has nothing for {count} requests."
            for attack_name, count in without.items()
        ]
        sources.append(file.record | {"asked": len(plain), "notes": notes})
    return AskedItems(tuple(_once(items)), tuple(sources))


def _once(items: list[Item]) -> list[Item]:
    """Keep one item of a name; two attacks may not make one text of a request."""
    return list({item.name: item for item in items}.values())


def _read(name: str, settings: EvaluateSettings) -> SuiteFile:
    if name != AUTHORED:
        return read_suite(
            name,
            Reading(
                settings.of_suite(settings.column, name),
                settings.of_suite(settings.data_revision, name),
                accept=settings.yes,
                first_turn=settings.turns == "first",
            ),
        )
    count = settings.limit or AUTHORED_REQUESTS
    items = [
        _item("harmful", prompt)
        for prompt in authored_prompts("harmful", count, settings.seed)
    ]
    items += [
        _item("safe_lookalike", prompt)
        for prompt in lookalike_prompts(count, settings.seed)
    ]
    taken = {item.prompt.prompt_id for item in items}
    items += [
        _item("benign", prompt)
        for prompt in authored_prompts("benign", count, settings.seed)
        if prompt.prompt_id not in taken
    ]
    record: dict[str, Any] = {
        "suite": AUTHORED,
        "source": AUTHORED,
        "column": None,
        "rows": len(items),
        "duplicates": 0,
        "sha256": fingerprint([item.prompt.text for item in items]),
        "notes": [],
    }
    return SuiteFile(tuple(items), record)


def _item(kind: Kind, prompt: Prompt) -> Item:
    return Item(AUTHORED, kind, prompt, prompt.text)


def _is_attacked(item: Item, settings: EvaluateSettings) -> bool:
    if item.kind == "utility":
        return False
    return item.kind == "harmful" or settings.attack_benign


def _limited(items: tuple[Item, ...], limit: int | None) -> list[Item]:
    """Return at most so many items of each kind, the smallest hashes first."""
    ordered = sorted(items, key=lambda item: item.prompt.prompt_id)
    counts: dict[str, int] = {}
    kept = []
    for item in ordered:
        counts[item.kind] = counts.get(item.kind, 0) + 1
        if limit is None or counts[item.kind] <= limit:
            kept.append(item)
    return kept
