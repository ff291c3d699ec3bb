"""The sample service, served in the test's process or in one of its own."""

from collections.abc import AsyncIterator, Iterator

import pytest

from nanoservice.testing.served import Served, serving
from nanoservice.testing.valkey import Valkey
from tests.nanoservice.sample import SERVICE
from tests.support.process import Spawn, spawning


@pytest.fixture
async def served(valkey: Valkey) -> AsyncIterator[Served]:
    """The sample service in this process, on a Valkey of its own."""
    async with serving(SERVICE, valkey.environ()) as it:
        yield it


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    """Start the sample service in a process of its own, with the settings that a test gives."""
    with spawning("tests.nanoservice.sample") as start:
        yield start
