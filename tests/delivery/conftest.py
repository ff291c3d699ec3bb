"""Fixtures: a network with a Valkey for containers, and the first service, which runs in the test's process."""

import os
from collections.abc import AsyncIterator, Iterator

import pytest

from nanoservice.testing.served import Served, serving
from nanoservice.testing.valkey import Valkey
from tests.support.images import VALKEY, engine, run
from tests.support.services import names, services


@pytest.fixture(scope="session")
def network() -> Iterator[str]:
    """Create a network in which a Valkey has the name `store`, and yield the network's name.

    Skip the test if the engine cannot run containers.
    """
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
    """Run the first service in the test's process, with a Valkey that only this service uses."""
    async with serving(services()[names()[0]], valkey.environ()) as it:
        yield it
