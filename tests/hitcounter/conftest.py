"""Serve the hitcounter, in the test's process or in a separate process."""

from collections.abc import AsyncIterator, Iterator

import pytest

from hitcounter.app import SERVICE
from nanoservice.testing.served import Served, serving
from nanoservice.testing.valkey import Valkey
from tests.support.process import Spawn, spawning


@pytest.fixture
async def served(valkey: Valkey) -> AsyncIterator[Served]:
    """Serve the hitcounter in the test's process, with the test's own Valkey."""
    async with serving(SERVICE, valkey.environ()) as it:
        yield it


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    """Yield a function that starts a hitcounter in a separate process, with the settings that the test passes."""
    with spawning("hitcounter") as start:
        yield start
