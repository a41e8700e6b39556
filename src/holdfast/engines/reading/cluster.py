"""Work spread over processes and machines by Ray Data, which does the scheduling.

A worker is a class that is made once in each process and called with one item after
another. Ray tries an item of a process that died again, in another one; what a worker
says may come in any order. Items are numbers and answers are texts: neither rows nor
weights go through Ray.
"""

import logging
import os
import secrets
import socket
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from holdfast.errors import EnvironmentProblem, SettingsError

RETRIES = 3
"""How often an item is tried again whose worker died; Ray's own default is for ever."""
CONNECT = 5.0
"""Seconds in which a cluster has to answer."""
STORE = 128 << 20
"""Bytes of shared memory for Ray on this machine; it holds only numbers and texts."""
LOCAL = {
    # Otherwise Ray turns the loopback address into the machine's own and listens there.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
}
SILENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Its warnings are of its own inside; what ends a run is raised.
    "RAY_BACKEND_LOG_LEVEL": "fatal",
}
ITEM, SAID, RAISED = "item", "said", "raised"


@dataclass(frozen=True)
class Crew:
    """How many workers there are, and where."""

    workers: int  # Processes, each with a model of its own.
    # Of a Ray cluster that runs, "auto" for the one of this machine; None to start Ray
    # on this machine for as long as the work lasts.
    address: str | None = None
    gpu: bool = False  # Whether each has a GPU of its own.


class Share:
    """What a worker has of its machine."""

    def __init__(self, ray: Any, crew: Crew) -> None:
        """Divide the machines among the workers.

        Raises:
            SettingsError: If there are fewer processors or GPUs than workers: Ray would
                wait for more, without an end.
        """
        nodes = [each["Resources"] for each in ray.nodes() if each["Alive"]]
        for kind, wanted in (("CPU", True), ("GPU", crew.gpu)):
            there = int(sum(each.get(kind, 0) for each in nodes))
            if wanted and there < crew.workers:
                raise SettingsError(
                    f"a {kind} for each of {crew.workers} --workers",
                    f"{there} in the whole cluster",
                    f"Lower --workers to {there}, or add machines.",
                )
        least = min(int(each.get("CPU", 0)) for each in nodes)
        if crew.address is None and not crew.gpu:
            least = os.cpu_count() or 1
        self.threads = max(1, least // -(-crew.workers // len(nodes)))
        self.cpus = 1 if crew.address is None or crew.gpu else self.threads
        self.gpus = 1 if crew.gpu else None


@contextmanager
def cluster(crew: Crew) -> Iterator[tuple[Any, Share]]:
    """Start Ray on this machine, or join a cluster, for as long as the context lasts.

    What is started here listens on loopback alone, has no dashboard and reports to
    nobody. A Ray that the caller has started is used as it is, and left running.

    Raises:
        EnvironmentProblem: If Ray is not installed, or does not start.
        SettingsError: If there are more workers than the cluster has room for.
    """
    ray = require_ray(crew.address)
    if ray.is_initialized():
        yield ray, Share(ray, crew)
        return
    try:
        _start(ray, crew)
        yield ray, Share(ray, crew)
    finally:
        ray.shutdown()


def spread(
    worker: type,
    arguments: Mapping[str, Any],
    items: Sequence[int],
    ray: Any,
    share: Share,
    crew: Crew,
) -> Iterator[str]:
    """Have every item worked on once, and yield what was said of it, as it is done.

    `worker`: Made with `arguments` in each process; called with `{"item": numbers}`, it
    returns `{"said": texts}`. It says at once what is done already: a worker may die
    between the work and the saying.

    Raises:
        EnvironmentProblem: If workers die again and again, or Ray lost an item.
    """
    context = ray.data.DataContext.get_current()
    # A block that failed would be left out with a line in a log.
    context.max_errored_blocks = 0
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    given = [{ITEM: item} for item in items]
    with warnings.catch_warnings():
        # Ray will name these two options otherwise from 2.64 on.
        warnings.simplefilter("ignore")
        answers = ray.data.from_items(
            given, override_num_blocks=len(given)
        ).map_batches(
            _Guarded,
            batch_size=1,
            fn_constructor_args=(worker, dict(arguments)),
            compute=ray.data.ActorPoolStrategy(
                size=min(crew.workers, len(items)), max_tasks_in_flight_per_actor=2
            ),
            num_cpus=share.cpus,
            num_gpus=share.gpus,
            max_restarts=-1,
            max_task_retries=RETRIES,
        )
    n_said = 0
    try:
        for answer in answers.iter_rows():
            n_said += 1
            if answer[RAISED]:
                raise _ended(answer[RAISED])
            yield answer[SAID]
    except ray.exceptions.RayError as error:
        raise _ended(_told(error)) from error
    if n_said != len(items):
        raise EnvironmentProblem(
            f"an answer to each of {len(items)} items",
            f"{n_said}",
            "Run the command again: what is finished is kept.",
        )


class _Guarded:
    """A worker whose exceptions are answers: in Ray's own they are hard to find."""

    def __init__(self, worker: type, arguments: dict[str, Any]) -> None:
        self._fault, self._worker = "", None
        try:
            self._worker = worker(**arguments)
        except Exception as error:
            self._fault = _told(error)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        said, fault = [""] * len(batch[ITEM]), self._fault
        if self._worker is not None:
            try:
                said = list(self._worker(batch)[SAID])
            except Exception as error:
                fault = _told(error)
        given = {SAID: said, RAISED: [fault] * len(said)}
        return {name: np.array(texts, dtype=object) for name, texts in given.items()}


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _ended(found: str) -> EnvironmentProblem:
    return EnvironmentProblem(
        "workers that do their work, and die no more than now and then",
        found,
        "Where memory ran out, use fewer --workers or a smaller --batch-size. "
        "What is finished is kept.",
    )


def require_ray(address: str | None) -> Any:
    """Import Ray, told beforehand to keep to itself.

    Raises:
        EnvironmentProblem: If it is not installed.
    """
    local = LOCAL if address is None else {}
    for name, value in (SILENT | local).items():
        os.environ.setdefault(name, value)
    if local:
        # Or Ray would write one into the user's home.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise EnvironmentProblem(
            "the package ray, for more than one of --workers",
            f"that it cannot be imported ({error})",
            "Install it in the folder of Holdfast: `pip install '.[ray]'`.",
        ) from error
    return ray


def _start(ray: Any, crew: Crew) -> None:
    options: dict[str, Any] = {
        "address": crew.address or "local",
        "log_to_driver": False,
        "logging_level": logging.ERROR,
    }
    if crew.address is None:
        options |= {"num_cpus": crew.workers, "object_store_memory": STORE}
        options |= {"include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    try:
        if crew.address not in (None, "auto"):
            # Ray itself would try for a minute and a half.
            host, _, port = str(crew.address).rpartition(":")
            socket.create_connection((host, int(port)), CONNECT).close()
        ray.init(**options)
    # Whatever it stumbles on: no cluster, no room, no permission, another version.
    except Exception as error:
        where = f"at {crew.address}" if crew.address else "on this machine"
        raise EnvironmentProblem(
            f"Ray {where}",
            _told(error),
            "Start the cluster, name its address with --ray, or leave out --workers.",
        ) from error
    if crew.address is None:
        found = ray.util.get_node_ip_address()
        if found != "127.0.0.1":
            raise EnvironmentProblem(
                "a Ray that listens on loopback alone",
                f"one that listens on {found}, having been imported before",
                "Import Ray after Holdfast, or start a cluster and name it with --ray.",
            )
