"""Questions with exact answers beside an ablation: is the model as able as before?"""

from typing import Any, NamedTuple

import pyarrow as pa

from holdfast.data.control_tokens import prompt_token_ids
from holdfast.data.items import SuiteFile
from holdfast.data.questions import read_questions
from holdfast.errors import InputError
from holdfast.judges.exact import exact_number
from holdfast.models.generation import generate
from holdfast.models.rows import Sampling
from holdfast.session.answers import drawn
from holdfast.session.asking import Question, fit_context
from holdfast.session.batches import in_batches
from holdfast.session.context import Session
from holdfast.session.figures import study_seed
from holdfast.session.meter import Meter
from holdfast.session.prompts import row_seed
from holdfast.session.rows import Rollout, from_table, to_table
from holdfast.study import Study

ROLE = "utility"
PARTS = "ablate_utility"
"""Folder of the batches of the answers without an edit."""


class Asked(NamedTuple):
    """Questions that are asked under every condition, and their right answers."""

    file: SuiteFile
    targets: dict[str, str]

    @property
    def sha256(self) -> str:
        """Hash of the source."""
        return str(self.file.record["sha256"])


def read_utility(source: str, limit: int) -> Asked:
    """Read questions, at most so many, the first by content hash.

    Raises:
        InputError: If an answer holds no number, or the source cannot be read.
        SettingsError: If a suite has no exact answers.
    """
    file = read_questions(source)
    wrong = [item for item in file.items if exact_number(item.target or "") is None]
    if wrong:
        raise InputError(
            f"a number in every answer of `{source}`",
            f"{len(wrong)} without one, such as {(wrong[0].target or '')[:40]!r}",
            "Utility is judged by the number that an answer ends on.",
        )
    items = sorted(file.items, key=lambda item: item.prompt.prompt_id)[:limit]
    targets = {item.prompt.prompt_id: item.target or "" for item in items}
    return Asked(SuiteFile(tuple(items), file.record), targets)


def draw_utility(
    study: Study, session: Session, asked: Asked, sampling: Sampling
) -> tuple[list[Rollout], list[str]]:
    """Draw the answers without an edit, as the rollouts were drawn.

    Questions that do not fit in the model's context are left out and named, and so
    are those whose thinking does not end, as prompts are, since in two of the scopes
    it is kept.

    Args:
        study: The study, whose system prompt is used; finished batches are kept.
        session: The model.
        asked: The questions.
        sampling: How the rollouts were drawn.

    Returns:
        The answers, and what has to be known of questions that were left out.

    Raises:
        InputError: If no question fits in the model's context.
    """
    adapter, seed = session.adapter, study_seed(study)
    system_prompt = study.manifest["settings"]["rollout"]["system_prompt"]
    questions = [
        Question(
            ROLE,
            item.prompt,
            0,
            row_seed(seed, item.prompt.prompt_id, 0),
            prompt_token_ids(
                adapter.tokenizer,
                item.prompt.text,
                system_prompt=system_prompt,
                thinking=adapter.thinking,
            ),
        )
        for item in asked.file.items
    ]
    fitting = fit_context(adapter, questions, sampling)
    for note in fitting.notes:
        session.progress.warn(note)

    meter = Meter()

    def work(batch: list[Question]) -> pa.Table:
        prompts = [(question.token_ids, question.seed) for question in batch]
        parts = generate(
            adapter,
            prompts,
            sampling,
            batch_size=session.batch_size,
            told=meter.tick,
        )
        return to_table(
            drawn(batch[each.index], each, system_prompt)
            for part in parts
            for each in part
        )

    table = in_batches(
        study,
        PARTS,
        fitting.questions,
        name=lambda question: question.row_id,
        length=lambda question: question.n_tokens,
        batch_size=session.batch_size,
        work=work,
        progress=session.progress,
        label="Answering questions",
        meter=meter,
    )
    return [row for row in from_table(table) if row.closed], fitting.notes


def record_of(asked: Asked, n_rows: int) -> dict[str, Any]:
    """Return where the questions come from, and how many were asked."""
    known = asked.file.record
    return {"source": known["source"], "rows": n_rows, "sha256": known["sha256"]}
