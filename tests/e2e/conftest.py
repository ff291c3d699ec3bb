"""These fixtures give tests the deployment of `make deploy` on the cluster, and a second namespace."""

from collections.abc import Iterator

import pytest

from nanoservice.testing.waiting import wait_for
from tests.support.cluster import Deployed, Namespace, deployed, namespace


@pytest.fixture
def cluster() -> Deployed:
    """Return the deployment of `make deploy`. First scale it to one ready pod, because a previous test may have changed it."""
    namespace = deployed().namespace
    namespace.kubectl("scale", "deployment/hitcounter", "--replicas=1")
    for what in "statefulset/redis", "deployment/hitcounter":
        namespace.await_rollout(what)
    wait_for(lambda: len(namespace.pods()) == 1 and namespace.ready(), 60)
    return deployed()


@pytest.fixture
def other() -> Iterator[Namespace]:
    """Create a second, empty namespace for the test, and yield it."""
    with namespace("other") as one:
        yield one
