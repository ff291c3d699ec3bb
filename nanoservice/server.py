"""The life of a service: read the settings, listen, get ready, serve, drain, stop."""

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self, cast

from aiohttp import web
from prometheus_client import CollectorRegistry, Histogram

from nanoservice import logs
from nanoservice.bounds import ADMIN_CONNECTIONS, KERNEL_BYTES, BoundMetrics, Bounds
from nanoservice.config import FINISH_SECONDS, table
from nanoservice.connection import ConnectionFactory
from nanoservice.direct import routes
from nanoservice.errors import ConfigError, StartError
from nanoservice.listen import BACKLOG, accept_queued, bind, inherited_socket, max_connections
from nanoservice.metrics import REGISTRY, RequestRecorder, admin_app
from nanoservice.probes import READINESS
from nanoservice.service import BUSY_RESOURCES, C, Service, create_app

# The time limits of a shutdown after the drain, in seconds. In a cluster the drain takes 5 (DRAIN_SECONDS), so a shutdown takes
# at most 22.5. Kubernetes allows 30 (terminationGracePeriodSeconds).
LAST_REQUESTS_SECONDS = 0.5  # After the listening sockets are closed, clients may send requests for this time.
CLEAN_UP_SECONDS = 5.0  # The resources must be closed within this time.
CLOSE_SECONDS = 1.0  # Clean-ups that are not finished are cancelled, and the event loop is closed, within this time.
SHUTDOWN_SECONDS = LAST_REQUESTS_SECONDS + FINISH_SECONDS + CLEAN_UP_SECONDS + CLOSE_SECONDS + logs.FLUSH_SECONDS

_STOP_SIGNALS = signal.SIGTERM, signal.SIGINT

# accept() calls per wake-up of asyncio's loop. `Bounds.admit` counts only afterwards, so this must stay below
# `_SPARE_DESCRIPTORS`.
_ACCEPTS_PER_WAKEUP = 16
_LAG_BUCKETS = 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5  # seconds
_DATA_FOLDER = Path(".data")  # The embedded Valkey of each service keeps its data in a folder of its own here.

_logger = logging.getLogger(__name__)


def main(service: Service[C], environ: Mapping[str, str], arguments: list[str]) -> int:
    """Run `service` until a signal arrives, and return the exit status.

    The status is 0 after a graceful shutdown or for `--help`, 78 for bad settings, 64 for any other argument, 1 if the service
    cannot start, and 128 + N if a second signal, number N, cut the shutdown short.
    """
    _open_streams()
    if arguments:
        print(f"{service.name} takes no arguments; its settings are environment variables:\n\n{table(service.config)}")
        return 0 if arguments in (["--help"], ["-h"]) else os.EX_USAGE
    # Block both signals until `_live` has installed its handlers: a KeyboardInterrupt can be swallowed by an import or a fork,
    # and uvloop drops signals that arrive while its loop is being created.
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        outside = environ.get("REDIS_HOST") or environ.get("REDIS_SENTINELS")
        config = service.config.read(environ, [] if outside else _embedded_problems())
        logs.configure(config.log_level, config.log_format)
        with (
            inherited_socket(environ) or bind(config.bind_host, config.bind_port, "BIND_PORT") as public,
            bind(config.bind_host, config.admin_port, "ADMIN_PORT") as admin,
            contextlib.nullcontext() if outside else _embedded_store(service.name) as store,
        ):
            with asyncio.Runner(loop_factory=_loop_factory()) as runner:
                status = 1
                try:
                    status = runner.run(_live(service, config, store, public, admin))
                finally:
                    # Closing the loop waits for its tasks, even those that ignore their cancellation. It also joins its resolver
                    # threads, even those of abandoned look-ups; without DNS that takes 20 s or more. So this timer exits the
                    # process. It is a daemon thread, so that no exit waits for the timer itself.
                    deadline = threading.Timer(CLOSE_SECONDS, _exit, [status])
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


def _open_streams() -> None:
    """Open each standard stream that is closed. Otherwise a socket could get its number, and what libraries print."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.open(os.devnull, os.O_RDWR), "r" if name == "stdin" else "w"))  # noqa: SIM115 - stays open


def _exit(status: int) -> None:
    logging.shutdown()  # os._exit() alone would lose the last lines of the log.
    os._exit(status)


async def _live(service: Service[C], config: C, store: str | None, public: socket.socket, admin: socket.socket) -> int:
    """Serve until a signal arrives, shut down in order, and return the exit status."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    stop = asyncio.Event()
    last_signal = 0

    def on_signal(number: int) -> None:
        nonlocal last_signal
        last_signal = number
        if stop.is_set() and task is not None and not task.cancelling():
            task.cancel()
        stop.set()

    for number in _STOP_SIGNALS:
        loop.add_signal_handler(number, on_signal, number)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)
    running: Running | None = None
    try:
        starting = asyncio.create_task(Running.start(service, config, public, admin, store))
        await asyncio.wait({starting, asyncio.create_task(stop.wait())}, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()
            await asyncio.wait({starting}, timeout=CLEAN_UP_SECONDS)
            return 0
        running = starting.result()
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
        cut_off = await running.cut_off() if running else 0
        _logger.warning("stopped by a second signal: requests in flight were cut off", extra={"connections": cut_off})
        return 128 + last_signal
    _logger.info("stopped")
    return 0


class Running:
    """A running service, with one listening socket for clients and one for metrics."""

    def __init__(self, app: web.Application) -> None:
        self.app = app
        self._factories: list[ConnectionFactory] = []
        self._app_runners: list[web.AppRunner] = []
        self._connection_runners: list[web.ServerRunner] = []
        self._sites: list[tuple[web.SockSite, socket.socket, ConnectionFactory]] = []
        lag = "How late the event loop ran a timer, measured once a second"
        lags = Histogram("event_loop_lag_seconds", lag, buckets=_LAG_BUCKETS, registry=app[REGISTRY])
        self._sweeper = asyncio.create_task(self._sweep(lags))

    @classmethod
    async def start(
        cls, service: Service[C], config: C, public: socket.socket, admin: socket.socket, store: str | None = None
    ) -> Self:
        """Make the service's resources and begin to serve, whether Redis answers or not.

        If this fails or is cancelled, close what has been made, and log which resource could not be made.
        """
        asyncio.get_running_loop().set_exception_handler(_on_loop_error)
        running = cls(create_app(service, config, store))
        registry = running.app[REGISTRY]
        recorder = RequestRecorder(registry, _logger)
        metrics, limit = BoundMetrics(registry), max_connections()
        if limit < config.max_connections:
            _logger.warning("the limit on open files allows fewer connections than MAX_CONNECTIONS", extra={"connections": limit})
        try:
            await running._serve(running.app, public, recorder, Bounds(metrics, "public", min(limit, config.max_connections)))
            # No registry has this recorder, because scrapes are not traffic.
            unread = RequestRecorder(CollectorRegistry(), _logger)
            await running._serve(admin_app(registry), admin, unread, Bounds(metrics, "admin", ADMIN_CONNECTIONS))
        except BaseException:
            _logger.error("the start was not completed", extra={"resources": [*running.app[BUSY_RESOURCES]]})
            await running.close()
            raise
        return running

    async def _serve(self, app: web.Application, sock: socket.socket, recorder: RequestRecorder, bounds: Bounds) -> None:
        # `app_runner` makes and closes the application's resources. `connection_runner` holds the connections, which are
        # instances of the chassis's `Connection`.
        app_runner = web.AppRunner(app)
        self._app_runners.append(app_runner)
        await app_runner.setup()
        assert app_runner.server is not None  # setup() has set it.
        self._factories.append(ConnectionFactory(app_runner.server, recorder, bounds, routes(app)))
        connection_runner = web.ServerRunner(cast("web.Server", self._factories[-1]), shutdown_timeout=FINISH_SECONDS)
        self._connection_runners.append(connection_runner)
        await connection_runner.setup()
        for option, value in (socket.SO_KEEPALIVE, 1), (socket.SO_RCVBUF, KERNEL_BYTES), (socket.SO_SNDBUF, KERNEL_BYTES):
            sock.setsockopt(socket.SOL_SOCKET, option, value)  # The connections inherit these options.
        # asyncio uses `backlog` also as the number of accepts per wake-up. Pass the small number here, and set the kernel's
        # queue with listen() below.
        site = web.SockSite(connection_runner, sock, backlog=_ACCEPTS_PER_WAKEUP)
        await site.start()
        sock.listen(BACKLOG)
        self._sites.append((site, sock, self._factories[-1]))

    async def _sweep(self, lags: Histogram) -> None:
        now = asyncio.get_running_loop().time
        while True:
            due = now() + 1
            await asyncio.sleep(1)
            lags.observe(now() - due)
            for factory in self._factories:
                try:
                    factory.close_overdue()
                except Exception:  # Without the sweep, slow clients could use all connections.
                    _logger.exception("overdue connections were not closed")

    def drain(self) -> None:
        """Make readiness answer 503, and close each connection after its next answer, but keep serving.

        A pod that is shutting down still receives requests until its address is withdrawn everywhere.
        """
        self.app[READINESS].draining = True
        for factory in self._factories:
            factory.draining = True

    async def close(self) -> None:
        """Stop listening, finish the requests in flight, and close the resources, Redis last."""
        self.drain()
        await self._stop_listening()
        self._sweeper.cancel()
        # Each connection gets FINISH_SECONDS too. This timer begins earlier, so it still finds the connections open.
        timer = asyncio.get_running_loop().call_later(FINISH_SECONDS, self._log_cut_off)
        await asyncio.gather(*(runner.cleanup() for runner in self._connection_runners))
        timer.cancel()
        tasks = [asyncio.create_task(runner.cleanup()) for runner in self._app_runners]
        done, late = await asyncio.wait(tasks, timeout=CLEAN_UP_SECONDS)
        if late:
            # The close of the event loop cancels the resource. aiohttp then closes the other resources.
            _logger.error("a resource takes too long to close", extra={"resources": [*self.app[BUSY_RESOURCES]]})
        for task in done:
            task.result()

    async def _stop_listening(self) -> None:
        """Close the listening sockets, and serve the connections that the kernel has accepted for them.

        To a client, such a connection is established. If the service reset it, a proxy could not send a POST again.
        """
        loop = asyncio.get_running_loop()
        while self._sites:
            site, sock, factory = self._sites.pop()
            # asyncio's loop serves a connection one iteration after its accept(), and drops it if the server is closed by then.
            # So stop accepting one iteration before the close. uvloop has no reader here, and does not need this.
            loop.remove_reader(sock)
            await asyncio.sleep(0)
            accepted = accept_queued(sock)
            await site.stop()  # This closes the socket at once. No other task runs after the last accept().
            # If one of these connections is broken already, serve the others.
            served = [loop.connect_accepted_socket(factory, connection) for connection in accepted]
            await asyncio.gather(*served, return_exceptions=True)
        end = loop.time() + LAST_REQUESTS_SECONDS
        await asyncio.sleep(0.01)  # The loops report a new connection to its protocol in a later iteration.
        while self._connections() and loop.time() < end:  # noqa: ASYNC110 - a connection sets no event
            await asyncio.sleep(0.01)

    def _log_cut_off(self) -> None:
        _logger.warning("requests were cut off: they took too long", extra={"connections": self._connections()})

    def _connections(self) -> int:
        return sum(len(factory.connections) for factory in self._factories)

    async def cut_off(self) -> int:
        """Close idle connections. Return the number of the other connections, each with a request that is not answered yet."""
        if closing := [asyncio.create_task(runner.cleanup()) for runner in self._connection_runners]:
            await asyncio.wait(closing, timeout=0.1)
        return self._connections()


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


def _embedded_store(name: str) -> contextlib.AbstractContextManager[str]:
    """Return a context that yields the Unix socket of an embedded Valkey for the service `name`."""
    from nanoservice import embedded  # noqa: PLC0415 - only development needs it

    return embedded.valkey(_DATA_FOLDER / name)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return uvloop's loop factory. Where uvloop has no wheel, return None, which means asyncio's own loop."""
    try:
        import uvloop  # noqa: PLC0415 - optional
    except ImportError:
        return None
    return uvloop.new_event_loop
