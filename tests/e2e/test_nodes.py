"""On three nodes, pods are spread, drains and the autoscaler fail no request, and the loss of a node loses no answered hit.

These tests use a single Redis; test_replicated.py has the tests with three. The tests need three nodes and a metrics API:
see the head of tests/support/nodes.py.
"""

import functools
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from nanoservice.testing.waiting import wait_for
from tests.e2e.test_changes import scale
from tests.e2e.test_crashes import REDIS, Windows, blows
from tests.support import ROOT
from tests.support.cluster import KUBECTL, Deployed, Namespace, compose, deployed, run
from tests.support.nodes import (
    bring_back,
    change_node,
    cordoned,
    drain,
    first_node,
    node_is_ready,
    node_names,
    node_of,
    nodes_of,
    out_of_service,
    replaced,
    uncordon,
)
from tests.support.traffic import counts, step, traffic

pytestmark = pytest.mark.nodes


@functools.cache
def deployed_on_workers() -> Deployed:
    """Deploy the service once, with Redis's volume on a node that the tests may lose: not on the first one."""
    first = run(KUBECTL, "get", "nodes", "--output=name").split()[0].removeprefix("node/")
    with cordoned(first):
        one = deployed()
    assert first_node(one) == first
    return one


@pytest.fixture
def spread() -> Deployed:
    """Return the deployment with three pods of the service, one on each node."""
    one = deployed_on_workers()
    namespace = one.namespace
    namespace.await_rollout("statefulset/redis")
    if sorted(nodes_of(namespace.pods())) != node_names(namespace):
        scale(namespace, 1)
        scale(namespace, 3)
    wait_for(lambda: len(namespace.ready()) == 3, 60)
    return one


def test_three_pods_are_spread_over_three_nodes(spread: Deployed) -> None:
    namespace = spread.namespace
    assert sorted(nodes_of(namespace.pods())) == node_names(namespace)


def scheduling(namespace: Namespace, pod: str) -> str:
    """Return what the scheduler said about the pod last."""
    events = namespace.get("events", f"--field-selector=involvedObject.name={pod},reason=FailedScheduling")
    return str(events[-1]["message"]) if events else ""


@pytest.mark.slow
async def test_drain_fails_no_request_except_while_redis_cannot_move(spread: Deployed) -> None:
    namespace = spread.namespace
    home = node_of(namespace, "redis-0")
    before = await counts(spread.url)
    took = []
    async with traffic(spread.url, 100) as load:
        windows = Windows(load)
        for node in await step(node_names, namespace):
            assert node in nodes_of(await step(namespace.pods))  # the control: the drain has a pod of the service to evict
            began = time.monotonic()
            try:
                took.append(await step(drain, node))
                assert node not in nodes_of(await step(namespace.pods))
                if node == home:
                    said = await step(wait_for, lambda: scheduling(namespace, "redis-0"), 30)
                    assert re.search("1 node.*were unschedulable, 2 node.*PersistentVolume's node affinity", said), said
            finally:
                await step(uncordon, node)
            if node == home:
                seconds = await windows.recover(began, namespace, lambda: namespace.ready(REDIS))
            await step(wait_for, lambda: len(namespace.ready()) == 3, 60)
    print(f"\ndrained in {', '.join(f'{one:.0f}' for one in took)} s; Redis's node back after {seconds:.0f} s; {load.statuses()}")
    windows.check()
    assert {failure.what for failure in load.failures} == {"503"}
    load.check(before, await counts(spread.url))


async def test_autoscaler_adds_and_removes_pods_without_a_failed_request(spread: Deployed) -> None:
    namespace = spread.namespace
    scaler = yaml.safe_load((ROOT / "manifests" / "production" / "autoscaler.yaml").read_text())
    # The load of the test must exceed the target, and pods must be removed earlier than after five minutes.
    scaler["spec"]["metrics"][0]["resource"]["target"]["averageValue"] = "12m"
    scaler["spec"]["behavior"] = {"scaleDown": {"stabilizationWindowSeconds": 10}}

    async def await_pods(what: str, enough: Any) -> None:
        began = time.monotonic()
        await step(wait_for, lambda: enough(len(namespace.ready())) and len(namespace.ready()) == len(namespace.pods()), 180)
        seen.append(f"{what}: {len(await step(namespace.ready))} pods after {time.monotonic() - began:.0f} s")

    seen: list[str] = []
    await step(scale, namespace, 2)
    await step(namespace.apply, json.dumps(scaler))
    try:
        before = await counts(spread.url)
        async with traffic(spread.url, 200) as load:
            await await_pods("more load", lambda pods: pods >= 4)
            load.rate = 10
            await await_pods("little load", lambda pods: pods == 2)
    finally:
        await step(namespace.kubectl, "delete", "horizontalpodautoscaler", "hitcounter")
    print(f"\n{'; '.join(seen)}; {load.statuses()}")
    assert not load.failures
    load.check(before, await counts(spread.url))


def worker_without_redis(one: Deployed) -> str:
    (node,) = set(node_names(one.namespace)) - {first_node(one), node_of(one.namespace, "redis-0")}
    return node


def listed(namespace: Namespace) -> list[str]:
    """Return the node of each pod to which the Service sends new connections."""
    slices = namespace.get("endpointslices", "--selector=kubernetes.io/service-name=hitcounter")
    endpoints = [endpoint for one in slices for endpoint in one["endpoints"] or []]
    return [endpoint["nodeName"] for endpoint in endpoints if endpoint["conditions"]["ready"]]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["kill", "cut"])
async def test_loss_of_a_worker_fails_requests_only_until_the_node_is_not_ready(spread: Deployed, how: str) -> None:
    namespace = spread.namespace
    lost = worker_without_redis(spread)
    (pod,) = [pod["metadata"]["name"] for pod in namespace.pods() if pod["spec"]["nodeName"] == lost]
    before = await counts(spread.url)
    async with traffic(spread.url, 100) as load:
        windows = Windows(load)
        began = time.monotonic()
        await step(change_node, how, lost)
        try:
            await step(wait_for, lambda: lost not in listed(namespace), 180)
            noticed = time.monotonic()
            await step(wait_for, lambda: time.monotonic() - noticed > 12, 20)  # requests under way take 10 s at most
            windows.all.append((began, noticed + 5))
            # The runbook's step: Kubernetes replaces the deleted pod at once.
            await step(namespace.kubectl, "delete", "pod", "--wait=false", pod)
            await step(wait_for, lambda: len(set(namespace.ready()) - {pod}) == 3, 60)
        finally:
            await step(bring_back, namespace, how, lost)
        await step(wait_for, lambda: pod not in namespace.kubectl("get", "pods"), 120)
    last = max((failure.at for failure in load.failures), default=began) - began
    print(f"\n{how}: withdrawn after {noticed - began:.0f} s, last failure after {last:.0f} s; {load.statuses()}")
    windows.check()
    load.check(before, await counts(spread.url))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["kill", "cut"])
async def test_redis_works_again_when_its_lost_node_is_back(spread: Deployed, how: str) -> None:
    namespace = spread.namespace
    home = node_of(namespace, "redis-0")
    async with blows(spread, f"Redis's node: {how}") as (_, windows, times):
        began = time.monotonic()
        await step(change_node, how, home)
        await step(wait_for, lambda: not node_is_ready(namespace, home), 180)
        print(f"\nnot ready after {time.monotonic() - began:.0f} s")
        since = time.monotonic()
        await step(bring_back, namespace, how, home)
        await windows.recover(began, namespace, lambda: namespace.ready(REDIS))
        times.append(time.monotonic() - since)


# Redis runs on a worker, and the service on the first node.
_PLACES = """
patches:
  - target: {{kind: StatefulSet, name: redis}}
    patch: |-
      - op: add
        path: /spec/template/spec/affinity
        value:
          nodeAffinity:
            requiredDuringSchedulingIgnoredDuringExecution:
              nodeSelectorTerms: [{{matchExpressions: [{{key: kubernetes.io/hostname, operator: NotIn, values: [{first}]}}]}}]
  - target: {{kind: Deployment, name: hitcounter}}
    patch: |-
      - {{op: add, path: /spec/template/spec/nodeSelector, value: {{kubernetes.io/hostname: {first}}}}}
"""


@pytest.mark.slow
def test_volume_of_a_lost_node_is_replaced_from_the_backup(other: Namespace, tmp_path: Path) -> None:
    one, file = deployed_on_workers(), tmp_path / "hitcounter.rdb"
    other.make("secret")
    text = compose(one, other, "resources: [../hitcounter, ../redis]", _PLACES.format(first=first_node(one)))
    other.apply(text)
    for what in "statefulset/redis", "deployment/hitcounter":
        other.await_rollout(what)
    assert wait_for(other.answered, 30) == (1, 0)
    other.make("backup", f"FILE={file}")
    assert other.answered() == (2, 0)  # this hit is lost with the volume, because no backup has it
    home, uid = node_of(other, "redis-0"), other.get("pod", "redis-0")["metadata"]["uid"]
    began = time.monotonic()
    change_node("kill", home)
    try:
        with out_of_service(other, home):
            noticed = time.monotonic()
            wait_for(lambda: replaced(other, "redis-0", uid), 120)
            moved = time.monotonic()
            said = wait_for(lambda: scheduling(other, "redis-0"), 30)
            assert other.answered() is None
            other.kubectl("delete", "statefulset", "redis")
            other.kubectl("delete", "persistentvolumeclaim", "data-redis-0", "--timeout=60s")
            other.apply(text)
            other.await_rollout("statefulset/redis")
            other.make("restore", f"FILE={file}")
            assert wait_for(other.answered, 60) == (2, 0)
            ended = time.monotonic()
            assert node_of(other, "redis-0") != home
    finally:
        bring_back(other, "kill", home)
    print(f"\nnot ready after {noticed - began:.0f} s, old pod gone {moved - noticed:.0f} s after the taint: {said}")
    print(f"counts again {ended - moved:.0f} s later")
    assert other.answered() == (3, 0)
