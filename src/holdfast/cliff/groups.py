"""Traces of rows, and plateau, cliff and controls by group."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float
from torch import Tensor

from holdfast.cliff.cliff import (
    CliffSummary,
    RowCliff,
    Trace,
    aligned_mean,
    excess,
    final_gap,
    row_cliff,
    summarise,
)
from holdfast.data.chat.conversation import token_texts
from holdfast.data.chat.rendering import ChatTokenizer
from holdfast.rollout.prompts import row_seed
from holdfast.rollout.rows import GROUPS, Rollout
from holdfast.rollout.settings import TraceSettings
from holdfast.stats.bootstrap import Estimate
from holdfast.study.batches import ROW_ID
from holdfast.study.figures import DIGITS, figure_of, generator

AS_GENERATED = "as_generated"
SHUFFLED = "shuffled_thinking"
NEUTRAL = "neutral_template"
CONTROLS = (SHUFFLED, NEUTRAL)
_NAME = pa.dictionary(pa.int32(), pa.string())
SCHEMA = pa.schema(
    [
        (ROW_ID, _NAME),
        ("request_id", _NAME),
        ("prompt_id", _NAME),
        ("sample", pa.int32()),
        ("group", _NAME),
        ("condition", _NAME),
        ("position", pa.int32()),
        ("token", _NAME),
        ("region", _NAME),
        ("score", pa.float32()),
        ("logit", pa.float32()),
        ("logit_difference", pa.float32()),
    ]
)


class Traced(NamedTuple):
    """One answer under one condition."""

    row: Rollout
    condition: str

    @property
    def name(self) -> str:
        """Name of the trace."""
        return f"{self.row.row_id}#{self.condition}"

    def token_ids(self, seed: int) -> list[int]:
        """Return the tokens up to the one before the answer.

        Shuffled thinking is a permutation of the row's own. The neutral template is
        as long as the real one, and made of tokens drawn from the row's own thinking,
        so that nothing but the end of thinking is removed.
        """
        ids = list(self.row.token_ids[: self.row.final + 1])
        start, end = self.row.spans.thinking
        if self.condition == AS_GENERATED or start == end:
            return ids
        generator = torch.Generator().manual_seed(row_seed(seed, self.name, 0))
        thinking = ids[start:end]
        if self.condition == SHUFFLED:
            order = torch.randperm(len(thinking), generator=generator).tolist()
            return [*ids[:start], *(thinking[place] for place in order), *ids[end:]]
        template = len(ids) - end
        drawn = torch.randint(len(thinking), (template,), generator=generator)
        return [*ids[:end], *(thinking[place] for place in drawn.tolist())]


class Scores(NamedTuple):
    """What was read along one trace."""

    logits: Float[Tensor, "position"]  # The probe's logit at each position.
    # The plain logit difference of first answer tokens there.
    differences: Float[Tensor, "position"]


def scores_to_table(
    items: Sequence[Traced],
    token_ids: Sequence[Sequence[int]],
    scores: Sequence[Float[Tensor, "_ label"]],
    tokenizer: ChatTokenizer,
) -> pa.Table:
    """Return one row per token, as `SCHEMA` has it."""
    tables = []
    for item, ids, found in zip(items, token_ids, scores, strict=True):
        n = len(ids)
        row = item.row
        columns = {
            ROW_ID: [item.name] * n,
            "request_id": [row.request_id] * n,
            "prompt_id": [row.prompt_id] * n,
            "sample": [row.sample] * n,
            "group": [row.group] * n,
            "condition": [item.condition] * n,
            "position": list(range(n)),
            "token": list(token_texts(tokenizer, ids)),
            "region": _regions(row, n),
            "score": torch.sigmoid(found[:, 0]).tolist(),
            "logit": found[:, 0].tolist(),
            "logit_difference": found[:, 1].tolist(),
        }
        tables.append(pa.table(columns, schema=SCHEMA))
    return pa.concat_tables(tables).unify_dictionaries()


def scores_from_table(table: pa.Table) -> dict[str, Scores]:
    """Return the scores of every trace, by its name."""
    if table.num_rows == 0:
        return {}
    whole = table.unify_dictionaries().combine_chunks()
    column = whole.column(ROW_ID).combine_chunks()
    codes = column.indices.to_numpy()
    names = column.dictionary.to_pylist()
    borders = np.flatnonzero(np.diff(codes)) + 1
    starts = [0, *borders.tolist()]
    logits, differences = (
        torch.from_numpy(np.array(whole.column(name).to_numpy(), dtype=np.float32))
        for name in ("logit", "logit_difference")
    )
    ends = [*borders.tolist(), len(codes)]
    return {
        names[codes[start]]: Scores(logits[start:end], differences[start:end])
        for start, end in zip(starts, ends, strict=True)
    }


def _regions(row: Rollout, n: int) -> list[str]:
    names = []
    for name, (start, end) in zip(row.spans._fields, row.spans, strict=True):
        names += [name] * (min(end, n) - min(start, n))
    return names


COMPLIED, REFUSED, BENIGN = GROUPS
PROBE_FIGURES = (
    "accuracy",
    "auroc",
    "wrapped_auroc",
    "control_auroc",
    "logit_difference_correlation",
    "second_source_auroc",
)
CONTROL_FIGURES = (
    "excess_over_refused",
    "excess_over_benign",
    "plateau_over_benign",
    "benign_plateau",
    "shuffled_thinking",
    "shuffled_plateau",
    "neutral_template",
    "neutral_final",
    "logit_difference_cliff",
)
"""Keys of the block `controls`, whether or not there is a trace."""
FIGURES = (
    "plateau",
    "plateau_max",
    "final",
    "cliff",
    "plateau_logit",
    "final_logit",
    "scaled_cliff",
)


@dataclass(frozen=True)
class Group:
    """The rows of one group under one condition, and what was read off each."""

    rows: tuple[Rollout, ...]
    cliffs: tuple[RowCliff, ...]

    @property
    def clusters(self) -> list[str]:
        """The base request of each row."""
        return [row.request_id for row in self.rows]

    @property
    def columns(self) -> tuple[tuple[RowCliff, ...], list[str]]:
        """What is averaged, and over what."""
        return self.cliffs, self.clusters


def read_group(
    rows: Sequence[Rollout],
    scores: Mapping[str, Scores],
    settings: TraceSettings,
    condition: str = AS_GENERATED,
    quantity: str = "logits",
) -> Group:
    """Read plateau and cliff off every row."""
    cliffs = tuple(
        row_cliff(
            getattr(scores[Traced(row, condition).name], quantity),
            slice(*row.spans.thinking),
            row.final,
            settings.plateau,
            settings.min_thinking,
        )
        for row in rows
    )
    return Group(tuple(rows), cliffs)


def measure(
    groups: Mapping[str, Sequence[Rollout]],
    scores: Mapping[str, Scores],
    settings: TraceSettings,
    seed: int,
) -> dict[str, Any]:
    """Return the blocks `trace` and `controls`, and what the verdict needs beside."""
    read = {name: read_group(groups[name], scores, settings) for name in GROUPS}
    gap = _gap(read, seed, "gap")
    summaries = {name: _summary(group, gap, seed, name) for name, group in read.items()}
    return {
        "gap": figure_of(gap),
        "trace": {name: _block(found) for name, found in summaries.items()},
        "controls": _controls(read, groups, scores, settings, gap, seed)
        | {"benign_plateau": figure_of(summaries[BENIGN].plateau)},
        "n_requests": summaries[COMPLIED].n_requests,
    }


def curves(
    groups: Mapping[str, Sequence[Rollout]],
    scores: Mapping[str, Scores],
    window: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Return the mean score around the end of thinking, group by group.

    Offset 0 is the first token of the end template.
    """
    made = []
    for name in GROUPS:
        rows = groups[name]
        if not rows:
            continue
        traces = [
            Trace(
                torch.sigmoid(scores[Traced(row, AS_GENERATED).name].logits),
                row.spans.thinking[0],
                row.spans.end_template[0],
                row.request_id,
            )
            for row in rows
        ]
        after = max(row.final + 1 - row.spans.end_template[0] for row in rows)
        points = aligned_mean(
            traces, generator(seed, f"curve/{name}"), window=(-window, after)
        )
        made.append(
            {
                "group": name,
                "points": [
                    {key: _rounded(value) for key, value in point._asdict().items()}
                    for point in points
                    if point.n
                ],
            }
        )
    return made


def _controls(
    read: Mapping[str, Group],
    groups: Mapping[str, Sequence[Rollout]],
    scores: Mapping[str, Scores],
    settings: TraceSettings,
    gap: Estimate,
    seed: int,
) -> dict[str, Any]:
    """Return what the cliff is measured against; all but plateaus are scaled."""
    found = {
        "excess_over_refused": _excess(read, REFUSED, "scaled_cliff", gap, seed),
        "excess_over_benign": _excess(read, BENIGN, "scaled_cliff", gap, seed),
        "plateau_over_benign": _excess(read, BENIGN, "scaled_plateau", gap, seed),
    }
    for condition in CONTROLS:
        group = read_group(groups[COMPLIED], scores, settings, condition)
        summary = _summary(group, gap, seed, condition)
        found[condition] = summary.scaled_cliff
        if condition == SHUFFLED:
            found["shuffled_plateau"] = summary.plateau
        if condition == NEUTRAL:
            found["neutral_final"] = summary.final
    plain = {
        name: read_group(groups[name], scores, settings, quantity="differences")
        for name in GROUPS
    }
    plain_gap = _gap(plain, seed, "difference_gap")
    summary = _summary(plain[COMPLIED], plain_gap, seed, "difference")
    found["logit_difference_cliff"] = summary.scaled_cliff
    return {name: figure_of(estimate) for name, estimate in found.items()}


def _gap(read: Mapping[str, Group], seed: int, name: str) -> Estimate:
    """Return the unit of the scaled cliff."""
    draws = generator(seed, f"trace/{name}")
    return final_gap(*read[REFUSED].columns, *read[BENIGN].columns, draws)


def _summary(group: Group, gap: Estimate, seed: int, name: str) -> CliffSummary:
    return summarise(*group.columns, gap, generator(seed, f"trace/{name}"))


def _excess(
    read: Mapping[str, Group], control: str, quantity: Any, gap: Estimate, seed: int
) -> Estimate:
    return excess(
        *read[COMPLIED].columns,
        *read[control].columns,
        generator(seed, f"trace/excess/{control}/{quantity}"),
        quantity=quantity,
        gap=gap,
    )


def _block(summary: CliffSummary) -> dict[str, Any]:
    """Return one group of the block `trace`."""
    figures = {name: figure_of(getattr(summary, name)) for name in FIGURES}
    return figures | {
        "short_thinking_excluded": summary.short_thinking_excluded,
        "n_requests": summary.n_requests,
    }


def _rounded(value: float | int | None) -> float | int | None:
    return round(value, DIGITS) if isinstance(value, float) else value


NO_PLATEAU = "the model has no thinking format, so there is no plateau"
"""Why neither a trace nor a ranking of heads can be had, whatever else is asked."""
