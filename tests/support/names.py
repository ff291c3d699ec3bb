"""Names that only the tests resolve, and addresses that lead nowhere."""

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from typing import Any

import pytest


def resolve(monkeypatch: pytest.MonkeyPatch, name: str, *addresses: str) -> None:
    """Make the running event loop resolve `name` to `addresses`, in this order."""
    loop = asyncio.get_running_loop()
    real = loop.getaddrinfo

    async def getaddrinfo(host: Any, port: Any, **options: Any) -> list[Any]:
        found = [await real(address, port, **options) for address in (addresses if host == name else [host])]
        return [info for infos in found for info in infos]

    monkeypatch.setattr(loop, "getaddrinfo", getaddrinfo)


@contextlib.contextmanager
def black_hole(address: str, port: int) -> Iterator[None]:
    """Make `address` and `port` answer no attempt to connect, as an address behind a firewall that drops packets does.

    Linux drops such attempts while a listening socket's queue is full.
    """
    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(socket.socket())
        listening.bind((address, port))
        listening.listen(0)
        for _ in range(10):
            client = stack.enter_context(socket.socket())
            client.settimeout(0.1)
            try:
                client.connect((address, port))
            except TimeoutError:
                break
        else:
            raise AssertionError("the queue did not become full")
        yield
