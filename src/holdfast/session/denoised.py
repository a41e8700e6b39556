"""Answers of masked-diffusion models, and the steps by which they came about."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import pyarrow as pa

from holdfast.errors import InputError, SettingsError
from holdfast.models.diffusion import denoise
from holdfast.models.masked import MaskedModel
from holdfast.models.remasking import Denoising
from holdfast.models.rows import Completion, Drafting
from holdfast.models.stepping import Trace
from holdfast.session.batches import ROW_ID
from holdfast.session.settings import RolloutSettings
from holdfast.study import Study

STEPS = "steps.parquet"
SCHEMA = pa.schema(
    [
        (ROW_ID, pa.string()),
        ("response", pa.list_(pa.int32())),
        ("committed_at", pa.list_(pa.int32())),
        ("drafts", pa.list_(pa.int32())),
    ]
)
GEN_LENGTH, DENOISING_STEPS = 128, 32


def sampler_for(masked: MaskedModel, settings: RolloutSettings) -> Denoising:
    """Return how a masked-diffusion model decodes, its defaults resolved.

    Args:
        masked: The model; its configuration may say how long its responses are.
        settings: What is asked for.

    Raises:
        SettingsError: If lengths, blocks and steps do not fit together, or nucleus
            sampling is asked for, which no step does.
    """
    if settings.top_p not in (None, 1, 1.0):
        raise SettingsError(
            "no --top-p with a masked-diffusion model, which takes the likeliest "
            "token or adds noise to all of them",
            str(settings.top_p),
            "Leave it out, or choose a --temperature.",
        )
    asked = settings.diffusion
    own = getattr(masked.model.config, "response_length", None)
    length = asked.gen_length or own or GEN_LENGTH
    n_blocks = length // (asked.block_length or length)
    usual = max(min(DENOISING_STEPS, length), n_blocks)
    adaptive = asked.threshold is not None
    return Denoising(
        gen_length=length,
        block_length=asked.block_length,
        steps=asked.denoising_steps or (None if adaptive else usual),
        remasking=asked.remasking,
        temperature=settings.temperature or 0.0,
        cfg_scale=asked.cfg_scale,
        threshold=asked.threshold,
    )


def require_no_flags(settings: RolloutSettings) -> None:
    """Refuse flags of masked-diffusion models where the model is none.

    Raises:
        SettingsError: Names them.
    """
    given = settings.diffusion.given()
    if given:
        raise SettingsError(
            "a masked-diffusion model with " + ", ".join(given),
            "a model that writes from left to right",
            "Leave them out, or use a masked-diffusion model.",
        )


def answers(
    masked: MaskedModel,
    prompts: Sequence[tuple[Sequence[int], int]],
    sampler: Denoising,
    batch_size: int,
) -> Iterator[list[Completion]]:
    """Yield batches of answers with the steps by which they came about.

    Args:
        masked: The model.
        prompts: Tokens of each prompt, and the seed of its row.
        sampler: How a step decides.
        batch_size: Rows decoded together.
    """
    for traces in denoise(masked, prompts, sampler, batch_size=batch_size):
        yield [_with_steps(trace) for trace in traces]


def _with_steps(trace: Trace) -> Completion:
    drafts = [] if trace.predictions is None else trace.predictions.tolist()
    drafting = Drafting(
        tuple(trace.token_ids.tolist()),
        tuple(trace.committed_at.tolist()),
        tuple(tuple(draft) for draft in drafts),
    )
    return replace(trace.completion, drafting=drafting)


def with_steps(rows: pa.Table, made: Mapping[str, Completion]) -> pa.Table:
    """Put the steps of answers beside their rows; left as they are without any.

    Args:
        rows: A table with a column `row_id`.
        made: The completion of each row.
    """
    known = [made[name].drafting for name in rows.column(ROW_ID).to_pylist()]
    if any(each is None for each in known):
        return rows
    columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names[1:]}
    for each in known:
        if each is not None:
            columns["response"].append(each.response)
            columns["committed_at"].append(each.committed_at)
            flat = [token for draft in each.drafts for token in draft]
            columns["drafts"].append(flat)
    for name, values in columns.items():
        field = SCHEMA.field(name)
        rows = rows.append_column(field, pa.array(values, field.type))
    return rows


def take_steps(rows: pa.Table) -> tuple[pa.Table, pa.Table | None]:
    """Return rows without their steps, and the steps as a table of their own."""
    names = [name for name in SCHEMA.names if name in rows.column_names]
    if names != SCHEMA.names:
        return rows, None
    return rows.drop_columns(SCHEMA.names[1:]), rows.select(SCHEMA.names)


def read_steps(study: Study) -> dict[str, Drafting]:
    """Return the steps of every answer of a study, by row.

    Raises:
        InputError: If the study has none: its answers were imported, or are of a model
            that writes from left to right.
    """
    if not study.path(STEPS).exists():
        raise InputError(
            f"{STEPS} in {study.directory}",
            "no such file",
            "Run `holdfast rollout` with a masked-diffusion model; answers that were "
            "imported have no steps.",
        )
    found = {}
    for record in study.read_table(STEPS).to_pylist():
        flat, length = record["drafts"], len(record["response"])
        drafts = [
            tuple(flat[start : start + length]) for start in range(0, len(flat), length)
        ]
        found[record[ROW_ID]] = Drafting(
            tuple(record["response"]), tuple(record["committed_at"]), tuple(drafts)
        )
    return found


def sampler_record(sampler: Denoising) -> dict[str, Any]:
    """Return what anchors remember of a sampler."""
    return {"kind": "diffusion", **asdict(sampler)}
