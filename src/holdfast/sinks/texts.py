"""Harmful and reference texts, paired and cut to equal positions, by checkpoint."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from holdfast.data.pool import Pool, PoolRow, render_row
from holdfast.data.prompts import prompt_id
from holdfast.errors import InputError, SettingsError, TooFewExamplesError
from holdfast.models.loading.files import ADAPTER_CONFIG, CONFIG
from holdfast.models.model import Adapter
from holdfast.sinks.settings import SinksSettings

LEAST = 2
"""Prompts under which there is no interval."""
NOTHING = "nothing to compare at equal positions"


class Text(NamedTuple):
    """Tokens of which the sink mass is read."""

    prompt: str  # Hash of the prompt, which is the cluster of every interval.
    token_ids: tuple[int, ...]  # The whole text, or as much of it as is compared.
    start: int  # Position from which on queries are averaged.
    length: int  # Tokens of the whole text.


class Texts(NamedTuple):
    """What is compared: in pairs, row by row, or two groups."""

    harmful: list[Text]  # Harmful texts.
    # Reference texts; of one length with the harmful ones if paired.
    reference: list[Text]
    left_out: dict[str, int]  # Rows or pairs that were left out, by reason.


class Source(NamedTuple):
    """The rows of a file by prompt, in the order of the prompts' hashes."""

    rows: dict[str, list[PoolRow]]  # Rows of each prompt, by its hash.
    record: dict[str, Any]  # What is said of the file.


class TextSources(NamedTuple):
    """Both files, with the rows that are compared."""

    harmful: list[tuple[str, PoolRow]]  # Harmful rows with the hash of their prompt.
    # Reference rows; in pairs with the harmful ones if paired.
    reference: list[tuple[str, PoolRow]]
    records: dict[str, dict[str, Any]]  # What is said of each file.


def gather_texts(settings: SinksSettings) -> TextSources:
    """Read both files, and pair their rows by prompt if that is wanted."""
    harmful, reference = (
        _read(each, settings) for each in (settings.harmful, settings.reference)
    )
    records = {"harmful": harmful.record, "reference": reference.record}
    if settings.pairing == "none":
        groups = [_limited(each.rows, settings.limit) for each in (harmful, reference)]
        _require(min(len(set(_names(group))) for group in groups), "in each file")
        return TextSources(groups[0], groups[1], records)
    shared = [name for name in harmful.rows if name in reference.rows]
    if not shared:
        raise InputError(
            "harmful and reference rows on the same prompts, to pair them",
            f"{_counted(harmful)} in `{settings.harmful}`, {_counted(reference)} in "
            f"`{settings.reference}`, and not one prompt in both",
            "Give a harmful and a reference response to each prompt; or compare the "
            "groups as they are with --pairing none, where length and prompt are "
            "confounds.",
        )
    _require(len(shared), "in both files")
    pairs = [
        (name, upper, lower)
        for name in shared[: settings.limit]
        # Rows beyond the shorter list have no partner.
        for upper, lower in zip(harmful.rows[name], reference.rows[name], strict=False)
    ]
    for record in records.values():
        record["paired"] = len(pairs)
    return TextSources(
        [(name, upper) for name, upper, _ in pairs],
        [(name, lower) for name, _, lower in pairs],
        records,
    )


def render_texts(
    adapter: Adapter, material: TextSources, settings: SinksSettings
) -> Texts:
    """Return the texts as tokens of a model; pairs are cut to equal positions."""
    left: Counter[str] = Counter()
    groups = [
        [_text(adapter, name, row, settings) for name, row in rows]
        for rows in (material.harmful, material.reference)
    ]
    if settings.pairing == "none":
        kept = [_fitting(group, left) for group in groups]
    else:
        kept = [[], []]
        for upper, lower in zip(*groups, strict=True):
            pair = _matched(upper, lower)
            if isinstance(pair, str):
                left[pair] += 1
            else:
                kept[0].append(pair[0])
                kept[1].append(pair[1])
    why = "".join(f"; {n} left out: {reason}" for reason, n in left.items())
    _require(min(len({t.prompt for t in group}) for group in kept), f"as tokens{why}")
    return Texts(kept[0], kept[1], dict(left))


def _read(source: str, settings: SinksSettings) -> Source:
    pool = Pool(source, settings.columns())
    found: dict[str, list[PoolRow]] = {}
    for row in pool.rows(lambda number: True):
        found.setdefault(prompt_id(row.prompt), []).append(row)
    record = {
        "source": Path(source).name,
        "sha256": pool.survey.sha256,
        "rows": pool.survey.n_rows,
        "prompts": len(found),
    }
    return Source({name: found[name] for name in sorted(found)}, record)


def _limited(
    rows: dict[str, list[PoolRow]], limit: int | None
) -> list[tuple[str, PoolRow]]:
    return [(name, row) for name in list(rows)[:limit] for row in rows[name]]


def _names(rows: Sequence[tuple[str, PoolRow]]) -> list[str]:
    return [name for name, _ in rows]


def _counted(source: Source) -> str:
    return f"{source.record['rows']} rows on {source.record['prompts']} prompts"


def _require(n: int, where: str) -> None:
    if n < LEAST:
        raise TooFewExamplesError(
            f"at least {LEAST} prompts to compare on",
            f"{n} {where}",
            "Give more rows. A model that thinks needs rows with thinking.",
        )


def _text(
    adapter: Adapter, name: str, row: PoolRow, settings: SinksSettings
) -> Text | str:
    """Return a row as tokens, or why it is left out."""
    limit, system_prompt = adapter.max_positions, settings.system_prompt
    rendered = render_row(
        row, adapter.tokenizer, adapter.thinking, limit, system_prompt
    )
    if rendered.conversation is None:
        return str(rendered.kind)
    tokens, spans = rendered.conversation.token_ids, rendered.conversation.spans
    start = 1 if settings.positions == "all" else max(1, spans.prompt[1])
    return Text(name, tokens[: settings.max_tokens], start, len(tokens))


def _matched(upper: Text | str, lower: Text | str) -> tuple[Text, Text] | str:
    """Cut two texts to the positions that both have, or say why there are none."""
    if isinstance(upper, str) or isinstance(lower, str):
        return upper if isinstance(upper, str) else str(lower)
    # Attention is causal: what follows a position changes nothing before it.
    length = min(len(upper.token_ids), len(lower.token_ids))
    start = max(upper.start, lower.start)
    if length <= start:
        return NOTHING
    cut = [
        each._replace(token_ids=each.token_ids[:length], start=start)
        for each in (upper, lower)
    ]
    return cut[0], cut[1]


def _fitting(group: Sequence[Text | str], left: Counter[str]) -> list[Text]:
    kept = []
    for each in group:
        if isinstance(each, str):
            left[each] += 1
        elif len(each.token_ids) <= each.start:
            left["no token after the first that looks back"] += 1
        else:
            kept.append(each)
    return kept


_NUMBERED = re.compile(r"checkpoint-(\d+)")
BESIDE = ".checkpoints"
"""`holdfast finetune` keeps the checkpoints of a running run in a folder beside it."""


class Step(NamedTuple):
    """One model of a series."""

    name: str  # `organism:NAME`, a directory, or a Hub id.
    step: int | None  # Optimiser step, where the folder says so.


def series(models: Sequence[str]) -> list[Step]:
    """Return every model that names stand for, in order.

    A folder with `checkpoint-N` folders in it, or beside it as `NAME.checkpoints`,
    stands for those by number, and after them for itself if it holds a model.
    """
    found = [step for model in models for step in _expand(model)]
    names = [step.name for step in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if not found or twice:
        raise SettingsError(
            "each model once",
            f"{', '.join(twice)} twice" if twice else "no model",
            "Name every checkpoint once, or the folder that holds them.",
        )
    return found


def _expand(model: str) -> list[Step]:
    path = Path(model).expanduser()
    if not path.is_dir() and not path.with_name(path.name + BESIDE).is_dir():
        return [Step(model, None)]
    folders = [path, path.with_name(path.name + BESIDE)]
    numbered: dict[int, str] = {}
    for folder in folders:
        for each in folder.glob("checkpoint-*"):
            number = _NUMBERED.fullmatch(each.name)
            if number and each.is_dir():
                numbered.setdefault(int(number[1]), str(each))
    steps = [Step(numbered[number], number) for number in sorted(numbered)]
    if not steps or any((path / name).is_file() for name in (CONFIG, ADAPTER_CONFIG)):
        steps.append(Step(model, None))
    return steps
