"""`holdfast guard serve`: load, check, listen, and go down in order."""

import asyncio
import gc
import logging
import math
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import uvicorn

from holdfast.errors import EnvironmentProblem, SettingsError
from holdfast.guard.monitor.bundle import Bundle, read_bundle, require_match, serving_of
from holdfast.guard.monitor.control import require_policy
from holdfast.guard.monitor.monitor import Monitor
from holdfast.guard.serve.batch import Batcher
from holdfast.guard.serve.chat import Desk
from holdfast.guard.serve.settings import ServeSettings
from holdfast.guard.serve.telemetry import Metrics, log, start_log
from holdfast.guard.serve.upstream import Passage, check_upstream
from holdfast.guard.serve.web.app import Server, build
from holdfast.guard.serve.web.gate import read_keys
from holdfast.models.decoding.reader import Reader
from holdfast.models.model import Adapter
from holdfast.rollout.session import Session

LOG = logging.getLogger("holdfast.serve")
GRACE = 5
"""Seconds beyond the drain in which those that were cut off are told."""


def run(settings: ServeSettings, session: Session) -> dict[str, str]:
    """Serve a model until a signal ends it.

    Raises:
        InputError: If there is no bundle, it is of another model, or a key is none.
        SettingsError: If it is stale, has no thresholds for the rate or no edit to
            steer with, or others would reach the server without a key.
        EnvironmentProblem: If the address cannot be listened on.
    """
    keys = read_keys(settings)
    bundle = None if settings.guard is None else read_bundle(settings.guard)
    with listening(settings) as bound:
        adapter = session.adapter
        stale = [] if bundle is None else _stale(bundle, adapter, settings)
        server = make_server(settings, session, bundle, keys, tuple(stale))
        listener = start_log()
        try:
            asyncio.run(_serve(server, bound))
        finally:
            server.batcher.stop()
            log(LOG, "stopped")
            listener.stop()
    return {"model": server.name}


def make_server(
    settings: ServeSettings,
    session: Session,
    bundle: Bundle | None,
    keys: tuple[bytes, ...],
    stale: tuple[str, ...],
) -> Server:
    """Return what routes share."""
    adapter, metrics = session.adapter, Metrics()
    monitor = None if bundle is None else Monitor(adapter, bundle, settings.rate)
    if monitor is not None:
        require_policy(monitor, settings.policy)
    batcher = Batcher(adapter, monitor, settings, metrics, session.batch_size)
    desk = Desk(adapter, monitor, settings)
    server = Server(
        settings,
        settings.name or session.name,
        keys,
        desk,
        batcher,
        monitor,
        metrics,
        stale,
    )
    if settings.upstream is not None:
        assert monitor is not None
        Reader(adapter)
        template = check_upstream(settings, desk)
        session.progress.say(f"The upstream's template: {template}.")
        server.passage = Passage(settings, desk, monitor, metrics, stale)
    return server


def _stale(bundle: Bundle, adapter: Adapter, settings: ServeSettings) -> list[str]:
    """Return what thresholds were not set on, and refuse it unless it is accepted."""
    own = serving_of(adapter, bundle.serving.temperature, bundle.serving.top_p)
    # Who writes behind an upstream is not known here; its calibration says.
    engine = bundle.serving.engine if settings.upstream else own.engine
    found = require_match(bundle, adapter, own._replace(engine=engine))
    if found and not settings.accept_stale:
        raise SettingsError(
            "a bundle whose thresholds were set as this model is served",
            " ".join(found).removesuffix("."),
            "Calibrate it anew, or start with --accept-stale: every verdict says so.",
        )
    return found


@contextmanager
def listening(settings: ServeSettings) -> Iterator[socket.socket]:
    """Bind the address before a model is loaded: one that is taken is told at once."""
    with ExitStack() as stack:
        try:
            found = socket.getaddrinfo(
                settings.host, settings.port, type=socket.SOCK_STREAM
            )
            family, kind, protocol, _, address = found[0]
            bound = stack.enter_context(socket.socket(family, kind, protocol))
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except (OSError, OverflowError) as error:
            raise EnvironmentProblem(
                f"the address {settings.host} port {settings.port} to listen on",
                str(error),
                "Choose another with --host and --port; --port 0 takes any that is "
                "free.",
            ) from error
        yield bound


async def _serve(server: Server, bound: socket.socket) -> None:
    settings = server.settings
    config = uvicorn.Config(
        build(server),
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=2048,
        timeout_keep_alive=30,
        # Who is cut off by then is told so first.
        timeout_graceful_shutdown=math.ceil(settings.drain) + GRACE,
        lifespan="off",
        ws="none",
    )
    listener = Listener(config)
    loop = asyncio.get_running_loop()

    def drain(sign: signal.Signals) -> None:
        # A second signal does not wait for anybody.
        listener.force_exit = listener.should_exit
        listener.should_exit, server.is_ready = True, False
        loop.call_later(settings.drain, loop.run_in_executor, None, server.batcher.stop)
        log(LOG, "drain", signal=sign.name, running=server.batcher.n_running)

    for sign in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(sign, drain, sign)
    # What is loaded by now lives as long as the server. Left among what is looked
    # through, it makes full collections rare and slow, and answers that have ended, in
    # which row and text know each other, pile up between them.
    gc.collect()
    gc.freeze()
    server.batcher.start()
    host, port, *_ = bound.getsockname()
    server.is_ready = True
    log(
        LOG,
        "listening",
        f"http://{f'[{host}]' if ':' in host else host}:{port}",
        host=host,
        port=port,
        model=server.name,
        policy=settings.policy if server.monitor is not None else None,
        keys=len(server.keys),
        stale=list(server.stale),
    )
    try:
        await listener.serve(sockets=[bound])
    finally:
        if server.passage is not None:
            await server.passage.client.aclose()


class Listener(uvicorn.Server):
    """Uvicorn without its own way with signals, which ends in one."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to the server."""
        yield
