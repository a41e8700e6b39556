"""What a server has answered, row by row on disk, until their batch is done."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TextIO

from holdfast.engines.serving.replies import Sent
from holdfast.study.files import storing


class Journal:
    """A file of one line per row that has ended; lines are added, none is changed."""

    def __init__(self, path: Path | None) -> None:
        """Read what an earlier run has kept.

        `path`: The file, beside those of other batches, since a run with another
        concurrency has other batches; None to keep nothing.
        """
        self.path = path
        self._known: dict[str, list[Sent]] = {}
        self._file: TextIO | None = None
        files = [] if path is None else sorted(path.parent.glob(f"*{path.suffix}"))
        for line in b"\n".join(each.read_bytes() for each in files).split(b"\n"):
            try:
                row = json.loads(line)
                self._known[row["row"]] = [_sent(each) for each in row["sent"]]
            except (ValueError, TypeError, LookupError):
                # The last line of a run that was killed may be half a line.
                continue

    def known(self, row: str) -> list[Sent]:
        """Return what was sent for a row; nothing where it has not ended."""
        return self._known.get(row, [])

    def keep(self, row: str, sent: Sequence[Sent]) -> None:
        """Add a row that has ended."""
        if self._file is None:
            return
        line = json.dumps({"row": row, "sent": [each._asdict() for each in sent]})
        # A line break in front: behind half a line it begins a new one.
        self._file.write(f"\n{line}")
        self._file.flush()

    def __enter__(self) -> "Journal":
        """Open the file."""
        if self.path is not None:
            with storing(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self.path.open("a", encoding="ascii")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _sent(record: dict[str, object]) -> Sent:
    lists = {
        name: tuple(value) for name, value in record.items() if isinstance(value, list)
    }
    return Sent(**{**record, **lists})  # type: ignore[arg-type]
