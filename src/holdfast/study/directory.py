"""The study directory: manifest, stage states, resume."""

import datetime
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from holdfast.errors import AdapterError, EvidenceError, InputError
from holdfast.report.progress import Progress
from holdfast.report.text import flatten
from holdfast.study.files import (
    DamagedTableError,
    atomic_write_json,
    atomic_write_table,
    canonical_json,
    file_sha256,
    fingerprint,
    read_table,
    require_place,
    storing,
    try_lock,
)

SCHEMA = "holdfast-study/1"
MANIFEST = "study.json"
PARTS = "parts"
REMEDIES = {
    "rollouts": "Run `holdfast rollout` into this folder first, or `holdfast audit`.",
    "probes": "Run `holdfast probe` on the study first, or `holdfast audit`.",
    "trace": "Run `holdfast trace` on the study first, or `holdfast audit`.",
    "heads": "Run `holdfast heads` on the study: it ranks them, or says why there are "
    "none to rank.",
    "signal": "Run `holdfast signal` on the study first.",
    "detectors": "Run `holdfast guard fit` on the study first.",
    "generations": "Only `holdfast evaluate` writes it. To judge the answers of an "
    "audit anew, run the same `holdfast audit` or `holdfast rollout` with --judge.",
    "evaluation": "Only `holdfast evaluate` writes it; run it with this folder for -o.",
}
"""What to do about a file that is missing, by its stem or the folder it lies in."""
StageState = Literal["done", "redo", "continue"]


@dataclass
class Stage:
    """A stage at work, and what the manifest will say of it when it ends."""

    study: "Study"
    name: str
    state: StageState  # `continue` where an earlier run was interrupted.
    progress: Progress
    outputs: list[str] = field(default_factory=list)  # Files that it has written.
    facts: dict[str, Any] = field(default_factory=dict)  # What else is recorded of it.

    @property
    def is_done(self) -> bool:
        """Whether an earlier run has ended it, on the same settings and inputs."""
        return self.state == "done"

    def write_json(self, name: str, value: dict[str, Any]) -> dict[str, Any]:
        """Write a JSON file as an output of the stage, and return what it holds."""
        self.study.write_json(name, value)
        self.outputs.append(name)
        return value

    def write_table(self, name: str, table: pa.Table) -> None:
        """Write a Parquet file as an output of the stage."""
        self.study.write_table(name, table)
        self.outputs.append(name)

    def read_json(self, name: str) -> dict[str, Any]:
        """Return what a JSON output of an earlier run holds."""
        return dict(self.study.read_json(name))


class Study:
    """One study directory and its manifest.

    Attributes:
        directory: Where the study lies.
        manifest: What `study.json` holds.
    """

    def __init__(self, directory: Path, manifest: dict[str, Any]) -> None:
        """Keep both; callers use `open` or `create`."""
        self.directory = directory
        self.manifest = manifest

    @classmethod
    def create(cls, directory: str | Path) -> "Study":
        """Open the study in a directory, or start one there."""
        directory = Path(directory)
        require_place(directory, folder=True)
        if (directory / MANIFEST).exists():
            return cls.open(directory)
        if directory.exists() and not _is_fresh(directory):
            raise InputError(
                f"a study or an empty folder at {directory}",
                f"{'a folder' if directory.is_dir() else 'a file'} without {MANIFEST}",
                "Name another place with -o.",
            )
        study = cls(directory, {"schema": SCHEMA, "stages": {}})
        study.save()
        return study

    @classmethod
    def open(cls, directory: str | Path) -> "Study":
        """Open a study that exists."""
        path = Path(directory) / MANIFEST
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(
                f"a study at {directory}",
                f"no readable {MANIFEST} there",
                "Make one with `holdfast rollout` or `holdfast audit`, or name its "
                "folder.",
            ) from error
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"JSON in {path}",
                f"a damaged file ({error})",
                "Restore the file, or start again in another folder.",
            ) from error
        if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
            found = manifest.get("schema") if isinstance(manifest, dict) else "a list"
            raise InputError(
                f"a study of schema {SCHEMA}",
                f"{found!r} in {path}",
                "Use the version of holdfast that wrote it, or start another study.",
            )
        return cls(Path(directory), manifest)

    def path(self, name: str) -> Path:
        """Return where a file of the study lies."""
        return self.directory / name

    def save(self) -> None:
        """Write the manifest."""
        atomic_write_json(self.path(MANIFEST), self.manifest)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes from working on this study meanwhile.

        The lock goes with the process, so a killed run leaves none behind. What a
        killed run left half-written is removed.
        """
        with storing(self.directory):
            handle = self.path(".lock").open("wb")
        with handle:
            if not try_lock(handle):
                raise InputError(
                    f"nobody else at work on {self.directory}",
                    "another holdfast process that holds its lock",
                    "Wait for it, or name another study with -o.",
                )
            for leftover in self.directory.rglob(".*.tmp"):
                leftover.unlink(missing_ok=True)
            yield

    def require(self, name: str) -> Path:
        """Return where a file lies that an earlier stage has written."""
        path = self.path(name)
        if not path.exists():
            raise InputError(
                f"{name} in {self.directory}",
                "no such file",
                REMEDIES.get(path.stem)
                or REMEDIES.get(Path(name).parent.name)
                or "Run the earlier stages first; `holdfast audit` runs them all.",
            )
        return path

    def input_hash(self, name: str) -> str:
        """Return the hash of a file that an earlier stage has written."""
        return file_sha256(self.require(name))

    @contextmanager
    def stage(
        self,
        name: str,
        settings: Any,
        inputs: Mapping[str, str] | Iterable[str],
        *,
        progress: Progress,
        done: str,
        parts: Sequence[str] = (),
    ) -> Iterator[Stage]:
        """Open a stage; when the context ends well it is recorded as done.

        ```python
        with study.stage(
            "trace",
            settings,
            ["rollouts.parquet"],
            progress=session.progress,
            done="The traces are there and up to date.",
        ) as stage:
            if stage.is_done:
                return stage.read_json("trace.json")
            batches = Batches(stage, session.batch_size)
            table = batches.run(
                rows, work, name=..., length=..., label="Tracing"
            )
            stage.write_table("trace.parquet", table)
            return stage.write_json("trace.json", summary(table))
        ```

        After an error the batches on disk stay, so that the next run goes on with
        them; a lack of evidence, or a model that is not good for the stage, is recorded
        as the reason why there is no result. A stage that can give none, by a reason,
        says it in `stage.facts["reason"]` and ends without outputs.

        `inputs`: Names of files of the study, which are hashed; or hashes by name.
        `done`: Told where an earlier run has written all outputs.
        `parts`: Patterns of further folders of batches, which go with the stage's own.
        """
        if not isinstance(inputs, Mapping):
            inputs = {each: self.input_hash(each) for each in inputs}
        replaced = self._replaced(name, settings, inputs)
        if replaced:
            progress.say(replaced)
        state, _ = self.begin(name, settings, inputs)
        record = self.manifest["stages"][name]
        if state == "done":
            if record["outputs"]:
                progress.say(done)
        elif state == "continue":
            progress.say("Going on where the last run stopped.")
        else:
            self._clear_further(parts)
        stage = Stage(self, name, state, progress)
        try:
            yield stage
        except (EvidenceError, AdapterError) as error:
            record["reason"] = str(error)
            self.save()
            raise
        if not stage.is_done:
            record.pop("reason", None)
            self.finish(name, stage.outputs, **stage.facts)
            self._clear_further(parts)

    def _replaced(self, name: str, settings: Any, inputs: Mapping[str, str]) -> str:
        """Say what other settings are about to replace, and how to keep it; or ""."""
        record = self.record(name)
        outputs = [
            each for each in record.get("outputs", ()) if self.path(each).exists()
        ]
        if not outputs and not self.parts(name):
            return ""
        asked = json.loads(canonical_json(settings))
        before, now = (dict(flatten(each)) for each in (record["settings"], asked))
        changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        # A file of the study was made anew, and that was told where it was.
        changed += [
            key
            for key, known in record["inputs"].items()
            if inputs.get(key) != known and not self.path(key).exists()
        ]
        if not changed:
            return ""
        what = ", ".join(outputs) if outputs else "what an interrupted run has drawn"
        return (
            f"Replacing {what}: the stage `{name}` was run with other settings "
            f"({', '.join(changed)}). To keep both, stop here, and give another study "
            "or a copy of this one."
        )

    def _clear_further(self, parts: Iterable[str]) -> None:
        for pattern in parts:
            for folder in self.path(PARTS).glob(pattern):
                self.clear_parts(folder.name)

    def state(
        self, name: str, settings: Any, inputs: Mapping[str, str]
    ) -> tuple[StageState, str]:
        """Return whether a stage is done, and its key.

        A stage is keyed by the fingerprint of its settings and inputs.

        Returns: `done`, `continue` (interrupted before) or `redo`, and the fingerprint.
        """
        key = fingerprint({"stage": name, "settings": settings, "inputs": dict(inputs)})
        record = self.record(name)
        if record.get("fingerprint") != key:
            return "redo", key
        if record.get("state") != "done":
            return "continue", key
        outputs = record.get("outputs", [])
        written = all(self.path(output).exists() for output in outputs)
        return ("done" if written else "redo"), key

    def reopen(self, name: str) -> None:
        """Take back that a stage is done, before its outputs are written over."""
        if name in self.manifest["stages"]:
            self.manifest["stages"][name]["state"] = "running"
            self.save()

    def begin(
        self, name: str, settings: Any, inputs: Mapping[str, str]
    ) -> tuple[StageState, str]:
        """Return what `state` does, and mark the stage as begun if it is not done.

        Where its key has changed its parts are thrown away; where it was interrupted
        they stay.
        """
        state, key = self.state(name, settings, inputs)
        if state != "redo":
            return state, key
        self.clear_parts(name)
        before = self.record(name)
        former = {*before.get("outputs", ()), *before.get("former", ())}
        self.manifest["stages"][name] = {
            "state": "running",
            "fingerprint": key,
            "settings": json.loads(canonical_json(settings)),
            "inputs": dict(inputs),
            "started": _now(),
        } | ({"former": sorted(former)} if former else {})
        self.save()
        return "redo", key

    def finish(self, name: str, outputs: Sequence[str], **facts: Any) -> None:
        """Mark a stage as done and drop its parts, and files of other settings.

        `outputs`: The files it has written; without them it is not done.
        """
        record = self.manifest["stages"][name]
        # What earlier settings wrote and these do not is no part of the study now.
        stale = {*record.pop("former", ())}.difference(outputs)
        for row in self.manifest["stages"].values():
            stale -= {*row.get("outputs", ()), *row.get("former", ())}
        for each in stale:
            self.path(each).unlink(missing_ok=True)
        record.update(state="done", outputs=list(outputs), finished=_now(), **facts)
        self.save()
        self.clear_parts(name)

    def record(self, name: str) -> dict[str, Any]:
        """Return what the manifest says of a stage; empty where it never began."""
        found = self.manifest["stages"].get(name, {})
        return dict(found)

    def part(self, stage: str, key: str, suffix: str) -> Path:
        """Return where one batch of an unfinished stage lies, or will lie."""
        return self.directory / PARTS / stage / f"{key}{suffix}"

    def parts(self, stage: str) -> list[Path]:
        """Return the batches of an unfinished stage that are on disk."""
        return sorted((self.directory / PARTS / stage).glob("*.parquet"))

    def clear_parts(self, stage: str) -> None:
        """Remove the batches of a stage."""
        folder = self.directory / PARTS / stage
        with storing(folder):
            for path in sorted(folder.glob("*")):
                path.unlink()
            for empty in (folder, folder.parent):
                if empty.is_dir() and not any(empty.iterdir()):
                    empty.rmdir()

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file of the study."""
        atomic_write_json(self.path(name), value)

    def read_json(self, name: str) -> Any:
        """Read a JSON file of the study."""
        self.input_hash(name)
        try:
            return json.loads(self.path(name).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"JSON in {self.path(name)}",
                f"a damaged file ({error})",
                "Remove it and run its stage again.",
            ) from error

    def write_table(self, name: str, table: pa.Table) -> None:
        """Write a Parquet file of the study."""
        atomic_write_table(self.path(name), table)

    def read_table(self, name: str) -> pa.Table:
        """Read a Parquet file of the study."""
        self.input_hash(name)
        try:
            return read_table(self.path(name))
        except DamagedTableError as error:
            raise InputError(
                f"a Parquet table in {self.path(name)}",
                f"a damaged file ({error})",
                "Remove it and run its stage again.",
            ) from error


def _is_fresh(directory: Path) -> bool:
    """Return whether a directory holds nothing but what a killed start left."""
    return directory.is_dir() and all(
        path.name.endswith(".tmp") for path in directory.iterdir()
    )


def _now() -> str:
    """Return the time, in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def is_current(study: Study, stage: str) -> bool:
    """Return whether a stage is done, on the files that the study holds now."""
    record = study.record(stage)
    if record.get("state") != "done":
        return False
    written = all(study.path(name).exists() for name in record["outputs"])
    return written and all(
        study.path(name).exists() and study.input_hash(name) == known
        for name, known in record["inputs"].items()
    )
