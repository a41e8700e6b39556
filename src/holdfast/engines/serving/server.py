"""An engine behind HTTP: any OpenAI-shaped server that holds the model.

Requests run in threads; every token is replayed in the thread of the caller. A row is
kept on disk as soon as it has ended, so that a run that was killed asks again for
what was under way and for no more.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from holdfast.engines.http import HttpClient, Reach, require_url
from holdfast.engines.port import PLAINLY, Around, Ask
from holdfast.engines.rounds import rows_of
from holdfast.engines.serving.asking import Asking
from holdfast.engines.serving.journal import Journal
from holdfast.engines.serving.replies import (
    Sent,
    UnansweredError,
    encode,
    tokenises_apart,
)
from holdfast.engines.serving.rows import ChatRow, CompletedRow, ServedRow
from holdfast.engines.serving.wire import (
    Speech,
    Wire,
    choose_model,
    find_wire,
    served_models,
)
from holdfast.engines.settings import EngineSettings
from holdfast.errors import EndpointError, SettingsError
from holdfast.models.decoding.jobs import row_states
from holdfast.models.decoding.row_state import Completion, Sampling
from holdfast.models.model import Adapter
from holdfast.models.stops import find_stops
from holdfast.report.progress import Tick
from holdfast.study import fingerprint

BATCH = 8
"""How many times as many rows as requests are asked for together."""


class ServerEngine:
    """Any OpenAI-shaped server."""

    name = "server"

    def __init__(self, settings: EngineSettings, adapter: Adapter) -> None:
        """Prepare the engine; nothing is asked yet."""
        assert settings.endpoint is not None
        require_url(settings.endpoint, settings.endpoint_api_key_env)
        self.settings, self.adapter = settings, adapter
        self.http = HttpClient(
            Reach(
                settings.endpoint,
                settings.endpoint_api_key_env,
                settings.endpoint_concurrency,
                settings.endpoint_timeout,
                settings.endpoint_attempts,
            )
        )
        self.rows_at_once: int | None = BATCH * settings.endpoint_concurrency
        self._open: tuple[Speech, Wire] | None = None
        self.apart = True
        self._came_back: str | None = None

    def hold(self, adapters: Mapping[str, Path]) -> None:
        """See that the server was started with these adapters, under these names.

        Raises:
            SettingsError: If it was not: it takes none that lie here.
        """
        try:
            known = served_models(self.http)
        except EndpointError:
            # Its rows may be drawn already, and the server gone.
            known = []
        missing = [name for name in adapters if name not in known]
        if missing:
            raise SettingsError(
                f"a server with the adapters {', '.join(sorted(adapters))}",
                f"none of the name {missing[0]} at {self.http.url}",
                "Leave --engine out, so that heads are scaled here; use --engine vllm; "
                "or start the server with adapters of these names.",
            )

    def identity(self) -> dict[str, Any]:
        """Return the name of engine and model; the address may change."""
        return {"engine": self.name, "model": self.settings.endpoint_model}

    def record(self) -> dict[str, Any]:
        """Return how the server was reached, and how it is spoken to."""
        known = {"name": self.name, "url": self.http.url}
        if self._open is None:
            return known | {"model": self.settings.endpoint_model}
        speech, wire = self._open
        known |= {"model": speech.model, **wire.record()}
        return known if wire.told == "ids" else known | {"tokenised": self._came_back}

    def fit_text(self, rows: Sequence[Completion]) -> None:
        """Choose how a text is tokenised again, by rows that the model itself drew."""
        tokenizer, thinking = self.adapter.tokenizer, self.adapter.thinking
        self.apart, same = tokenises_apart(tokenizer, thinking, rows)
        how = "region by region" if self.apart else "whole"
        self._came_back = f"{how}, which gives the model's own tokens back in {same} of"
        self._came_back += f" {len(rows)} rows"

    def open(self, ask: Ask) -> tuple[Speech, Wire]:
        """Find out, once, which model to ask for and how.

        `ask`: A short prompt to try it with.
        """
        if self._open is None:
            model = choose_model(self.http, self.settings.endpoint_model)
            speech = Speech(self.http, model, self.adapter)
            self._open = speech, find_wire(speech, ask)
        return self._open

    def draw(
        self, asks: Sequence[Ask], sampling: Sampling, around: Around = PLAINLY
    ) -> Iterator[list[Completion]]:
        """Complete prompts, all of them under way together as far as that goes."""
        rows = self._rows(asks, sampling, around)
        if not rows:
            return
        journal = Journal(around.kept)
        keys = {row.index: _key(row) for row in rows}
        ended = [row for row in rows if _replayed(row, journal.known(keys[row.index]))]
        _tell(around, ended)
        there = {row.index for row in ended}
        left = [row for row in rows if row.index not in there]

        def done(row: ServedRow, sent: Sequence[Sent]) -> None:
            journal.keep(keys[row.index], sent)
            ended.append(row)
            _tell(around, [row])

        with journal:
            Asking(self.http, left, around, done, self._is_up).run(
                self.settings.endpoint_concurrency
            )
        yield [row.complete() for row in ended]

    def _rows(
        self, asks: Sequence[Ask], sampling: Sampling, around: Around
    ) -> list[ServedRow]:
        """Return the rows to ask for, in the form that the server takes."""
        if not asks:
            return []
        speech, wire = self.open(min(asks, key=lambda ask: len(ask.token_ids)))
        adapter, thinking = self.adapter, self.adapter.thinking
        prompts = [(each.token_ids, each.seed) for each in asks]
        states = row_states(
            adapter, prompts, sampling, thinking_done=around.thinking_done
        )
        if wire.kind == "chat":
            self._require_chat(asks, around)
            limit = sampling.max_answer + (sampling.max_thinking if thinking else 0)
            if thinking is not None:
                limit += len(encode(adapter.tokenizer, thinking.end_template))
            return [
                ChatRow(speech, wire, ask, sampling, limit, place, self.apart)
                for place, ask in enumerate(asks)
            ]
        close = "" if thinking is None or around.thinking_done else thinking.close
        stops = find_stops(adapter.model, adapter.tokenizer, thinking)
        end = min(adapter.stop_ids) if stops.turn_end is None else stops.turn_end
        seeds = [each.seed for each in asks]
        return [
            CompletedRow(speech, wire, ask, row, sampling, place, self.apart)
            for place, (ask, row) in enumerate(
                zip(asks, rows_of(states, seeds, close, end), strict=True)
            )
        ]

    def _require_chat(self, asks: Sequence[Ask], around: Around) -> None:
        if around.thinking_done or any(each.condition for each in asks):
            raise SettingsError(
                "a server that goes on with a prompt of ours, for answers behind a "
                "given thinking and for adapters",
                f"one that takes chats alone at {self.http.url}",
                "Use --engine hf, or a server with an endpoint of completions.",
            )

    def _is_up(self) -> bool:
        try:
            served_models(self.http)
        except EndpointError:
            return False
        return True


def _key(row: ServedRow) -> str:
    """Return the name of a row: all that its first question holds."""
    posted = row.next()
    assert posted is not None
    return fingerprint(posted._asdict())


def _replayed(row: ServedRow, kept: Sequence[Sent]) -> bool:
    """Return whether what was kept of a row makes it whole."""
    try:
        for sent in kept:
            if row.next() is None:
                break
            row.take(sent)
    except UnansweredError:
        return False
    return bool(kept) and row.next() is None


def _tell(around: Around, rows: Sequence[ServedRow]) -> None:
    if around.told is None:
        return
    for row in rows:
        made = row.complete()
        written = len(made.token_ids) - made.spans.prompt[1]
        around.told(Tick(1, written, 0, is_prompt=False))
