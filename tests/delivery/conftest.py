"""Fixtures: a network for containers, and the hitcounter in the test's process."""

import os
from collections.abc import AsyncIterator, Iterator

import pytest

from hitcounter.app import SERVICE
from nanoservice.testing.served import Served, serving
from nanoservice.testing.valkey import Valkey
from tests.support.images import VALKEY, engine, run


@pytest.fixture(scope="session")
def network() -> Iterator[str]:
    """A network in which a Valkey has the name `store`. The test is skipped if the engine cannot run containers."""
    if "buildah" in engine():
        pytest.skip("buildah runs no containers")
    name = f"image-tests-{os.getpid()}"
    run("network", "create", name)
    run("run", "--detach", "--rm", "--name", f"{name}-store", "--network", name, "--network-alias", "store", VALKEY)
    yield name
    run("rm", "--force", "--volumes", f"{name}-store")
    run("network", "rm", name)


@pytest.fixture
async def served(valkey: Valkey) -> AsyncIterator[Served]:
    """The hitcounter, which runs in this process and uses its own Valkey."""
    async with serving(SERVICE, valkey.environ()) as it:
        yield it
