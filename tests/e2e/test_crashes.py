"""If processes are killed or pods are deleted under load, no answered hit is lost.

Clients get status 200 or 503, and no number of a hit appears in two answers.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from nanoservice.testing.waiting import wait_for
from tests.support.cluster import SERVICE, Deployed, Namespace, namespace
from tests.support.traffic import Traffic, counts, reachable, step, traffic

pytestmark = pytest.mark.cluster

REDIS = "app.kubernetes.io/name=redis"

# This script runs on the node and kills process 1 of the container $1 with SIGKILL. It cannot run inside the container, because
# there the kernel ignores SIGKILL to process 1.
_KILL = """
for folder in /proc/[0-9]*; do
  if grep -q "$1" $folder/cgroup 2>/dev/null && grep -q '^NSpid:.*[[:space:]]1$' $folder/status; then
    kill -9 "${folder#/proc/}" && exit
  fi
done
echo "no process of the container $1"; exit 1
"""


class Node:
    """A pod that can kill all processes of the node.

    The pod runs Valkey's image, because the cluster already has this image, and because the image contains a shell.
    """

    def __init__(self, namespace: Namespace, image: str) -> None:
        self._namespace = namespace
        spec = {
            "hostPID": True,
            "terminationGracePeriodSeconds": 0,
            "containers": [
                {
                    "name": "node",
                    "image": image,
                    "command": ["sleep", "3600"],
                    "securityContext": {"privileged": True, "runAsUser": 0},
                }
            ],
        }
        namespace.apply(json.dumps({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "node"}, "spec": spec}))
        namespace.kubectl("wait", "--for=condition=Ready", "pod/node", "--timeout=60s")

    def kill(self, container: str) -> None:
        """Kill process 1 of a container, as in a crash."""
        self._namespace.kubectl("exec", "node", "--", "sh", "-c", _KILL, "sh", container.split("//")[1])


@pytest.fixture
def node(cluster: Deployed) -> Iterator[Node]:
    with namespace("node", "privileged") as one:
        yield Node(one, cluster.valkey)


def status(namespace: Namespace, selector: str) -> Any:
    """Return the status of the container of the pod that `selector` selects. There must be one pod, with one container."""
    (pod,) = namespace.pods(selector)
    return pod["status"]["containerStatuses"][0]


class Windows:
    """The periods in which requests may fail. Each period begins with a fault that a test causes and ends with the recovery."""

    def __init__(self, load: Traffic) -> None:
        self._load = load
        self.all: list[tuple[float, float]] = []

    async def recover(self, began: float, namespace: Namespace, ready: Callable[[], Any]) -> float:
        """Wait until `ready()` is true, and then until a new request is answered. Return the seconds from `began` to that answer.

        Then wait for an answer on a new connection, and record the period from `began` to this answer. If Redis was away for more
        than half a minute, this answer comes later, because the service is not ready: new connections are refused until the
        kubelet's next readiness check.
        """
        await step(wait_for, ready, 120)
        since = time.monotonic()
        await step(wait_for, lambda: self._load.last_answered > since, 30, "an answer")
        seconds = time.monotonic() - began
        await step(wait_for, namespace.ready, 30)
        async with asyncio.timeout(30):
            while not await reachable(self._load.url):
                await asyncio.sleep(0.1)
        self.all.append((began, time.monotonic()))
        return seconds

    def check(self) -> None:
        """Fail if a request failed outside the recorded periods, or failed with a status other than 503."""
        for failure in self._load.failures:
            ended = failure.at + failure.seconds
            assert any(failure.at <= last and ended >= first for first, last in self.all), (failure, self.all)
            assert failure.what == "503" or not failure.what.isdigit(), failure


@asynccontextmanager
async def blows(cluster: Deployed, what: str) -> AsyncIterator[tuple[Traffic, Windows, list[float]]]:
    """Run a load while the caller's block causes faults. After the block, check every request of the load."""
    before = await counts(cluster.url)
    async with traffic(cluster.url, 100) as load:
        windows = Windows(load)
        times: list[float] = []
        yield load, windows, times
    print(f"\n{what}: recovered in {', '.join(f'{one:.1f}' for one in times)} s; {load.statuses()}")
    windows.check()
    load.check(before, await counts(cluster.url))


@pytest.mark.parametrize("selector", [SERVICE, REDIS], ids=["service", "Valkey"])
async def test_killed_process_loses_no_answered_hit(cluster: Deployed, node: Node, selector: str) -> None:
    namespace = cluster.namespace
    async with blows(cluster, "kill -9") as (_, windows, times):
        for _ in range(2):
            old = await step(status, namespace, selector)

            def back(old: Any = old) -> bool:
                new = status(namespace, selector)
                return bool(new["ready"] and new["containerID"] != old["containerID"])

            began = time.monotonic()
            await step(node.kill, old["containerID"])
            times.append(await windows.recover(began, namespace, back))
    print(f"without the kubelet's wait of 10 s before the second restart: {times[0]:.1f}, {times[1] - 10:.1f} s")


@pytest.mark.parametrize("selector", [SERVICE, REDIS], ids=["service", "Valkey"])
async def test_pod_deleted_by_force_loses_no_answered_hit(cluster: Deployed, selector: str) -> None:
    namespace = cluster.namespace
    async with blows(cluster, "pod deleted with grace 0") as (_, windows, times):
        for _ in range(8):
            (old,) = await step(namespace.pods, selector)

            def back(old: Any = old) -> bool:
                return any(
                    pod["metadata"]["uid"] != old["metadata"]["uid"] and pod["metadata"]["name"] in namespace.ready(selector)
                    for pod in namespace.pods(selector)
                )

            began = time.monotonic()
            await step(namespace.kubectl, "delete", "pod", old["metadata"]["name"], "--grace-period=0", "--force")
            times.append(await windows.recover(began, namespace, back))


async def test_clients_are_not_refused_while_redis_restarts(cluster: Deployed) -> None:
    namespace = cluster.namespace
    (pod,) = namespace.ready()
    async with blows(cluster, "Redis restarted") as (load, windows, times):
        began = time.monotonic()
        await step(namespace.kubectl, "delete", "pod", "redis-0")
        times.append(await windows.recover(began, namespace, lambda: namespace.ready(REDIS)))
    assert {failure.what for failure in load.failures} <= {"503"}  # no connection failed, because the service's pod stayed ready
    assert namespace.ready() == [pod]
