"""Two services run side by side: a change to one service affects neither the pods nor the keys of the other service."""

import asyncio
import json
import os
import subprocess
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from nanoservice.testing.waiting import wait_for
from tests.support import ROOT
from tests.support.cluster import Deployed, Namespace, deployed, start
from tests.support.pages import steps
from tests.support.traffic import step, traffic

pytestmark = pytest.mark.cluster

LIKES = "app.kubernetes.io/name=likes"

# This script prints the page of metrics whose URL is the argument, or an empty line if the page cannot be read.
_SCRAPE = """
import sys, urllib.request
try:
    print(urllib.request.urlopen(sys.argv[1], timeout=2).read().decode())
except OSError:
    print()
"""


@dataclass
class Both:
    """A copy of the repository with a second service, which runs in the namespace of the first service."""

    copy: Path
    namespace: Namespace
    url: str
    likes_url: str

    def act(self, command: str) -> str:
        """Run a command in the copy, on the namespace of this run."""
        environ = {"NAMESPACE": self.namespace.name, "WHEELS": str(ROOT / os.environ.get("WHEELS", "wheels"))}
        ended = subprocess.run(
            ["sh", "-c", command], cwd=self.copy, env=os.environ | environ, text=True, capture_output=True, timeout=900
        )
        assert ended.returncode == 0, f"{command}\n{ended.stdout}{ended.stderr}"
        return ended.stdout + ended.stderr

    def count(self) -> int:
        with urllib.request.urlopen(urllib.request.Request(self.likes_url, b"", method="POST"), timeout=5) as answer:
            return int(json.load(answer)["count"])

    def pods(self, selector: str) -> dict[str, Any]:
        """Return a dict from the name of each selected pod to the times when its containers started."""
        return {
            pod["metadata"]["name"]: [one["state"]["running"]["startedAt"] for one in pod["status"]["containerStatuses"]]
            for pod in self.namespace.pods(selector)
        }


@pytest.fixture(scope="module")
def both(two_services: Path) -> Iterator[Both]:
    """Deploy a second service beside the first, with the commands of docs/second-service.md. Afterwards, remove it again."""
    first = deployed()
    one = Both(two_services, first.namespace, first.url, first.url.replace(":30080", ":30081"))
    (deploy, look, _) = steps(ROOT / "docs" / "second-service.md", "On a cluster")
    before = one.pods("app.kubernetes.io/name=hitcounter")
    try:
        said = one.act(deploy.command)
        assert one.likes_url in said.splitlines()
        assert one.pods("app.kubernetes.io/name=hitcounter") == before
        shown = one.act(look.command.replace("--namespace=hitcounter", f"--namespace={one.namespace.name}"))
        assert all(text in shown for text in look.seen)
        yield one
    finally:
        kinds = "deployment,service,configmap,networkpolicy,poddisruptionbudget"
        one.namespace.kubectl("delete", kinds, f"--selector={LIKES}")
        one.namespace.make("deploy", seconds=900)  # Redis has its first users again


def test_second_service_runs_beside_the_first(cluster: Deployed, both: Both) -> None:
    assert wait_for(both.count, 30) < both.count()
    assert cluster.namespace.counts()


def test_user_of_one_service_cannot_read_the_keys_of_the_other(cluster: Deployed, both: Both) -> None:
    ask = both.namespace.valkey
    both.count()
    # The controls: each user can read the keys of its own service.
    assert int(ask("GET", "{hitcounter}:hits", user="hitcounter")) >= 0
    assert int(ask("GET", "{likes}:count", user="likes")) > 0
    for user, key in (("likes", "{hitcounter}:hits"), ("hitcounter", "{likes}:count")):
        assert "NOPERM" in ask("GET", key, user=user)


def test_second_service_is_monitored_without_a_line_of_its_own(cluster: Deployed, both: Both, monitoring: Namespace) -> None:
    pod_monitor = yaml.safe_load((both.copy / "manifests" / "components" / "monitoring" / "pod-monitor.yaml").read_text())["spec"]
    selector = ",".join(f"{name}={value}" for name, value in pod_monitor["selector"]["matchLabels"].items())
    pods = {pod["metadata"]["labels"]["app.kubernetes.io/name"]: pod for pod in both.namespace.pods(selector)}
    assert set(pods) == {"hitcounter", "likes"}

    (container,) = pods["likes"]["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    admin = f"http://{pods['likes']['status']['podIP']}:{ports[pod_monitor['podMetricsEndpoints'][0]['port']]}/metrics"
    start(monitoring, cluster.image, "prometheus", {"app.kubernetes.io/name": "prometheus"})

    def scraped() -> bool:  # the policies admit a new pod a moment after the pod has its address
        return 'build_info{name="likes"' in monitoring.python("prometheus", _SCRAPE, admin)

    wait_for(scraped, 15)


async def test_deploying_rolling_scaling_and_rotating_one_service_fails_no_request_of_the_other(
    cluster: Deployed, both: Both
) -> None:
    namespace = both.namespace
    before = both.pods("app.kubernetes.io/name=hitcounter")
    (_, _, rotate) = steps(ROOT / "docs" / "second-service.md", "On a cluster")

    def work() -> None:
        both.act("make deploy SERVICE=likes")
        namespace.kubectl("rollout", "restart", "deployment/likes")
        namespace.await_rollout("deployment/likes")
        for replicas in (2, 1):
            namespace.kubectl("scale", "deployment/likes", f"--replicas={replicas}")
            wait_for(lambda: len(namespace.ready(LIKES)) == len(namespace.pods(LIKES)) == replicas, 120)
        said = both.act(rotate.command)
        assert all(text in said for text in rotate.seen)

    async with traffic(both.url, 50, least=500) as load:
        await step(work)
    print(load.statuses())
    assert not load.failures
    assert both.pods("app.kubernetes.io/name=hitcounter") == before


async def test_rolling_scaling_and_rotating_the_first_service_fails_no_request_of_the_second(
    cluster: Deployed, both: Both
) -> None:
    namespace = both.namespace
    before = both.pods(LIKES)
    numbers: list[int] = []
    ended = asyncio.Event()

    async def ask() -> None:
        while not ended.is_set():
            numbers.append(await step(both.count))  # this fails unless the answer is 200
            await asyncio.sleep(0.02)

    def work() -> None:
        namespace.kubectl("rollout", "restart", "deployment/hitcounter")
        namespace.await_rollout("deployment/hitcounter")
        for replicas in (2, 1):
            namespace.kubectl("scale", "deployment/hitcounter", f"--replicas={replicas}")
            wait_for(lambda: len(namespace.ready()) == len(namespace.pods()) == replicas, 120)
        both.act("make secret-rotate SERVICE=hitcounter")

    asking = asyncio.create_task(ask())
    await step(work)
    ended.set()
    await asking
    print(f"{len(numbers)} requests")
    assert len(numbers) > 100
    assert numbers == sorted(set(numbers))
    assert both.pods(LIKES) == before
