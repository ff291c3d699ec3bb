"""Serve with the image for arm64, under emulation. The tests of a module share one service, because a start takes seconds."""

import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest

from nanoservice.testing.valkey import Valkey
from nanoservice.testing.waiting import SLACK, eventually
from tests.support.emulated import run
from tests.support.process import Process
from tests.support.wire import ask, request

# These tests of the contract expect a service that has answered no other test. They run first, in this order.
FIRST = [
    "test_metrics_stay_bounded_whatever_clients_invent",
    "test_client_that_disconnects_within_a_body_counts_nothing_and_is_not_logged",
    "test_readyz_is_503_with_the_reason_while_livez_is_200",
]
# These fixtures of the contract's tests run a service with this machine's Python.
NATIVE = {"failing", "spawn"}
# The service leaves the rest of a request for later if it has no time. So a slow service may find a path unknown, and answer 404,
# before it reads that the body is malformed.
SLOW = "test_malformed_request_is_answered_and_closed[chunk "
# This test blocks the event loop of the tests, on which an emulated service does not run.
OTHER_LOOP = "test_blocked_event_loop_is_measured"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests of the contract that cannot pass under emulation, and sort the others."""
    mine = [item for item in items if isinstance(item, pytest.Function) and item.path.parent == Path(__file__).parent]
    others = [item for item in mine if not NATIVE.isdisjoint(item.fixturenames) or item.name.startswith((SLOW, OTHER_LOOP))]
    emulated = [item for item in mine if item not in others]
    emulated.sort(key=lambda item: (item.module.__name__, [*FIRST, item.name].index(item.name)))
    config.hook.pytest_deselected(items=others)
    items[:] = [*(item for item in items if item not in mine), *emulated]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    """Run a Valkey for the tests of a module."""
    server = Valkey(tmp_path_factory.mktemp("valkey"))
    server.start()
    yield server
    server.end(signal.SIGKILL)


@pytest.fixture(scope="module")
def emulated(store: Valkey, arguments: list[str]) -> Iterator[Process]:
    """Run a service with the `arguments` of the module."""
    environ = store.environ(BIND_HOST="127.0.0.1", LOG_FORMAT="json", REQUEST_TIMEOUT="10", REDIS_TIMEOUT="10")
    with run(*arguments, **environ) as popen:
        process = Process(popen)
        try:
            process.wait_until_it_listens(60 * SLACK)
            yield process
        finally:
            process.end(signal.SIGKILL)


@pytest.fixture
async def valkey(store: Valkey, emulated: Process) -> Valkey:
    """Empty the Valkey. If a test has killed it, start it first, and wait until the service is ready."""

    async def ready() -> bool:
        return (await ask(emulated.port, request("GET", "/readyz"))).status == 200

    if store.process is None:
        store.start()
        await eventually(ready, 10 * SLACK)
    store.run("FLUSHALL")
    return store


@pytest.fixture
async def served(emulated: Process, valkey: Valkey) -> AsyncIterator[SimpleNamespace]:
    """Yield what the tests of the contract use of a `nanoservice.testing.served.Served`."""
    async with aiohttp.ClientSession(f"http://127.0.0.1:{emulated.port}") as client:
        yield SimpleNamespace(port=emulated.port, admin_port=emulated.admin_port, client=client)


class Log:
    """The lines that a service has logged since this object was made, for tests that expect pytest's own `caplog`.

    The line about lost counts is left out, because the fixture `valkey` deletes the counts.
    """

    def __init__(self, process: Process) -> None:
        self._process = process
        self._begin = len(process.log)

    @property
    def _lines(self) -> list[dict[str, Any]]:
        return [line for line in self._process.log[self._begin :] if not line["message"].startswith("Redis has lost counts")]

    @property
    def records(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(levelname=line["level"].upper()) for line in self._lines]

    @property
    def text(self) -> str:
        return str(self._lines)


@pytest.fixture
def caplog(emulated: Process) -> Log:
    return Log(emulated)
