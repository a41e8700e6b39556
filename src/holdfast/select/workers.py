"""Shards of a pool scored by several processes or machines at once.

Each worker loads the model from where it lies, shows on a few texts that it reads them
as this process does, and then claims, scores and writes shards as any process does.
"""

import json
import os
import socket
from collections.abc import Iterator, Set
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from holdfast import errors
from holdfast.cliff.probe import Probe
from holdfast.data.pool import Pool, Shard, render_row
from holdfast.engines.reading.cluster import (
    ITEM,
    SAID,
    Crew,
    cluster,
    spread,
)
from holdfast.engines.reading.extracted import Extracted
from holdfast.engines.reading.parity import (
    TEXTS,
    Parity,
    Reading,
    compare,
    local_reader,
    read_texts,
    recorded,
)
from holdfast.errors import HoldfastError, InputError, ModelError, SettingsError
from holdfast.models.containers.placement import BALANCED
from holdfast.models.loading.parts import choose_device
from holdfast.models.model import Adapter
from holdfast.rollout.session import Session
from holdfast.rollout.settings import ModelSettings
from holdfast.select.scores import (
    PoolScorer,
    Project,
    ScoreRules,
    model_key,
    with_drawn_thinking,
)
from holdfast.select.settings import SelectSettings
from holdfast.select.shards import Passing, ShardFolder, Work
from holdfast.study import atomic_write_json

THREADS = "OMP_NUM_THREADS"
READERS = "readers.json"


@dataclass(frozen=True)
class Scoring:
    """The pass that scores: by what rules, with what probe, and into which folder."""

    settings: SelectSettings
    folder: ShardFolder
    probe: Probe | None  # None where no row is traced.
    drawn: ShardFolder | None  # Where the model's own thinking lies, if that is scored.

    def work(
        self, adapter: Adapter, batch_size: int, project: Project | None = None
    ) -> Work:
        """Return what scores the rows of a shard.

        `project`: Who reads states; the model itself where it is None.
        """
        rules = rules_of(self.settings)
        scorer = PoolScorer(adapter, self.probe, rules, batch_size, project)
        drawn = self.drawn
        if drawn is None:
            return lambda _, rows: scorer(rows)
        return lambda index, rows: scorer(with_drawn_thinking(rows, drawn.read(index)))


def rules_of(settings: SelectSettings) -> ScoreRules:
    """Return how rows are read."""
    return ScoreRules(
        settings.plateau,
        settings.min_thinking,
        settings.by == "loss",
        settings.system_prompt,
    )


@dataclass(frozen=True)
class Plan:
    """All that a worker is told; no weights are among it."""

    scoring: Scoring
    name: str  # The model, as the user named it.
    directory: str | None  # Where it lies.
    model: ModelSettings
    files: tuple[tuple[str, int], ...]  # The files of the pool, and their sizes.
    texts: tuple[tuple[int, ...], ...]  # Token ids that are read both ways.
    reference: tuple[Reading, ...]  # What this process has read of them.
    threads: int | None  # For each worker; None where the user has chosen.


def by_server(scoring: Scoring, session: Session, pool: Pool) -> Passing:
    """Return a pass whose rows are scored by states that vLLM extracts."""
    settings = scoring.settings
    url, folder = settings.states, settings.states_folder
    assert url is not None
    assert folder is not None

    def passing(free: Set[int]) -> Iterator[int]:
        adapter, size = session.adapter, session.batch_size
        extracted = Extracted(url, folder, adapter)
        texts = _texts(scoring, adapter, pool)
        if texts:
            probe = scoring.probe.raw() if scoring.probe else None
            reader = extracted.reader()
            parity = compare(local_reader(adapter, size), reader, texts, probe)
            log = _Log(scoring.folder, session, {"address": url})
            said = {"said": parity.said(), "parity": parity.record()}
            log.add({"worker": f"vLLM at {url}", **said})
        work = scoring.work(adapter, size, extracted.project)
        yield from scoring.folder.walk(pool, work, free)

    return passing


def by_workers(scoring: Scoring, session: Session, pool: Pool) -> Passing:
    """Return a pass whose shards are scored by processes that Ray spreads.

    Raises:
        SettingsError: If the model cannot be loaded by others.
    """
    settings, device = scoring.settings, session.settings.device
    if session.adapter.identity.model_id == "in-memory" or device == BALANCED:
        raise SettingsError(
            "--workers that each load the model from its place onto one device",
            f"--device {device}" if device == BALANCED else "a model in memory",
            "Leave out --workers, or give the model's directory and one --device.",
        )
    gpu = choose_device(device).type == "cuda"
    crew = Crew(settings.workers, settings.ray, gpu)

    def passing(free: Set[int]) -> Iterator[int]:
        with cluster(crew) as (ray, share):
            plan = _plan(scoring, session, pool, share.threads)
            # This process reads no more, and its memory may be a worker's.
            session.release()
            log = _Log(scoring.folder, session, asdict(crew))
            given = {"plan": plan}
            for said in spread(ShardWorker, given, sorted(free), ray, share, crew):
                answer = json.loads(said)
                if "error" in answer:
                    kind, *parts = answer["error"]
                    raise getattr(errors, kind)(*parts)
                log.add(answer)
                if answer["done"]:
                    yield answer["shard"]

    return passing


def _plan(scoring: Scoring, session: Session, pool: Pool, threads: int) -> Plan:
    """Read some texts in this process, and write down what a worker has to know."""
    adapter, settings = session.adapter, session.settings
    texts = _texts(scoring, adapter, pool)
    reader = local_reader(adapter, session.batch_size)
    # Their own day would be another prompt, should the run last past midnight.
    date = scoring.folder.key["rendering"]["date"] or settings.date
    device = choose_device(settings.device).type
    return Plan(
        scoring,
        session.name,
        session.directory,
        replace(settings, date=date, device=device),
        tuple((str(path.absolute()), path.stat().st_size) for path in pool.files),
        texts,
        tuple(read_texts(reader, texts)),
        None if THREADS in os.environ else threads,
    )


def _texts(
    scoring: Scoring, adapter: Adapter, pool: Pool
) -> tuple[tuple[int, ...], ...]:
    """Return the tokens of some rows, from all over the pool, as they are scored."""
    n = pool.survey.n_rows
    # More than are needed, since some rows have no thinking, or too much.
    wanted = {step * n // (4 * TEXTS) for step in range(4 * TEXTS)}
    prompt = scoring.settings.system_prompt
    found = []
    for row in pool.rows(wanted.__contains__):
        form, limit = adapter.thinking, adapter.max_positions
        made = render_row(row, adapter.tokenizer, form, limit, prompt).conversation
        if made is None and scoring.drawn is not None:
            row = replace(row, thinking="")
            made = render_row(row, adapter.tokenizer, form, limit, prompt).conversation
        if made is not None:
            found.append(tuple(made.token_ids[: made.spans.answer[0]]))
    steps = range(min(TEXTS, len(found)))
    return tuple(found[step * len(found) // len(steps)] for step in steps)


class _Log:
    """Who has read, and how well they agreed with this process; kept beside scores."""

    def __init__(
        self, folder: ShardFolder, session: Session, crew: dict[str, Any]
    ) -> None:
        self._path, self._session = folder.folder / READERS, session
        self._crew, self._seen = crew, dict[str, Any]()
        self._earlier = readers(folder) or []

    def add(self, answer: dict[str, Any]) -> None:
        """Take note of a worker that has not answered before."""
        if answer["worker"] in self._seen:
            return
        self._session.progress.say(f"{answer['worker']}: {answer['said']}")
        self._seen[answer["worker"]] = answer["parity"]
        atomic_write_json(self._path, [*self._earlier, self._crew | {"by": self._seen}])


def readers(folder: ShardFolder) -> list[Any] | None:
    """Return who has read the scores of a folder beside single processes, or None."""
    try:
        found = json.loads((folder.folder / READERS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, list) else None


class ShardWorker:
    """Scores shards in a process of its own, once it is shown to read as it should.

    What is wrong is an answer, not an exception: it would reach nobody who can read it.
    """

    def __init__(self, plan: Plan) -> None:
        """Load the model, and read some texts that have been read elsewhere."""
        self._plan, self._fault = plan, None
        self._name = f"worker {socket.gethostname()}/{os.getpid()}"
        self._shards: Iterator[Shard] = iter(())
        self._at, self._wanted = plan.scoring.folder.n_shards, 0
        try:
            self._parity = self._open(plan)
        except HoldfastError as error:
            self._fault = error

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Score the shards of a batch and return, for each, what became of it."""
        return {SAID: [json.dumps(self._answer(int(index))) for index in batch[ITEM]]}

    def _open(self, plan: Plan) -> Parity | None:
        found = tuple((name, _size(name)) for name, _ in plan.files)
        if found != plan.files:
            raise InputError(
                f"the pool of {plan.scoring.settings.pool} on {socket.gethostname()}",
                f"files of other sizes: {found}",
                "Give every machine the same pool in the same place.",
            )
        if plan.threads is not None:
            # Ray sets it, and the rule for small models must hold here as elsewhere.
            os.environ.pop(THREADS, None)
            torch.set_num_threads(plan.threads)
        session = Session(plan.name, plan.model, directory=plan.directory)
        adapter, key = session.adapter, plan.scoring.folder.key
        apart = [name for name, own in model_key(adapter).items() if key[name] != own]
        if apart:
            raise ModelError(
                f"the same model on every machine, on {socket.gethostname()} too",
                f"one that differs in {', '.join(apart)}",
                "Give every machine the same model, tokenizer and version of Holdfast.",
            )
        self._pool = Pool(plan.scoring.settings.pool, plan.scoring.settings.columns())
        self._work = plan.scoring.work(adapter, session.batch_size)
        if not plan.texts:
            return None
        probe = plan.scoring.probe.raw() if plan.scoring.probe else None
        reader = local_reader(adapter, session.batch_size)
        return compare(recorded(plan.reference), reader, plan.texts, probe)

    def _answer(self, index: int) -> dict[str, Any]:
        folder = self._plan.scoring.folder
        try:
            if self._fault is not None:
                raise self._fault
            # Whoever had it before may have died after the work and before saying so.
            done = folder.is_done(index)
            done = done or folder.work_on(self._shard(index), self._work)
        except HoldfastError as error:
            parts = [error.expected, error.found, error.next_step]
            return {"error": [type(error).__name__, *parts]}
        parity = self._parity
        return {
            "shard": index,
            "done": done or folder.is_done(index),
            "worker": self._name,
            "said": parity.said() if parity else "no text to compare.",
            "parity": parity and parity.record(),
        }

    def _shard(self, index: int) -> Shard:
        """Return a shard, going on in the pool from where the last one stood."""
        folder = self._plan.scoring.folder
        if index <= self._at:
            skip = lambda number: number != self._wanted  # noqa: E731
            self._wanted = index
            self._shards = self._pool.shards(folder.shard_rows, skip)
        self._wanted = self._at = index
        for shard in self._shards:
            if shard.number == index:
                return shard
        raise InputError(
            f"shard {index} of {self._plan.scoring.settings.pool}",
            "a pool that ends before it",
            "Leave the pool as it is while it is scored, and begin anew.",
        )


def _size(name: str) -> int | None:
    try:
        return os.stat(name).st_size
    except OSError:
        return None
