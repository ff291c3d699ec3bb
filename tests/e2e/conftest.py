"""These fixtures give tests the deployment of `make deploy` on the cluster, other namespaces, and a second service."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanoservice.testing.waiting import wait_for
from tests.support import bundle
from tests.support.cluster import KUBECTL, Deployed, Namespace, deployed, namespace, run

# a folder, or the beginning of a URL
CRDS = os.environ.get("CRDS") or (
    "https://raw.githubusercontent.com/prometheus-operator/prometheus-operator/v0.93.0/example/prometheus-operator-crd"
)
KINDS = "podmonitors", "prometheusrules"


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


@pytest.fixture(scope="session")
def two_services(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a copy of the repository that has a second service, `likes`. Do not change this copy."""
    copy = bundle.copy(tmp_path_factory.mktemp("copy"))
    run(sys.executable, str(copy / "scripts" / "service.py"), "add", "likes")
    return copy


@pytest.fixture
def monitoring() -> Iterator[Namespace]:
    """Yield the namespace `monitoring`. If the cluster does not have it, create it, and delete it after the test."""
    one = Namespace("monitoring")
    there = "monitoring" in one.kubectl("get", "namespaces", "--output=name")
    if not there:
        one.create()
    try:
        yield one
    finally:
        if there:
            one.kubectl("delete", "pod", "client", "prometheus", "--ignore-not-found")
        else:
            one.delete()


@pytest.fixture
def custom_resources() -> Iterator[None]:
    """Add the custom resources that monitoring needs. After the test, delete those that the cluster did not have before."""
    there = run(KUBECTL, "get", "customresourcedefinitions", "--output=name")
    missing = [f"{kind}.monitoring.coreos.com" for kind in KINDS if f"{kind}.monitoring.coreos.com" not in there]
    try:
        for name in missing:
            run(KUBECTL, "create", f"--filename={CRDS}/monitoring.coreos.com_{name.partition('.')[0]}.yaml")
            run(KUBECTL, "wait", "--for=condition=Established", f"customresourcedefinition/{name}", "--timeout=30s")
        yield
    finally:
        for name in missing:
            run(KUBECTL, "delete", "customresourcedefinition", name, "--ignore-not-found")
