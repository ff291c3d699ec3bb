"""Choose the event loop of the tests, and start a Valkey for each test that uses the fixture `valkey`."""

import asyncio
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from nanoservice.testing.valkey import Valkey
from tests.support.loops import EVENT_LOOP, FACTORIES


def pytest_asyncio_loop_factories(item: pytest.Item) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Run each test on the event loop that `EVENT_LOOP` names, unless the test itself names event loops."""
    marker = item.get_closest_marker("asyncio")
    names = marker.kwargs.get("loop_factories") if marker else None
    return {name: FACTORIES[name] for name in names or [EVENT_LOOP]}


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[Valkey]:
    """Start a Valkey for one test, and kill it afterwards."""
    data = tmp_path / "valkey"
    data.mkdir()
    server = Valkey(data)
    server.start()
    yield server
    server.end(signal.SIGKILL)
