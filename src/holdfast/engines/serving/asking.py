"""Asking a server for many rows at once, each until it has ended or nobody answers."""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

from holdfast.engines.http import Again, HttpClient, Stopped
from holdfast.engines.port import Around
from holdfast.engines.serving.replies import (
    Sent,
    UnansweredError,
    sent_of,
)
from holdfast.engines.serving.rows import Posted, ServedRow
from holdfast.engines.serving.wire import (
    json_of,
)
from holdfast.errors import EndpointError
from holdfast.study import fingerprint

WITHHELD = "withheld"
FEW = 3
"""Rows of a batch that may fail before it is asked whether most of them do."""


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
