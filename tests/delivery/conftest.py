"""A network for containers."""

import os
from collections.abc import Iterator

import pytest

from tests.support.images import VALKEY, engine, run


@pytest.fixture(scope="session")
def network() -> Iterator[str]:
    """A network with a Valkey in it, which is called `store`. An engine that only builds has neither."""
    if "buildah" in engine():
        pytest.skip("buildah runs no containers")
    name = f"image-tests-{os.getpid()}"
    run("network", "create", name)
    run("run", "--detach", "--rm", "--name", f"{name}-store", "--network", name, "--network-alias", "store", VALKEY)
    yield name
    run("rm", "--force", "--volumes", f"{name}-store")
    run("network", "rm", name)
