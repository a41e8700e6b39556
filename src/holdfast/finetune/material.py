"""The rows of a training run: read, left out with a reason, drawn, and encoded."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from holdfast.data.chat.thinking import ThinkingFormat, turn_end
from holdfast.data.pool import NO_THINKING, Pool, PoolRow, render_row
from holdfast.errors import InputError, TooFewExamplesError
from holdfast.finetune.defenses.base import DefenseData
from holdfast.finetune.defenses.options import SafeInstrOptions, SurgeryOptions
from holdfast.finetune.defenses.plain import safe_rows
from holdfast.finetune.settings import FinetuneSettings
from holdfast.finetune.targets import Example, example
from holdfast.judges.rules import rules
from holdfast.models.model import Adapter

NO_REFUSAL = "no refusal"


@dataclass(frozen=True)
class TrainingRows:
    """Rows of one source that fit the model."""

    examples: tuple[Example, ...]  # Their sequences.
    prompts: tuple[str, ...]  # Their prompts.
    record: dict[str, Any]  # What is said of the source.


@dataclass(frozen=True)
class Gathered:
    """All rows of a run."""

    task: dict[str, TrainingRows]  # What is trained on, source by source.
    # What the defense looks at, source by source, and as it is handed over.
    defense: dict[str, TrainingRows] = field(default_factory=dict)
    data: DefenseData = field(default_factory=DefenseData)

    @property
    def sources(self) -> dict[str, TrainingRows]:
        """Every source by its name."""
        return self.task | self.defense


def gather(settings: FinetuneSettings, adapter: Adapter) -> Gathered:
    """Read the rows of a run: the task's, harmless ones, and those of the defense."""
    stop = last_token(adapter.tokenizer, adapter.thinking)
    read = partial(_read, settings, adapter, stop)
    task = {"data": read("data", settings.data)}
    if settings.benign is not None:
        n = round(settings.benign_ratio * len(task["data"].examples))
        task["benign"] = read("benign", settings.benign, n)
    options = settings.recipe.options()
    name, source = "defense-data", settings.defense_data
    if source is None:
        return Gathered(task)
    if isinstance(options, SafeInstrOptions):
        n = safe_rows(sum(len(rows.examples) for rows in task.values()), options)
        return Gathered(task | {name: read(name, source, n)})
    surgery = options if isinstance(options, SurgeryOptions) else None
    refusing = surgery is not None and surgery.against == "refusal"
    reference = read(name, source, refusing=refusing)
    defense = {name: reference}
    if settings.defense_harmful is None:
        return Gathered(task, defense, DefenseData(reference.examples))
    harmful = read("defense-harmful", settings.defense_harmful)
    defense["defense-harmful"] = harmful
    paired = surgery is not None and surgery.paired
    pairs = _pairs(harmful, reference) if paired else ()
    return Gathered(
        task, defense, DefenseData(reference.examples, harmful.examples, pairs)
    )


def last_token(tokenizer: Any, thinking: ThinkingFormat | None) -> int:
    """Return the token that ends a turn: as the template has it, else the tokenizer's.

    Raises: InputError if neither has one.
    """
    found = turn_end(tokenizer, thinking)
    found = tokenizer.eos_token_id if found is None else found
    if found is not None:
        return int(found)
    raise InputError(
        "a tokenizer with a token that ends an answer",
        "none",
        "Add `eos_token` to the model's tokenizer_config.json.",
    )


def _pairs(
    harmful: TrainingRows, reference: TrainingRows
) -> tuple[tuple[int, int], ...]:
    """Return the indices of harmful and reference answers to the same prompts.

    The first answer to a prompt in one source goes with the first in the other.
    """
    indices: dict[str, list[int]] = {}
    for index, prompt in enumerate(reference.prompts):
        indices.setdefault(prompt, []).append(index)
    pairs = tuple(
        (index, indices[prompt].pop(0))
        for index, prompt in enumerate(harmful.prompts)
        if indices.get(prompt)
    )
    for rows in (harmful, reference):
        rows.record["paired"] = len(pairs)
    if pairs:
        return pairs
    raise TooFewExamplesError(
        "a harmful and a reference answer to the same prompt",
        f"none: {len(harmful.prompts)} rows of --defense-harmful and "
        f"{len(reference.prompts)} of --defense-data share no prompt",
        "Give answers to the same prompts, or compare texts of any prompts with "
        "--defense-option paired=false, whose lengths then differ.",
    )


def _read(
    settings: FinetuneSettings,
    adapter: Adapter,
    stop: int,
    name: str,
    source: str,
    n: int | None = None,
    *,
    refusing: bool = False,
) -> TrainingRows:
    """Return the rows of a source that fit: all, or `n` drawn at random."""
    pool = Pool(source, settings.columns())
    fitting: dict[int, tuple[Example, str, bool]] = {}
    left: dict[str, list[str]] = {}
    for row in _offered(pool, n, f"{name}-{settings.recipe.seed}"):
        if len(fitting) == n:
            break
        fit = _fit(row, settings, adapter, stop, refusing)
        if isinstance(fit, str):
            left.setdefault(fit, []).append(row.place)
        else:
            thought = bool((row.thinking or "").strip())
            fitting[row.row] = fit, row.prompt, thought
    _require(name, source, len(fitting), 1 if n is None else n, left)
    record = {
        "source": Path(source).name,
        "sha256": pool.survey.sha256,
        "rows": pool.survey.n_rows,
        "used": len(fitting),
        "left_out": sum(map(len, left.values())),
        "why": {
            why: {"rows": len(places), "places": places} for why, places in left.items()
        },
    }
    # In the order of the source, whatever the order of the draw.
    chosen = [fitting[number] for number in sorted(fitting)]
    if adapter.thinking is None:
        record["thinking_dropped"] = sum(thought for _, _, thought in chosen)
    prompts = tuple(prompt for _, prompt, _ in chosen)
    return TrainingRows(tuple(text for text, _, _ in chosen), prompts, record)


def _fit(
    row: PoolRow,
    settings: FinetuneSettings,
    adapter: Adapter,
    stop: int,
    refusing: bool,
) -> Example | str:
    """Return a row as it is trained on, or why it is left out."""
    longest, system_prompt = adapter.max_positions, settings.system_prompt
    rendered = render_row(
        row, adapter.tokenizer, adapter.thinking, longest, system_prompt
    )
    if rendered.conversation is None:
        return str(rendered.kind)
    if len(rendered.conversation.token_ids) >= longest:
        return "no room for the stop token"
    if refusing and rules.judge(row.prompt, row.response).outcome != "refused":
        return NO_REFUSAL
    return example(rendered.conversation, settings.recipe.loss, stop=stop)


def _offered(pool: Pool, n: int | None, seed: str) -> Iterator[PoolRow]:
    """Yield all rows in their order, or all in a random order, `n` and a few at once.

    A draw reads little more of a long source than it needs: rows that are not wanted
    are neither parsed nor tokenised.
    """
    if n is None:
        yield from pool.rows(lambda number: True)
        return
    order = list(range(pool.survey.n_rows))
    random.Random(seed).shuffle(order)
    step = n + n // 8 + 16
    for start in range(0, len(order), step):
        wanted = order[start : start + step]
        rows = {row.row: row for row in pool.rows(set(wanted).__contains__)}
        yield from (rows[number] for number in wanted)


def _require(
    name: str, source: str, found: int, least: int, left: dict[str, list[str]]
) -> None:
    if found >= least:
        return
    why = ", ".join(f"{len(places)} {kind}" for kind, places in left.items())
    ratio = {"benign": "--benign-ratio", "defense-data": "the ratio of safeinstr"}
    advice = f"Give more rows{f', or lower {ratio[name]}' if name in ratio else ''}."
    if NO_THINKING in left:
        advice += (
            " A model that thinks is trained on rows with thinking: `holdfast select "
            "--thinking-of model --budget 100%` draws it."
        )
    if NO_REFUSAL in left:
        advice = (
            "Give rows whose response refuses, or compare with any safe answer: "
            "--defense-option against=safe."
        )
    raise TooFewExamplesError(
        f"{least} rows of --{name} that can be trained on",
        f"{found} in `{source}`" + (f"; left out: {why}" if why else ""),
        advice,
    )
