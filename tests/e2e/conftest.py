"""Fixtures: the deployment of `make deploy` on the cluster, and a second namespace."""

from collections.abc import Iterator

import pytest

from nanoservice.testing.waiting import wait_for
from tests.support.cluster import Deployed, Namespace, deployed, namespace


@pytest.fixture
def cluster() -> Deployed:
    """The deployment of `make deploy`, with one ready pod, whatever the previous test did."""
    namespace = deployed().namespace
    namespace.kubectl("scale", "deployment/hitcounter", "--replicas=1")
    for what in "statefulset/redis", "deployment/hitcounter":
        namespace.await_rollout(what)
    wait_for(lambda: len(namespace.pods()) == 1 and namespace.ready(), 60)
    return deployed()


@pytest.fixture
def other() -> Iterator[Namespace]:
    """A second, empty namespace."""
    with namespace("other") as one:
        yield one
