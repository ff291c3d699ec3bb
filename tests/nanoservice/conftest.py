"""Serve the sample service, in the test's process or in a separate process."""

import io
import logging
from collections.abc import AsyncIterator, Iterator

import pytest

from nanoservice import logs
from nanoservice.testing.served import Served, serving
from nanoservice.testing.valkey import Valkey
from tests.nanoservice.sample import SERVICE
from tests.support.process import Spawn, spawning


@pytest.fixture
async def served(valkey: Valkey) -> AsyncIterator[Served]:
    """Serve the sample service in the test's process, with the test's own Valkey."""
    async with serving(SERVICE, valkey.environ()) as it:
        yield it


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    """Yield a function that starts the sample service in a separate process, with the settings that the test passes."""
    with spawning("tests.nanoservice.sample") as start:
        yield start


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """Yield the log of the service, as JSON and at debug level. Afterwards, restore the configuration of `logging`."""
    root, stream = logging.getLogger(), io.StringIO()
    handlers, level, others = root.handlers[:], root.level, logging.getLogger("asyncio").level
    logs.configure("debug", "json", stream)
    yield stream
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.getLogger("asyncio").setLevel(others)
    logging.captureWarnings(False)
