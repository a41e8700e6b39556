"""An engine behind HTTP: any OpenAI-shaped server that holds the model.

Requests run in threads; every token is replayed in the thread of the caller. A row is
kept on disk as soon as it has ended, so that a run that was killed asks again for
what was under way and for no more.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from holdfast.data.served import Served
from holdfast.engines.http import Again, HttpClient, Reach, Stopped, require_url
from holdfast.engines.journal import Journal
from holdfast.engines.port import PLAINLY, Around, Ask
from holdfast.engines.replies import (
    Sent,
    UnansweredError,
    completion_of_text,
    encode,
    is_text_of,
    sent_of,
    survives,
    tokenised,
    tokenises_apart,
    understood,
    within_limits,
)
from holdfast.engines.rounds import SEEDS, AskedRow, Round, Said, rows_of
from holdfast.engines.settings import EngineSettings
from holdfast.engines.wire import (
    Speech,
    Wire,
    choose_model,
    find_wire,
    json_of,
    other_prompt,
    served_models,
)
from holdfast.errors import EndpointError, EngineError, SettingsError
from holdfast.models.decoding.generate import row_states
from holdfast.models.decoding.row_state import Completion, Sampling
from holdfast.models.model import Adapter
from holdfast.models.stops import find_stops
from holdfast.report.progress import Tick
from holdfast.study import fingerprint

BATCH = 8
"""How many times as many rows as requests are asked for together."""
WITHHELD = "withheld"
FEW = 3
"""Rows of a batch that may fail before it is asked whether most of them do."""


class Posted(NamedTuple):
    """A question as it is sent."""

    path: str
    body: dict[str, Any]


@dataclass
class CompletedRow:
    """A row that is asked for in rounds, as prompts that go on."""

    speech: Speech
    wire: Wire
    ask: Ask
    row: AskedRow
    sampling: Sampling
    model: str | None
    index: int
    apart: bool  # Whether a text is tokenised again region by region.
    asked: Round | None = None

    def next(self) -> Posted | None:
        """Return the next round."""
        self.asked = self.row.next()
        if self.asked is None:
            return None
        sent = self.speech.completion(self.wire, self.asked, self.sampling, self.model)
        return Posted(*sent)

    def take(self, sent: Sent) -> None:
        """Replay what was drawn."""
        asked, tokenizer = self.asked, self.speech.adapter.tokenizer
        assert asked is not None
        why = other_prompt(self.speech, self.wire, self.ask, sent, asked)
        if why is not None:
            raise UnansweredError(why)
        text, ids = sent.text or "", sent.token_ids
        if ids is None:
            fmt = self.speech.adapter.thinking
            ids = tokenised(tokenizer, fmt, text, apart=self.apart)
            whole = self.row.tokens != "lost" and survives(tokenizer, text)
            self.row.tokens = "text" if whole else "lost"
        elif not is_text_of(tokenizer, ids, text):
            raise UnansweredError("token ids of another vocabulary than its text")
        finish = sent.finish or ("length" if len(ids) >= asked.limit else "stop")
        try:
            self.row.take(Said(ids, finish))
        except EngineError as error:
            raise UnansweredError(error.found) from error

    def complete(self) -> Completion:
        """Return the row."""
        return self.row.complete()


@dataclass
class ChatRow:
    """A row that is asked for once, as a chat that the server renders itself."""

    speech: Speech
    wire: Wire
    ask: Ask
    sampling: Sampling
    limit: int
    index: int
    apart: bool
    sent: Sent | None = None

    def next(self) -> Posted | None:
        """Return the one question."""
        if self.sent is not None:
            return None
        seed = self.ask.seed % SEEDS
        return Posted(
            *self.speech.chat(self.wire, self.ask, self.sampling, self.limit, seed)
        )

    def take(self, sent: Sent) -> None:
        """Keep what was sent, if it answers the prompt that was meant."""
        adapter = self.speech.adapter
        why = other_prompt(self.speech, self.wire, self.ask, sent)
        if why is not None:
            raise UnansweredError(why)
        if adapter.thinking is None and sent.reasoning:
            raise UnansweredError(
                f"thinking in `{sent.field}`, though the model does not think here"
            )
        self.sent = sent

    def complete(self) -> Completion:
        """Return the row, whose texts are tokenised again."""
        sent, adapter = self.sent, self.speech.adapter
        assert sent is not None
        tokenizer, thinking = adapter.tokenizer, adapter.thinking
        text = understood(
            Served(sent.text, sent.reasoning, sent.field, sent.finish),
            thinking,
            # Thinking that was cut may stand where an answer would: how it ended tells.
            bare_answers=thinking is None or sent.finish != "length",
            place=f"row {self.index}",
        )
        limits = self.sampling.max_thinking, self.sampling.max_answer
        ids = self.ask.token_ids
        whole, text = within_limits(
            text, tokenizer, thinking, ids, limits, apart=self.apart
        )
        return completion_of_text(tokenizer, thinking, whole, text, self.index)


ServedRow = CompletedRow | ChatRow
"""A row on its way: `next` is what to send, `take` takes what came."""


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
        keys = {row.index: self._key(row, around) for row in rows}
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
            self._require_chat(around)
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
            CompletedRow(
                speech, wire, ask, row, sampling, around.condition, place, self.apart
            )
            for place, (ask, row) in enumerate(
                zip(asks, rows_of(states, seeds, close, end), strict=True)
            )
        ]

    def _require_chat(self, around: Around) -> None:
        if around.thinking_done or around.condition is not None:
            raise SettingsError(
                "a server that goes on with a prompt of ours, for answers behind a "
                "given thinking and for adapters",
                f"one that takes chats alone at {self.http.url}",
                "Use --engine hf, or a server with an endpoint of completions.",
            )

    def _key(self, row: ServedRow, around: Around) -> str:
        posted = row.next()
        assert posted is not None
        return fingerprint({"posted": posted._asdict(), "adapter": around.condition})

    def _is_up(self) -> bool:
        try:
            served_models(self.http)
        except EndpointError:
            return False
        return True


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


@dataclass
class Asking:
    """Rows on their way to a server and back."""

    http: HttpClient
    rows: Sequence[ServedRow]
    around: Around
    done: Callable[[ServedRow, Sequence[Sent]], None]  # Told of a row that has ended.
    is_up: Callable[[], bool]  # Whether the server is there at all.
    failed: dict[int, str] = field(default_factory=dict)  # Rows without an answer.

    def run(self, concurrency: int) -> None:
        """Ask for all rows.

        Raises:
            EndpointError: If the server is down, or answers less than half of them.
        """
        pool = ThreadPoolExecutor(concurrency)
        going: dict[Future[Sent], ServedRow] = {}
        history: dict[int, list[Sent]] = {row.index: [] for row in self.rows}
        waiting = deque(self.rows)

        def go_on(row: ServedRow) -> None:
            posted = row.next()
            if posted is None:
                self.done(row, history.pop(row.index))
            else:
                going[pool.submit(self._ask, posted)] = row

        try:
            while going or waiting:
                # A row that has begun is ended before another begins, so that few are
                # under way at any time.
                while waiting and len(going) < concurrency:
                    go_on(waiting.popleft())
                for future in wait(going, return_when=FIRST_COMPLETED).done:
                    row = going.pop(future)
                    try:
                        sent = future.result()
                        row.take(sent)
                    except UnansweredError as error:
                        self._fail(row, str(error))
                        continue
                    history[row.index].append(sent)
                    go_on(row)
        finally:
            # Questions that nobody has asked yet are not asked after an error.
            self.http.stop()
            pool.shutdown(wait=True, cancel_futures=True)
            self.http.resume()

    def _fail(self, row: ServedRow, why: str) -> None:
        self.failed[row.index] = why
        if self.around.failed is not None:
            self.around.failed(row.index, why)
        most = max(FEW, len(self.rows) // 2)
        if self.around.failed is None or len(self.failed) > most:
            raise EndpointError(
                f"answers of the server at {self.http.url}",
                f"none to {len(self.failed)} of {len(self.rows)} rows, such as: {why}",
                "Read the server's words and its log, then run the same command again: "
                "what was drawn is kept.",
            )

    def _ask(self, posted: Posted) -> Sent:
        """Ask until there is an answer, or it is clear that there will be none."""
        reasons: list[str] = []

        def attempt() -> Sent | Again:
            if self.http.is_stopped:
                raise Stopped("a run that goes on", "a stopped one", "Run it again.")
            response = self.http.send(posted.path, posted.body)
            if not isinstance(response, Again):
                try:
                    return _sent(self.http, response)
                except UnansweredError as error:
                    # What a server withholds it withholds again.
                    if response.status_code != 200 or WITHHELD in str(error):
                        raise
                    response = Again(f"status 200 with an error inside: {error}")
            reasons.append(response.reason)
            return response

        url, key = self.http.url, fingerprint(posted.body)
        what, kept = f"an answer of the server at {url}", "what was drawn is kept."
        try:
            return self.http.insist(attempt, key, what, kept)
        except Stopped:
            raise
        except EndpointError as error:
            if reasons and self.is_up():
                raise UnansweredError(error.found) from error
            raise


def _sent(http: HttpClient, response: Any) -> Sent:
    status = response.status_code
    if status in (401, 403, 404):
        raise EndpointError(
            f"an answer of the server at {http.url}",
            f"status {status}: {http.words(response)}",
            "Check the URL, the name of the model and the key.",
        )
    if status != 200:
        raise UnansweredError(f"status {status}: {http.words(response)}")
    return sent_of(json_of(response))
