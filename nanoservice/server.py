"""The life of a service: read the settings, listen, get ready, serve, drain, stop."""

import asyncio
import gc
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Self

from aiohttp import web

from nanoservice import logs
from nanoservice.config import table
from nanoservice.connection import ConnectionFactory
from nanoservice.errors import ConfigError, StartError
from nanoservice.listen import BACKLOG, bind, inherited_socket
from nanoservice.metrics import REGISTRY, RequestRecorder, admin_app
from nanoservice.probes import READINESS
from nanoservice.service import C, Service, create_app

# In a cluster a shutdown takes at most 16 s: 5 to drain (DRAIN_SECONDS), 10 to finish requests and 1 to close. Kubernetes allows
# 30 s (terminationGracePeriodSeconds).
FINISH_SECONDS = 10.0
_CLOSE_SECONDS = 1.0

_STOP_SIGNALS = signal.SIGTERM, signal.SIGINT

# accept() calls per wake-up of asyncio's loop. `ConnectionFactory.full` counts only afterwards, so this must stay below
# `_SPARE_DESCRIPTORS`.
_ACCEPTS_PER_WAKEUP = 16
_DATA_FOLDER = Path(".data")  # The embedded Valkey of each service keeps its data in a folder of its own here.

_logger = logging.getLogger(__name__)


def main(service: Service[C], environ: Mapping[str, str], arguments: list[str]) -> int:
    """Run `service` until a signal arrives, and return the exit status.

    The status is 0 after a graceful shutdown or for `--help`, 78 for bad settings, 64 for any other argument, 1 if the service
    cannot start, and 128 + N if a second signal, number N, cut the shutdown short.
    """
    if arguments:
        print(f"{service.name} takes no arguments; its settings are environment variables:\n\n{table(service.config)}")
        return 0 if arguments in (["--help"], ["-h"]) else os.EX_USAGE
    # Block both signals until `_live` has installed its handlers: a KeyboardInterrupt can be swallowed by an import or a fork,
    # and uvloop drops signals that arrive while its loop is being created.
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        config = service.config.read(environ, [] if environ.get("REDIS_HOST") else _embedded_problems())
        logs.configure(config.log_level, config.log_format)
        with (
            inherited_socket(environ) or bind(config.bind_host, config.bind_port, "BIND_PORT") as public,
            bind(config.bind_host, config.admin_port, "ADMIN_PORT") as admin,
            _embedded_store(service.name, config.redis_host) as store,
        ):
            with asyncio.Runner(loop_factory=_loop_factory()) as runner:
                status = runner.run(_live(service, config, store, public, admin))
                # Closing the loop joins its resolver threads, even those of abandoned look-ups; without DNS that takes 20 s
                # or more. So this timer exits the process. It is a daemon thread, so that no exit waits for the timer itself.
                deadline = threading.Timer(_CLOSE_SECONDS, os._exit, [status])
                deadline.daemon = True
                deadline.start()
            deadline.cancel()
            return status
    except ConfigError as error:
        print("\n".join(f"{service.name}: {problem}" for problem in error.problems), file=sys.stderr)
        return os.EX_CONFIG
    except StartError as error:
        print(f"{service.name}: {error}", file=sys.stderr)
        return 1


async def _live(service: Service[C], config: C, store: str | None, public: socket.socket, admin: socket.socket) -> int:
    """Serve until a signal arrives, shut down in order, and return the exit status."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    stop = asyncio.Event()
    last_signal = 0

    def on_signal(number: int) -> None:
        nonlocal last_signal
        last_signal = number
        if stop.is_set() and task is not None:
            task.cancel()
        stop.set()

    for number in _STOP_SIGNALS:
        loop.add_signal_handler(number, on_signal, number)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)
    running = await Running.start(service, config, public, admin, store)
    try:
        ports = {"port": public.getsockname()[1], "admin_port": admin.getsockname()[1]}
        _logger.info("listening; try: curl http://localhost:%d/", ports["port"], extra=ports)
        gc.collect()
        gc.freeze()  # Objects made during the start are permanent, so the garbage collector can skip them.
        await stop.wait()
        _logger.info("draining", extra={"seconds": config.drain_seconds})
        running.drain()
        await asyncio.sleep(config.drain_seconds)
        await running.close()
    except asyncio.CancelledError:
        _logger.warning("stopped by a second signal: requests in flight were cut off")
        return 128 + last_signal
    _logger.info("stopped")
    return 0


class Running:
    """A running service, with one listening socket for clients and one for metrics."""

    def __init__(self, app: web.Application) -> None:
        self.app = app
        self._factories: list[ConnectionFactory] = []
        self._runners: list[tuple[web.ServerRunner, web.AppRunner]] = []
        self._sweeper = asyncio.create_task(self._sweep())

    @classmethod
    async def start(
        cls, service: Service[C], config: C, public: socket.socket, admin: socket.socket, store: str | None = None
    ) -> Self:
        """Make the service's resources and begin to serve, whether Redis answers or not."""
        asyncio.get_running_loop().set_exception_handler(_on_loop_error)
        running = cls(create_app(service, config, store))
        registry = running.app[REGISTRY]
        recorder = RequestRecorder(registry, _logger)
        await running._serve(running.app, public, recorder)
        await running._serve(admin_app(registry), admin, recorder)
        return running

    async def _serve(self, app: web.Application, sock: socket.socket, recorder: RequestRecorder) -> None:
        # `app_runner` makes and closes the application's resources. `connection_runner` holds the connections, which are
        # instances of the chassis's `Connection`.
        app_runner = web.AppRunner(app)
        await app_runner.setup()
        assert app_runner.server is not None  # setup() has set it.
        self._factories.append(ConnectionFactory(app_runner.server, recorder))
        connection_runner = web.ServerRunner(self._factories[-1], shutdown_timeout=FINISH_SECONDS)
        self._runners.append((connection_runner, app_runner))
        await connection_runner.setup()
        # asyncio uses `backlog` also as the number of accepts per wake-up. Pass the small number here, and set the kernel's
        # queue with listen() below.
        await web.SockSite(connection_runner, sock, backlog=_ACCEPTS_PER_WAKEUP).start()
        sock.listen(BACKLOG)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(1)
            for factory in self._factories:
                factory.close_overdue()

    def drain(self) -> None:
        """Make readiness answer 503, and close each connection after its next answer, but keep serving.

        A pod that is shutting down still receives requests until its address is withdrawn everywhere.
        """
        self.app[READINESS].draining = True
        for factory in self._factories:
            factory.draining = True

    async def close(self) -> None:
        """Stop listening, finish the requests in flight, and close the resources, Redis last."""
        self._sweeper.cancel()
        for runners in zip(*self._runners, strict=True):  # Close all connections first, then all resources.
            await asyncio.gather(*(runner.cleanup() for runner in runners))


def _on_loop_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log exceptions that nobody awaited, except failed DNS look-ups.

    uvloop continues a look-up after the connection attempt that needed it was abandoned. That attempt has already reported the
    failure.
    """
    if not isinstance(context.get("exception"), socket.gaierror):
        loop.default_exception_handler(context)


def _embedded_problems() -> list[str]:
    """Return the problems that prevent the embedded Valkey from running. If Valkey can run, the list is empty."""
    from nanoservice import embedded  # noqa: PLC0415 - only development needs it, so production does not load it

    try:
        embedded.executable()
    except ConfigError as error:
        return error.problems
    return []


def _embedded_store(name: str, host: str) -> AbstractContextManager[str | None]:
    """Return a context that yields the Unix socket of an embedded Valkey for `name`, or None if `host` names a Redis."""
    if host:
        return nullcontext()
    from nanoservice import embedded  # noqa: PLC0415 - only development needs it

    return embedded.valkey(_DATA_FOLDER / name)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return uvloop's loop factory. Where uvloop has no wheel, return None, which means asyncio's own loop."""
    try:
        import uvloop  # noqa: PLC0415 - optional
    except ImportError:
        return None
    return uvloop.new_event_loop
