"""One thread that owns the model: requests join the running batch, and leave it.

All that touches the model runs here, so that nothing is locked: steps of the batch,
prompts that join it, and single readings (an answer to be scored, a piece of a stream)
between two steps. Rows never wait for a client.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from holdfast.guard.serve.asks import (
    FAILURES,
    Ask,
    Busy,
    Failure,
    Finish,
    Piece,
    Scored,
    is_sound,
)
from holdfast.guard.serve.rows import NOTHING, Added, LiveRow, Running
from holdfast.guard.serve.settings import ServeSettings
from holdfast.guard.serve.telemetry import Metrics
from holdfast.models.batching import is_out_of_memory, pad
from holdfast.models.decoding.decoder import Drawn
from holdfast.models.decoding.jobs import Job, fits_drafts
from holdfast.models.decoding.row_state import Sampling, StoppingRules
from holdfast.models.decoding.step_attention import attending
from holdfast.models.interventions import HeadEdit, LiveEdit, scale_heads
from holdfast.models.model import Adapter

T = TypeVar("T")
LOG = logging.getLogger("holdfast.serve")
TOGETHER = 8
"""Prompts that are read between two steps of the batch, at the most."""
CALLS = 64
"""Readings that may wait, beside one for each answer that passes through."""
PLAIN, EDITED = 0, 1
"""Which of two tables of factors a row has: of ones, or the bundle's edit."""


class Batcher:
    """The model's thread, and the ways into it."""

    def __init__(
        self,
        adapter: Adapter,
        monitor: Any | None,
        settings: ServeSettings,
        metrics: Metrics,
        width: int,
    ) -> None:
        """Prepare the thread; `start` starts it."""
        self.adapter, self.monitor, self.settings = adapter, monitor, settings
        self.metrics, self.width = metrics, width
        self._most_calls = CALLS + settings.queue + width
        self.joins, self._stops = fits_drafts(adapter, None), adapter.stop_ids
        self._waiting: deque[Ask] = deque()
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._there = threading.Condition()
        self._ended = False
        self._batch: Running | None = None
        self._again: list[LiveRow] = []
        self._taken: list[LiveRow] = []  # Rows that are not in the batch yet.
        self._moved = False  # Whether a row has come under the edit in this step.
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def n_waiting(self) -> int:
        """Requests that wait for room in the batch."""
        return len(self._waiting)

    @property
    def n_running(self) -> int:
        """Rows that are being written."""
        batch = self._batch
        return 0 if batch is None else sum(r.finish is None for r in list(batch.rows))

    def submit(self, ask: Ask) -> None:
        """Let an answer be written.

        Raises:
            Busy: If as many wait already as may.
        """
        with self._there:
            # Whoever finds room in the batch does not wait.
            room = max(0, self.width - self.n_running)
            most = self.settings.queue + room
            if len(self._waiting) >= most:
                # Those that have gone need no room.
                here = [each for each in self._waiting if not each.box.is_gone]
                self._waiting = deque(here)
            if self._ended or len(self._waiting) >= most:
                raise Busy(f"{len(self._waiting)} requests wait for room already")
            self._waiting.append(ask)
            self._there.notify()

    def call(self, reading: Callable[[], T]) -> "Future[T]":
        """Let something be read by the model between two steps.

        Raises:
            Busy: If as many wait already as may.
        """
        future: Future[T] = Future()
        with self._there:
            if self._ended or len(self._calls) >= self._most_calls:
                raise Busy(f"{len(self._calls)} readings wait already")
            self._calls.append((reading, future))
            self._there.notify()
        return future

    def stop(self) -> None:
        """End the thread after its step; whoever waits still is told so."""
        with self._there:
            self._ended = True
            self._there.notify()
        self._thread.join(timeout=60)

    def rules(self, sampling: Sampling) -> StoppingRules:
        """Return when rows of a request close their thinking, and end."""
        adapter, thinking = self.adapter, self.adapter.thinking
        ends = "" if thinking is None else thinking.answer_end
        return StoppingRules(adapter.tokenizer, thinking, sampling, self._stops, ends)

    def _run(self) -> None:
        edits, policy = None, self.settings.policy
        if self.monitor is not None and policy in ("steer", "redraw"):
            edit = self.monitor.bundle.edit
            edits = HeadEdit(torch.stack([torch.ones_like(edit), edit]))
        with (
            torch.inference_mode(),
            attending(self.adapter) as ours,
            scale_heads(self.adapter, edits) as live,
        ):
            while not self._ended:
                try:
                    self._turn(live, ours)
                except Exception as error:
                    LOG.exception("the batch failed", extra={"event": "batch_failed"})
                    self._fail_all("memory" if is_out_of_memory(error) else "fault")
        self._fail_all("shutdown")

    def _turn(self, live: LiveEdit, ours: bool) -> None:
        """Do what there is to do next, or wait for something."""
        with self._there:
            idle = self._batch is None and not self._again
            if idle and not self._waiting and not self._calls:
                self._there.wait(timeout=1.0)
        self._answer_calls(live)
        self._admit(live, ours)
        if self._batch is not None:
            self._step(self._batch, live)

    def _answer_calls(self, live: LiveEdit) -> None:
        """Do single readings: one between two steps, or those that wait by now."""
        for _ in range(len(self._calls)):
            reading, future = self._calls.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            # They are of the model as it is.
            live.take([PLAIN] if live.by_row else [])
            try:
                future.set_result(reading())
            except Exception as error:
                future.set_exception(error)
            if self._batch is not None:
                live.take([row.index for row in self._batch.rows])
                return

    def _admit(self, live: LiveEdit, ours: bool) -> None:
        """Read the prompts of those that wait, as far as there is room."""
        batch = self._batch
        if not self.joins and batch is not None:
            return
        room = self.width - (len(batch.rows) if batch else 0)
        rows = self._next_rows(min(room, TOGETHER) if self.joins else room)
        if not rows:
            return
        self._taken = rows
        if self.joins:
            more = [self._read_prompt(row, live, ours) for row in rows]
            for each in more:
                if each is None or not each.rows:
                    continue
                if batch is None:
                    batch = each
                else:
                    batch.join(each)
        else:
            first = iter(rows)
            jobs = [row.job for row in rows]
            rules = max((job.rules for job in jobs), key=lambda each: each.budget)
            batch = Running(
                self.adapter, rules, jobs, live, begin=lambda _: next(first)
            )
        self._batch = batch
        if batch is not None:
            live.take([row.index for row in batch.rows])
            # Room for as many again, so that most who join are not waited for.
            batch.expect(min(self.width, 2 * len(batch.rows)))
        for row in rows:
            self._tell(row)
        self._taken = []

    def _next_rows(self, room: int) -> list[LiveRow]:
        """Return rows for those that waited longest and are still there."""
        rows, self._again = self._again[:room], self._again[room:]
        while len(rows) < room:
            with self._there:
                if not self._waiting:
                    break
                ask = self._waiting.popleft()
            if ask.box.is_gone:
                continue
            if time.monotonic() > ask.deadline:
                ask.box.put(Piece(failure="timeout", why=FAILURES["timeout"]))
                continue
            job = Job(PLAIN, ask.prompt, ask.seed, (), self.rules(ask.sampling))
            row = LiveRow(job, ask)
            row.watch = self.monitor and self.monitor.open(ask.prompt)
            rows.append(row)
        return rows

    def _read_prompt(self, row: LiveRow, live: LiveEdit, ours: bool) -> Running | None:
        """Read one prompt, as it would be read alone."""
        try:
            one = Running(
                self.adapter,
                row.job.rules,
                [row.job],
                live,
                step_attention=ours,
                begin=lambda _: row,
            )
            one.read_prompts()
            self._begin(row, one.prompt_states)
        except Exception as error:
            LOG.exception("a prompt failed", extra={"event": "prompt_failed"})
            failure: Failure = "memory" if is_out_of_memory(error) else "fault"
            self._end(row, failure=failure, why=FAILURES[failure])
            return None
        self.metrics.tokens.labels("prompt").inc(row.n_prompt)
        return one

    def _step(self, batch: Running, live: LiveEdit) -> None:
        """Take one step with all rows, and tell each client what is new."""
        rows: list[Any] = list(batch.rows)
        # Of these the token that is read now was written, and its text waits.
        read = [
            (place, row, row.token_ids[-1])
            for place, row in enumerate(rows)
            if row.finish is None and row.n_written > 0
        ]
        fresh = [place for place, row in enumerate(rows) if row.n_written == 0]
        began = time.perf_counter()
        drawn = batch.advance()
        self.metrics.step.observe(time.perf_counter() - began)
        self.metrics.rows.observe(len(rows))
        self._moved = False
        for place in fresh:
            # Prompts that were read in this very step, side by side.
            self._begin(rows[place], drawn.states[[place]])
        self._watch(read, drawn)
        now = time.monotonic()
        for row in rows:
            if row.is_done:
                continue
            if row.ask.box.is_gone:
                row.finish, row.is_done = "length", True
                self.metrics.gone.inc()
            elif now > row.ask.deadline:
                why = f"it took longer than {self.settings.timeout:g} s"
                self._end(row, failure="timeout", why=why)
            else:
                self._tell(row)
        batch.drop_finished()
        self._batch = batch if batch.rows else None
        if self._moved and self._batch is not None:
            live.take([row.index for row in batch.rows])

    def _watch(self, read: Sequence[tuple[int, LiveRow, int]], drawn: Drawn) -> None:
        """Read the tokens that were written one step before, and let their text go."""
        watched = [each for each in read if each[1].watch is not None]
        scores = self._scores(watched, drawn.states) if watched else {}
        for place, row, _ in read:
            ask, scored = row.ask, scores.get(place)
            if row.watch is not None and scored is None and self._unwatched(row):
                continue
            if scored is not None:
                ask.verdict.take(scored)
                # A redrawn answer may fire once more, and is stopped then.
                if scored.acts and self._act(row, scored):
                    continue
            added = row.next_added()
            steps = () if scored is None else ask.fresh(scored)
            if added.thinking or added.answer or steps:
                ask.box.put(Piece(added.thinking, added.answer, steps))

    def _scores(
        self, watched: Sequence[tuple[int, LiveRow, int]], states: Tensor
    ) -> dict[int, Scored]:
        """Return the score of each token; none of a row that cannot be read."""
        assert self.monitor is not None
        own = states[[place for place, *_ in watched]]
        finite = own.isfinite().all(-1).tolist()
        fine = [each for each, good in zip(watched, finite, strict=True) if good]
        own = own[[row for row, good in enumerate(finite) if good]]
        try:
            found = self.monitor.read(
                [row.watch for _, row, _ in fine], own, [token for *_, token in fine]
            )
        except Exception:
            LOG.exception("the reading failed", extra={"event": "reading_failed"})
            return {}
        return {
            place: Scored(*score)
            for (place, *_), score in zip(fine, found, strict=True)
            if is_sound(score)
        }

    def _unwatched(self, row: LiveRow) -> bool:
        """Deal with a row whose scores are no numbers; return whether it has ended."""
        verdict = row.ask.verdict
        verdict.watched, verdict.fault = False, "the scores of a token are no numbers"
        self.metrics.faults.labels(self.settings.on_fault).inc()
        row.watch = None
        if self.settings.on_fault == "open":
            return False
        verdict.action = "stopped"
        self._end(row, "content_filter")
        return True

    def _act(self, row: LiveRow, scored: Scored) -> bool:
        """Do what the policy says of a row that fired; return whether it was ended."""
        policy, verdict = self.settings.policy, row.ask.verdict
        self.metrics.fired.labels(policy, scored.channel).inc()
        if policy == "observe":
            return False
        if policy == "steer":
            row.index, verdict.action = EDITED, "steered"
            self._moved = True
            return False
        if policy == "redraw" and not row.answered and verdict.action is None:
            verdict.action = "redrawn"
            self._redraw(row, scored)
            return True
        verdict.action = "refused" if policy == "refuse" else "stopped"
        refusal = self.settings.refusal if policy == "refuse" else None
        self._end(row, "content_filter", steps=row.ask.fresh(scored), refusal=refusal)
        return True

    def _redraw(self, row: LiveRow, scored: Scored) -> None:
        """End the thinking at the token that fired, and from there on under the edit.

        What was thought is read again as it was; its end and the answer are edited.
        """
        ask = row.ask
        kept, text = row.thought_until(scored.index)
        row.finish, row.is_done = "length", True
        ends_now = replace(ask.sampling, max_thinking=0)
        job = Job(PLAIN, kept, ask.seed, (), self.rules(ends_now))
        again = LiveRow(job, ask, before=len(kept) - len(ask.prompt))
        again.edited = True
        again.watch = self.monitor and self.monitor.open(ask.prompt)
        self._again.append(again)
        ask.box.put(Piece(text, steps=ask.fresh(scored)))

    def _begin(self, row: LiveRow, states: Tensor | None) -> None:
        """Let a watch read a prompt's end; thinking that it holds has fired already."""
        if self.monitor is None or row.watch is None:
            return
        thought = row.job.prompt[len(row.ask.prompt) :]
        if thought:
            batch = pad([row.job.prompt], "right", self.adapter.device)
            again = self.adapter.states(batch)[0, len(row.ask.prompt) :]
            self.monitor.read_many(row.watch, again, thought)
        elif states is not None:
            self.monitor.begin([row.watch], states)
        if row.edited:
            # What it was drawn again for would fire for it once more.
            row.watch.forgive()
            row.index, self._moved = EDITED, True

    def _tell(self, row: LiveRow) -> None:
        """Give a client the last of a row that has ended."""
        if row.finish is None or row.is_done:
            return
        if row.fault is not None:
            self._end(row, failure="fault", why=row.fault)
            return
        text = row.rest()
        self._end(row, row.ended(), text=text)

    def _end(
        self,
        row: LiveRow,
        finish: Finish | None = None,
        *,
        failure: Failure | None = None,
        why: str = "",
        text: Added = NOTHING,
        steps: tuple[Scored, ...] = (),
        refusal: str | None = None,
    ) -> None:
        row.finish, row.is_done = row.finish or "length", True
        usage = row.usage
        self.metrics.tokens.labels("written").inc(usage.written)
        row.ask.box.put(
            Piece(
                text.thinking, text.answer, steps, finish, failure, why, usage, refusal
            )
        )

    def _fail_all(self, failure: Failure) -> None:
        """Tell everybody in the batch, and at the end everybody, that it is over."""
        why = FAILURES[failure]
        rows: list[Any] = list(self._batch.rows) if self._batch is not None else []
        self._batch = None
        for row in (*rows, *self._taken, *self._again):
            if not row.is_done:
                self._end(row, failure=failure, why=why)
        self._taken, self._again = [], []
        if failure != "shutdown":
            return
        with self._there:
            asks, self._waiting = list(self._waiting), deque()
            calls, self._calls = list(self._calls), deque()
        for ask in asks:
            ask.box.put(Piece(failure=failure, why=why))
        for _, future in calls:
            if future.set_running_or_notify_cancel():
                future.set_exception(Busy(why))
