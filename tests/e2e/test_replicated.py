"""With the component redis-replicated, the loss of a server or of its node loses no answered hit, and restarts fail no request.

These tests need a cluster with three nodes: see the head of tests/support/nodes.py.
"""

import asyncio
import functools
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from subprocess import TimeoutExpired
from typing import Any

import pytest
import trustme

from nanoservice.testing.waiting import wait_for
from tests.e2e.test_changes import scale
from tests.e2e.test_chart import CHART, check_installation, helm_in, images, production
from tests.e2e.test_crashes import REDIS, blows
from tests.support.cluster import KUBECTL, Deployed, Namespace, compose, deployed, install, run
from tests.support.nodes import (
    bring_back,
    change_node,
    drain,
    first_node,
    node_names,
    node_of,
    nodes_of,
    uncordon,
)
from tests.support.traffic import Traffic, counts, step, traffic

pytestmark = pytest.mark.nodes

SERVERS = ["redis-0", "redis-1", "redis-2"]
COMPONENT = "components: [../components/redis-replicated]"


def change_store(one: Deployed, *lines: str) -> None:
    """Deploy manifests/minikube again, with the further `lines` of a kustomization, and the service on the first node.

    The first node is the one whose address the tests use, and the tests lose only other nodes.
    """
    text = compose(one, one.namespace, "resources: [../minikube]", *lines)
    run(KUBECTL, "apply", "--server-side", "--force-conflicts", "--filename=-", input=text)
    run_service_on(one, first_node(one))


def run_service_on(one: Deployed, node: str | None) -> None:
    """Run the service's pods on `node`, or on any node if `node` is None."""
    patch = {"spec": {"template": {"spec": {"nodeSelector": {"kubernetes.io/hostname": node}}}}}
    one.namespace.kubectl("patch", "deployment/hitcounter", "--patch", json.dumps(patch))


def on_server(namespace: Namespace, pod: str, *command: str) -> str | None:
    """Run a command of redis.sh in the pod. Return its output, or None if it fails or takes more than 20 s."""
    try:
        return namespace.kubectl("exec", pod, "--container=redis", "--", "sh", "/etc/redis/redis.sh", *command, seconds=20)
    except (AssertionError, TimeoutExpired):
        return None


def primary(namespace: Namespace, *without: str) -> str | None:
    """Return the pod of the primary, or None if there is not exactly one. Do not ask the pods in `without`.

    A primary that was cut off calls itself a primary until the Sentinels reach it.
    """
    found = [pod for pod in SERVERS if pod not in without and on_server(namespace, pod, "is-primary") is not None]
    return found[0] if len(found) == 1 else None


def whole(namespace: Namespace) -> bool:
    """Return whether one server is the primary and the other two are ready, which means that they have the primary's data."""
    return len(namespace.ready(REDIS)) == len(SERVERS) and primary(namespace) is not None


@functools.cache
def moved() -> tuple[tuple[int, int], Deployed]:
    """Move the deployment from one Valkey to three, as docs/operations.md says. Return the counts before, and the deployment."""
    one = deployed()
    before = one.namespace.counts()
    change_store(one, COMPONENT)
    one.namespace.kubectl("delete", "pod", "redis-0")
    for what in "statefulset/redis", "deployment/hitcounter":
        one.namespace.await_rollout(what)
    one.namespace.kubectl("delete", "service", "redis")
    return before, one


@pytest.fixture
def replicated() -> Deployed:
    """Return the deployment of `make deploy`, moved to three servers, when all of them work."""
    _, one = moved()
    wait_for(lambda: whole(one.namespace), 120)
    return one


@pytest.fixture
def lost(replicated: Deployed) -> str:
    """Return the node of the primary, which is not the first node, for a test that loses this node and brings it back."""
    namespace, first = replicated.namespace, first_node(replicated)
    for _ in range(2):
        pod = str(primary(namespace))
        node = node_of(namespace, pod)
        if node != first:
            break
        on_server(namespace, pod, "hand-over")
    assert node != first
    return node


def test_three_servers_take_over_the_counts_of_one_and_run_on_three_nodes() -> None:
    (hits, posts), one = moved()
    assert wait_for(one.namespace.answered, 30) == (hits + 1, posts)
    pods = one.namespace.pods(REDIS)
    assert len({pod["spec"]["nodeName"] for pod in pods}) == len(pods) == len(SERVERS)


async def test_rolling_restart_fails_no_request(replicated: Deployed) -> None:
    namespace = replicated.namespace
    before = await counts(replicated.url)
    async with traffic(replicated.url, 100) as load:
        await step(namespace.kubectl, "rollout", "restart", "statefulset/redis")
        await step(namespace.await_rollout, "statefulset/redis")
    print(f"\n{load.statuses()}")
    assert not load.failures
    load.check(before, await counts(replicated.url))


@pytest.fixture
def spread(replicated: Deployed) -> Iterator[Deployed]:
    """Run three pods of the service, one on each node. Afterwards, run one pod on the first node again."""
    namespace = replicated.namespace
    run_service_on(replicated, None)
    namespace.await_rollout("deployment/hitcounter")
    scale(namespace, 3)
    assert sorted(nodes_of(namespace.pods())) == node_names(namespace)
    yield replicated
    run_service_on(replicated, first_node(replicated))
    scale(namespace, 1)
    namespace.await_rollout("deployment/hitcounter")


async def test_drain_of_each_node_fails_no_request(spread: Deployed) -> None:
    namespace = spread.namespace
    before = await counts(spread.url)
    handed_over, took = 0, []
    async with traffic(spread.url, 100) as load:
        for node in await step(node_names, namespace):
            old = str(await step(primary, namespace))
            assert node in nodes_of(await step(namespace.pods))  # the control: the drain has a pod of the service to evict
            try:
                took.append(await step(drain, node))
                assert node not in nodes_of([*await step(namespace.pods), *await step(namespace.pods, REDIS)])
                handed_over += await step(wait_for, lambda: primary(namespace), 60) != old
            finally:
                await step(uncordon, node)
            await step(wait_for, lambda: whole(namespace), 120)
    print(f"\ndrained in {', '.join(f'{one:.0f}' for one in took)} s; {handed_over} planned failovers; {load.statuses()}")
    assert handed_over
    assert not load.failures
    load.check(before, await counts(spread.url))


async def test_primary_deleted_by_force_loses_no_answered_hit(replicated: Deployed) -> None:
    namespace = replicated.namespace
    async with blows(replicated, "the primary's pod deleted with grace 0") as (_, windows, times):
        for _ in range(2):
            old = await step(primary, namespace)
            began = time.monotonic()
            await step(namespace.kubectl, "delete", "pod", old, "--grace-period=0", "--force")
            times.append(await windows.recover(began, namespace, functools.partial(primary, namespace, str(old))))
            await step(wait_for, lambda: whole(namespace), 120)


@pytest.mark.parametrize("how", ["kill", pytest.param("cut", marks=pytest.mark.slow)])
async def test_loss_of_the_primary_s_node_loses_no_answered_hit(replicated: Deployed, lost: str, how: str) -> None:
    namespace = replicated.namespace
    old = await step(primary, namespace)
    async with blows(replicated, f"the primary's node: {how}") as (_, windows, times):
        began = time.monotonic()
        await step(change_node, how, lost)
        try:
            times.append(await windows.recover(began, namespace, lambda: primary(namespace, old)))
        finally:
            began = time.monotonic()
            await step(bring_back, namespace, how, lost)
        # The old primary comes back under load, and must not accept a hit that is then lost.
        await step(wait_for, lambda: whole(namespace), 180)
        windows.all.append((began, time.monotonic()))


async def silent(load: Traffic) -> None:
    """Wait until no request of the load has been answered with 200 for 3 s, and check that this lasts 5 s more."""
    await step(wait_for, lambda: time.monotonic() - load.last_answered > 3, 60)
    last = load.last_answered
    await asyncio.sleep(5)
    assert load.last_answered == last


@pytest.mark.slow
@pytest.mark.parametrize("all_three", [False, True], ids=["two nodes", "all three servers"])
async def test_loss_of_more_than_one_server_stops_the_answers_and_loses_none(replicated: Deployed, all_three: bool) -> None:
    namespace, first = replicated.namespace, first_node(replicated)
    workers = [node for node in await step(node_names, namespace) if node != first]
    (here,) = [pod for pod in SERVERS if await step(node_of, namespace, pod) == first]
    (away,) = [pod for pod in SERVERS if await step(node_of, namespace, pod) == workers[1]]
    async with blows(replicated, "two nodes killed" + ", and the third server" * all_three) as (load, windows, times):
        began = time.monotonic()
        try:
            for node in workers:
                await step(change_node, "kill", node)
            if all_three:
                await step(namespace.kubectl, "delete", "pod", here, "--grace-period=0", "--force")
            await silent(load)
            since = time.monotonic()
            await step(bring_back, namespace, "kill", workers[0])
            await windows.recover(began, namespace, lambda: primary(namespace, away))
            times.append(time.monotonic() - since)
        finally:
            for node in workers:
                await step(bring_back, namespace, "kill", node)
        await step(wait_for, lambda: whole(namespace), 180)


@pytest.mark.slow
async def test_passwords_are_rotated_without_a_failed_request(replicated: Deployed) -> None:
    namespace = replicated.namespace
    users = "hitcounter", "probe", "operator", "replica", "sentinel"
    read = [namespace.kubectl("exec", "redis-1", "--", "cat", f"/run/secrets/redis/{user}").strip() for user in users]
    async with traffic(replicated.url, 100) as load:
        await step(namespace.make, "secret-rotate")
    print(f"\n{load.statuses()}")
    assert not load.failures
    for user, password in zip(users, read, strict=True):
        for container in "redis", "redis-sentinel":
            script = 'REDISCLI_AUTH=$2 exec valkey-cli -s /run/valkey/socket --user "$1" PING'
            said = namespace.kubectl(
                "exec", "redis-1", f"--container={container}", "--", "sh", "-c", script, "sh", user, password
            )
            assert re.search("WRONGPASS|NOAUTH", said), (user, container)
    wait_for(lambda: whole(namespace), 60)


@pytest.mark.slow
def test_restore_brings_back_the_counts_of_the_backup(replicated: Deployed, tmp_path: Path) -> None:
    namespace, file = replicated.namespace, tmp_path / "hitcounter.rdb"
    hits, posts = namespace.counts()
    namespace.make("backup", f"FILE={file}")
    for _ in range(3):
        namespace.counts()
    namespace.make("restore", f"FILE={file}")
    assert wait_for(namespace.answered, 60) == (hits + 1, posts)
    wait_for(lambda: whole(namespace), 60)


ON_SERVERS: list[tuple[str, ...]] = [
    ("replica", "GET", "{hitcounter}:hits"), ("replica", "REPLICAOF", "NO", "ONE"), ("sentinel", "GET", "{hitcounter}:hits"),
    ("sentinel", "CONFIG", "SET", "appendonly", "no"), ("sentinel", "SHUTDOWN"), ("operator", "FAILOVER"),
    ("hitcounter", "REPLICAOF", "NO", "ONE"),
]  # fmt: skip
ON_SENTINELS: list[tuple[str, ...]] = [
    ("hitcounter", "SENTINEL", "FAILOVER", "primary"), ("hitcounter", "SENTINEL", "SET", "primary", "quorum", "1"),
    ("operator", "SENTINEL", "REMOVE", "primary"), ("sentinel", "SENTINEL", "RESET", "*"), ("probe", "INFO"),
]  # fmt: skip


def test_users_may_not_do_more_than_they_need(replicated: Deployed) -> None:
    def ask(container: str, user: str, *command: str) -> str:
        script = 'REDISCLI_AUTH=$(cat "/run/secrets/redis/$1"); export REDISCLI_AUTH; user=$1; shift;'
        script += 'exec valkey-cli -s /run/valkey/socket --user "$user" "$@"'
        pod = ["exec", "redis-1", f"--container={container}"]
        return replicated.namespace.kubectl(*pod, "--", "sh", "-c", script, "sh", user, *command).strip()

    for container, denied in (("redis", ON_SERVERS), ("redis-sentinel", ON_SENTINELS)):
        for command in denied:
            assert ask(container, *command).startswith("NOPERM"), command
    # The control: each user may run the commands that it needs.
    assert ask("redis", "probe", "ROLE")
    assert ask("redis-sentinel", "hitcounter", "SENTINEL", "GET-MASTER-ADDR-BY-NAME", "primary").endswith("6379")


@pytest.mark.slow
def test_tls_component_encrypts_replication_and_survives_a_hand_over(replicated: Deployed, other: Namespace) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert(*SERVERS)
    data: dict[str, Any] = {
        "ca.crt": authority.cert_pem.bytes().decode(),
        "tls.crt": b"".join(part.bytes() for part in certificate.cert_chain_pems).decode(),
        "tls.key": certificate.private_key_pem.bytes().decode(),
    }
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "redis-tls"}, "stringData": data}
    other.apply(json.dumps(secret | {"type": "kubernetes.io/tls"}))
    install(replicated, other, "components: [../components/redis-replicated-tls]")
    assert wait_for(other.answered, 30) == (1, 0)
    old = primary(other)
    assert old
    on_server(other, old, "hand-over")
    assert wait_for(lambda: primary(other), 30) != old
    assert wait_for(other.answered, 30) == (2, 0)
    for port in "6379", "26379":
        script = 'timeout 3 valkey-cli -h redis-1 -p "$1" PING 2>&1 || true'
        said = other.kubectl("exec", "redis-0", "--container=redis", "--", "sh", "-c", script, "sh", port)
        assert not re.search("NOAUTH|PONG", said)  # without TLS, no server and no Sentinel answers


@pytest.mark.slow
def test_chart_installs_three_servers_with_the_objects_of_kustomize(other: Namespace) -> None:
    other.make("secret")
    check_installation(other, production(other, "redis-replicated"), "--set=store.kind=replicated")
    assert len(set(nodes_of(other.pods(REDIS)))) == 3


@pytest.mark.slow
def test_chart_moves_from_one_server_to_three(other: Namespace) -> None:
    """The test follows the steps in chart/README.md."""
    helm_in(other, "install", str(CHART), *images(), "--wait")
    assert wait_for(other.answered, 60) == (1, 0)
    helm_in(other, "upgrade", str(CHART), *images(), "--set=store.kind=replicated")
    other.kubectl("delete", "pod", "redis-0")
    for what in "statefulset/redis", "deployment/hitcounter":
        other.await_rollout(what)
    assert wait_for(other.answered, 60) == (2, 0)
    assert other.kubectl("diff", "--filename=-", input=production(other, "redis-replicated")) == ""


@pytest.mark.slow
def test_one_server_takes_over_the_counts_of_three(replicated: Deployed) -> None:
    """This test must be the last one, because it undoes `moved`."""
    namespace = replicated.namespace
    hits, posts = namespace.counts()
    for _ in range(4):
        pod = primary(namespace)
        if pod == "redis-0":
            break
        # Sentinel chooses the new primary. With one replica less, it can choose only redis-0.
        (spare,) = {"redis-1", "redis-2"} - {str(pod)}
        namespace.kubectl("delete", "pod", spare, "--wait=false")
        on_server(namespace, str(pod), "hand-over")
        wait_for(lambda: whole(namespace), 120)
    assert primary(namespace) == "redis-0"
    namespace.kubectl("scale", "statefulset/redis", "--replicas=1")
    namespace.kubectl("wait", "--for=delete", "pod/redis-1", "pod/redis-2", "--timeout=120s")
    change_store(replicated)
    for what in "statefulset/redis", "deployment/hitcounter":
        namespace.await_rollout(what)
    assert wait_for(namespace.answered, 60) == (hits + 1, posts)
    moved.cache_clear()
