"""The hitcounter, served in the test's process or in one of its own."""

from collections.abc import AsyncIterator, Iterator

import pytest

from hitcounter.app import SERVICE
from nanoservice.testing.served import Served, serving
from nanoservice.testing.valkey import Valkey
from tests.support.process import Spawn, spawning


@pytest.fixture
async def served(valkey: Valkey) -> AsyncIterator[Served]:
    """The hitcounter in this process, on a Valkey of its own."""
    async with serving(SERVICE, valkey.environ()) as it:
        yield it


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    """Start a hitcounter in a process of its own, with the settings that a test gives."""
    with spawning("hitcounter") as start:
        yield start
