"""A service's life: read the settings, listen, get ready, serve, drain, end."""

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
from nanoservice.config import ConfigError, StartError, table
from nanoservice.connection import Server
from nanoservice.listen import BACKLOG, bind, handed
from nanoservice.metrics import REGISTRY, RequestRecorder, admin_app
from nanoservice.probes import READINESS
from nanoservice.service import C, Service, create_app

# The end, in seconds: drain (DRAIN_SECONDS, 5 in a cluster) + finish (10) + close (1) = 16, below the 30 of Kubernetes'
# terminationGracePeriodSeconds.
FINISH_SECONDS = 10.0
_CLOSE_SECONDS = 1.0

_SIGNALS = signal.SIGTERM, signal.SIGINT  # either asks the service to end

_TAKEN = 16  # connections that asyncio takes at a time, before any is counted: fewer than the descriptors kept to spare
_DATA = Path(".data")  # of the embedded store

_logger = logging.getLogger(__name__)


def main(service: Service[C], environ: Mapping[str, str], arguments: list[str]) -> int:
    """Run `service` until a signal ends it.

    Return the exit status: 0; 78 for bad settings, 64 for arguments, 1 if it cannot start, 128 + N if signal N came a second
    time and cut the end short.
    """
    if arguments:
        print(f"{service.name} takes no arguments; its settings are environment variables:\n\n{table(service.config)}")
        return 0 if arguments in (["--help"], ["-h"]) else os.EX_USAGE
    # They wait until `_live` listens for them. What Python makes of Ctrl-C, an exception, can get lost in an import or a fork,
    # and uvloop loses signals while it is made.
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        config = service.config.read(environ)
        logs.configure(config.log_level, config.log_format)
        with (
            handed(environ) or bind(config.bind_host, config.bind_port, "BIND_PORT") as public,
            bind(config.bind_host, config.admin_port, "ADMIN_PORT") as admin,
            _embedded_store(config.redis_host) as store,
        ):
            with asyncio.Runner(loop_factory=_event_loop()) as runner:
                status = runner.run(_live(service, config, store, public, admin))
                # The event loop waits for a look-up of a name even if that was given up: without DNS, for 20 s and more.
                last = threading.Timer(_CLOSE_SECONDS, os._exit, [status])
                last.daemon = True  # nor must it be waited for
                last.start()
            last.cancel()
            return status
    except ConfigError as error:
        print("\n".join(f"{service.name}: {problem}" for problem in error.problems), file=sys.stderr)
        return os.EX_CONFIG
    except StartError as error:
        print(f"{service.name}: {error}", file=sys.stderr)
        return 1


async def _live(service: Service[C], config: C, store: str | None, public: socket.socket, admin: socket.socket) -> int:
    """Serve until a signal, then end in order; return the exit status."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    asked = asyncio.Event()
    last = 0

    def on_signal(number: int) -> None:
        nonlocal last
        last = number
        if asked.is_set() and task is not None:
            task.cancel()
        asked.set()

    for number in _SIGNALS:
        loop.add_signal_handler(number, on_signal, number)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    running = await Running.start(service, config, public, admin, store)
    try:
        ports = {"port": public.getsockname()[1], "admin_port": admin.getsockname()[1]}
        _logger.info("listening; try: curl http://localhost:%d/", ports["port"], extra=ports)
        gc.collect()
        gc.freeze()  # what the start made stays for good: the collector need not look at it again
        await asked.wait()
        _logger.info("draining", extra={"seconds": config.drain_seconds})
        running.drain()
        await asyncio.sleep(config.drain_seconds)
        await running.close()
    except asyncio.CancelledError:
        _logger.warning("ended by a second signal: what was in flight is cut off")
        return 128 + last
    _logger.info("ended")
    return 0


class Running:
    """A service that serves on two sockets."""

    def __init__(self, app: web.Application) -> None:
        self.app = app
        self._servers: list[Server] = []
        self._connections: list[web.ServerRunner] = []
        self._resources: list[web.AppRunner] = []
        self._sweeper: asyncio.Task[None] | None = None

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
        running._sweeper = asyncio.create_task(running._sweep())
        return running

    async def _serve(self, app: web.Application, sock: socket.socket, recorder: RequestRecorder) -> None:
        # One runner makes and closes the application's resources, the other has its connections, which are our own.
        resources = web.AppRunner(app)
        self._resources.append(resources)
        await resources.setup()
        assert resources.server is not None  # since setup()
        self._servers.append(Server(resources.server, recorder))
        connections = web.ServerRunner(self._servers[-1], shutdown_timeout=FINISH_SECONDS)
        self._connections.append(connections)
        await connections.setup()
        # asyncio's own event loop takes as many at a time as it lets wait; so it is told one number, and the kernel the other.
        await web.SockSite(connections, sock, backlog=_TAKEN).start()
        sock.listen(BACKLOG)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(1)
            for server in self._servers:
                server.end_overdue()

    def drain(self) -> None:
        """Turn readiness to 503 and end each connection with its next answer, but go on serving.

        For a time a pod that ends still receives requests: until its address is withdrawn everywhere.
        """
        self.app[READINESS].draining = True
        for server in self._servers:
            server.draining = True

    async def close(self) -> None:
        """Stop listening, finish what is in flight, close the resources, Redis last of all."""
        if self._sweeper:
            self._sweeper.cancel()
        for runners in (self._connections, self._resources):
            await asyncio.gather(*(runner.cleanup() for runner in runners))


def _on_loop_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log what nobody waits for any more, but for the look-up of a name that failed after its time: that was told already.

    uvloop goes on with it when the connection that wanted it is given up.
    """
    if not isinstance(context.get("exception"), socket.gaierror):
        loop.default_exception_handler(context)


def _embedded_store(host: str) -> AbstractContextManager[str | None]:
    """Return the context of a store of our own, which gives its socket, or one of None if `host` names a store."""
    if host:
        return nullcontext()
    from nanoservice import embedded  # noqa: PLC0415 - what only development needs costs production no start-up time

    return embedded.valkey(_DATA)


def _event_loop() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return what makes uvloop's event loop, or None, for asyncio's own, where there is no wheel of it."""
    try:
        import uvloop  # noqa: PLC0415 - optional
    except ImportError:
        return None
    return uvloop.new_event_loop
