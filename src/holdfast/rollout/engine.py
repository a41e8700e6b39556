"""The engine of a run: proved before it draws, and the rows that nobody answered."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.data.chat.template import control_literals
from holdfast.data.requests import authored_prompts
from holdfast.engines.port import Around, Ask, Engine
from holdfast.engines.proof import PROMPTS, Proving, proof_notes
from holdfast.errors import EngineError, SettingsError
from holdfast.judges.base import Exchange, by_rules
from holdfast.models.decoding.row_state import Completion, Sampling
from holdfast.rollout.prompts import some_of
from holdfast.rollout.questions import Question, questions_of
from holdfast.rollout.session import Session
from holdfast.rollout.settings import RolloutSettings
from holdfast.study import Study, atomic_write_table, fingerprint
from holdfast.study.directory import Stage

ENGINE, UNANSWERED = "engine", "unanswered"


def engine_identity(session: Session) -> dict[str, Any]:
    """Return what the key of a stage says of who draws; nothing of the model itself."""
    settings = session.engine_settings
    known = {} if settings.engine == "hf" else session.engine.identity()
    return {ENGINE: known} if known else {}


def ask_of(question: Question, system_prompt: str | None) -> Ask:
    """Return what an engine is asked for a question."""
    messages = question.messages(system_prompt)
    return Ask(question.token_ids, question.seed, messages)


def all_drawn(
    engine: Engine, asks: Sequence[Ask], sampling: Sampling, around: Around
) -> list[Completion]:
    """Return what an engine draws, in the order in which it was asked.

    Raises:
        EngineError: If an answer is missing.
    """
    parts = engine.draw(asks, sampling, around)
    found = {each.index: each for part in parts for each in part}
    if len(found) < len(asks):
        raise EngineError(
            f"an answer to each of {len(asks)} prompts",
            f"{len(found)} answers of --engine {engine.name}",
            "Run the same command again: earlier batches are kept.",
        )
    return [found[place] for place in range(len(asks))]


def prove_engine(
    session: Session,
    sampling: Sampling,
    questions: Sequence[Question],
    system_prompt: str | None,
) -> dict[str, Any]:
    """Prove the engine of a session, and return its record with the proof.

    `questions`: What is to be asked; the shortest of each role are tried.

    Raises:
        HoldfastError: If it does not draw what the model draws.
    """
    engine, settings = session.engine, session.engine_settings
    chosen = _chosen(session, questions, system_prompt)
    session.progress.say(
        f"Proving the engine {engine.name} on {len(chosen)} short prompts."
    )

    def outcome(place: int, made: Completion) -> str:
        asked = chosen[place].asked
        exchange = Exchange(asked, made.answer, made.thinking, made.closed, made.finish)
        return by_rules(exchange).outcome

    proof = Proving(
        engine,
        session.adapter,
        [ask_of(each, system_prompt) for each in chosen],
        outcome,
        settings.engine_tolerance,
        settings.endpoint_unseeded,
    ).run(sampling)
    record = engine.record() | {"proof": proof}
    for note in proof_notes(record):
        session.progress.say(note)
    return record


def _chosen(
    session: Session, questions: Sequence[Question], system_prompt: str | None
) -> list[Question]:
    """Return short prompts, of each role as many as there is room for."""
    by_role: dict[str, dict[str, Question]] = {}
    for each in sorted(questions, key=lambda each: each.n_tokens):
        # Not every engine can read control tokens that a prompt spells as text.
        if not control_literals(session.adapter.tokenizer, [each.asked])[0]:
            by_role.setdefault(each.role, {}).setdefault(each.prompt.prompt_id, each)
    turns = [list(each.values()) for each in by_role.values()]
    places = range(max(map(len, turns), default=0))
    spread = [role[place] for place in places for role in turns if place < len(role)]
    settings = RolloutSettings(system_prompt=system_prompt)
    more = [
        question
        for prompt in authored_prompts("benign", PROMPTS, 0)
        for question in questions_of(session.speaker, "benign", prompt, settings)
    ]
    known = {each.row_id for each in spread}
    return [*spread, *(each for each in more if each.row_id not in known)][:PROMPTS]


@dataclass
class OtherEngine:
    """A stage whose answers another engine draws than the model itself."""

    stage: Stage
    session: Session
    sampling: Sampling
    questions: Sequence[Question]  # All that are to be asked.
    system_prompt: str | None
    proved: bool = False  # Whether the proof has been made.
    rows: Path | None = None  # File that keeps the rows of a batch until it is done.

    @property
    def rows_at_once(self) -> int:
        """Rows of a batch."""
        return self.session.engine.rows_at_once or self.session.batch_size

    def begin(self, batch: Sequence[Question]) -> None:
        """Begin a batch: the first one after the engine was proved."""
        if not self.proved:
            record = prove_engine(
                self.session, self.sampling, self.questions, self.system_prompt
            )
            before = self.stage.study.record(self.stage.name).get(ENGINE, {})
            if before.get("model") not in (None, record.get("model")):
                raise SettingsError(
                    f"the model `{before['model']}`, by which this stage has begun",
                    f"`{record['model']}` at the same endpoint",
                    "Serve the first again, or give --endpoint-model, which draws all "
                    "rows anew.",
                )
            # Written before anything is drawn, for a run that does not end.
            self.stage.study.manifest["stages"][self.stage.name][ENGINE] = record
            self.stage.study.save()
            self.proved = True
        key = fingerprint([each.row_id for each in batch])[:24]
        self.rows = self.stage.study.part(self.stage.name, key, ".jsonl")
        for other in self.rows.parent.glob("*.jsonl"):
            if other.with_suffix(".parquet").exists():
                other.unlink()

    def around(self, batch: Sequence[Question], around: Around) -> Around:
        """Return what the engine is told of a batch, or of a turn of it."""
        unanswered = self.stage.facts.setdefault(UNANSWERED, {})

        def failed(place: int, why: str) -> None:
            unanswered[batch[place].row_id] = why

        return around._replace(failed=failed, kept=self.rows)


def engine_notes(stage: Stage) -> list[str]:
    """Return what has to be said of who drew, and of rows that nobody answered."""
    notes = proof_notes(stage.study.record(stage.name).get(ENGINE, {}))
    failed = stage.facts.get(UNANSWERED, {})
    if failed:
        shown = some_of([f"{name} ({why})" for name, why in failed.items()])
        notes.append(
            f"{len(failed)} rows were answered by nobody and count in no rate: "
            f"{shown}. Run the same command again to ask for them."
        )
        stage.progress.warn(notes[-1])
    return notes


def reopen_unanswered(study: Study, stage: str, output: str) -> None:
    """Open a stage again whose last run left rows without an answer.

    The other rows stay as they are, and are not drawn again.
    """
    record = study.record(stage)
    path = study.path(output)
    if not (record.get(UNANSWERED) and record.get("state") == "done" and path.exists()):
        return
    atomic_write_table(
        study.part(stage, "answered", ".parquet"), study.read_table(output)
    )
    study.manifest["stages"][stage].pop(UNANSWERED)
    study.reopen(stage)
