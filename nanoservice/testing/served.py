"""Serve a service in the test's own process."""

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import aiohttp

from nanoservice.listen import bind
from nanoservice.server import Running
from nanoservice.service import Service


@dataclass
class Served:
    """A service that runs in this process, its two ports, and an HTTP client for its public port."""

    running: Running
    port: int
    admin_port: int
    client: aiohttp.ClientSession


@contextlib.asynccontextmanager
async def serving(service: Service[Any], environ: dict[str, str]) -> AsyncIterator[Served]:
    """Serve `service` on free ports of loopback, with the settings in `environ`. Close the service at the end of the context."""
    public, admin = bind("127.0.0.1", 0, "BIND_PORT"), bind("127.0.0.1", 0, "ADMIN_PORT")
    running = await Running.start(service, service.config.read(environ), public, admin)
    port, admin_port = public.getsockname()[1], admin.getsockname()[1]
    try:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}", connector=aiohttp.TCPConnector(limit=0)) as client:
            yield Served(running, port, admin_port, client)
    finally:
        await running.close()
