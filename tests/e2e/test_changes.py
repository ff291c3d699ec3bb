"""No request fails when an operator rolls, scales or reconfigures the service, evicts a pod, or rotates the passwords."""

import json
import re
from pathlib import Path

import pytest

from nanoservice.testing.waiting import wait_for
from tests.support.cluster import KUBECTL, Deployed, Namespace
from tests.support.command_lines import processes
from tests.support.traffic import counts, step, traffic

pytestmark = pytest.mark.cluster


def scale(namespace: Namespace, replicas: int) -> None:
    namespace.kubectl("scale", "deployment/hitcounter", f"--replicas={replicas}")
    wait_for(lambda: len(namespace.ready()) == len(namespace.pods()) == replicas, 120)


def evict(namespace: Namespace, pod: str) -> None:
    """Evict a pod as `kubectl drain` does. Raise an error if the disruption budget refuses the eviction."""
    body = f'{{"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {{"name": "{pod}", "namespace": "{namespace.name}"}}}}'
    path = f"/api/v1/namespaces/{namespace.name}/pods/{pod}/eviction"
    namespace.kubectl("create", f"--raw={path}", "--filename=-", input=body)


def change_config(namespace: Namespace) -> None:
    """Change a setting as a deployment does: make a ConfigMap with another name, and make the pods use the new ConfigMap."""
    container = namespace.get("deployment", "hitcounter")["spec"]["template"]["spec"]["containers"][0]
    config = container["envFrom"][0]["configMapRef"]["name"]
    data = namespace.get("configmap", config)["data"] | {"LANES": "3"}
    following = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": f"{config}-next"}, "data": data}
    namespace.apply(json.dumps(following))
    patch = (
        f'[{{"op": "replace", "path": "/spec/template/spec/containers/0/envFrom/0/configMapRef/name", "value": "{config}-next"}}]'
    )
    namespace.kubectl("patch", "deployment/hitcounter", "--type=json", f"--patch={patch}")
    namespace.await_rollout("deployment/hitcounter")


def roll(namespace: Namespace) -> None:
    namespace.kubectl("rollout", "restart", "deployment/hitcounter")
    namespace.await_rollout("deployment/hitcounter")


def scale_up_and_down(namespace: Namespace) -> None:
    for replicas in (3, 1, 2):
        scale(namespace, replicas)


def await_budget(namespace: Namespace) -> None:
    """Wait up to 60 s until the disruption budget allows an eviction, which happens a moment after both pods are ready."""

    def allows_one() -> bool:
        status = namespace.get("poddisruptionbudget", "hitcounter")["status"]
        return (status.get("expectedPods"), status.get("disruptionsAllowed")) == (2, 1)

    wait_for(allows_one, 60)


def evict_one(namespace: Namespace) -> None:
    await_budget(namespace)
    evict(namespace, namespace.ready()[0])
    wait_for(lambda: len(namespace.ready()) == len(namespace.pods()) == 2, 120)


async def test_changes_fail_no_request(cluster: Deployed) -> None:
    before = await counts(cluster.url)
    done = []
    async with traffic(cluster.url, 250, least=20_000) as load:
        while load.sent < 15_000:  # spread the changes over the load
            for change in (roll, scale_up_and_down, evict_one, change_config):
                await step(change, cluster.namespace)
                done.append(f"{change.__name__} by {load.sent}")
    print(f"\n{', '.join(done)}; {load.statuses()}")
    assert load.sent >= 20_000
    assert not load.failures
    load.check(before, await counts(cluster.url))


async def test_eviction_beyond_the_budget_is_refused(cluster: Deployed) -> None:
    namespace = cluster.namespace
    await step(scale, namespace, 2)
    await step(await_budget, namespace)
    first, second = await step(namespace.ready)
    await step(evict, namespace, first)
    with pytest.raises(AssertionError, match="disruption budget"):
        await step(evict, namespace, second)


async def test_passwords_are_rotated_without_a_failed_request(cluster: Deployed) -> None:
    namespace = cluster.namespace
    old = namespace.kubectl("exec", "redis-0", "--", "cat", "/run/secrets/redis/hitcounter").strip()
    assert namespace.valkey("PING", user="hitcounter", password=old) == "PONG"
    with processes() as seen:
        async with traffic(cluster.url, 100) as load:
            said = await step(namespace.make, "secret-rotate")
    print(f"\n{load.statuses()}")
    assert not load.failures
    new = namespace.kubectl("exec", "redis-0", "--", "cat", "/run/secrets/redis/hitcounter").strip()
    assert old != new
    assert "redis.sh load-users" in "".join(seen)  # the control: the test saw the rotation's command lines
    for password in (old, new):
        assert password not in said + "".join(seen)
    assert namespace.valkey("PING", user="hitcounter", password=new) == "PONG"
    assert re.search("WRONGPASS|NOAUTH", namespace.valkey("PING", user="hitcounter", password=old))
    namespace.kubectl("delete", "pod", "redis-0")  # after a restart, too, Redis accepts only the new password
    namespace.await_rollout("statefulset/redis")
    assert namespace.valkey("PING", user="hitcounter", password=new) == "PONG"
    assert re.search("WRONGPASS|NOAUTH", namespace.valkey("PING", user="hitcounter", password=old))


# This script stands in for kubectl. It counts the commands that contain $STEP, and fails from the $AT-th of them on. It passes
# all other commands to the real kubectl.
_CUT = """#!/bin/sh
case "$*" in
  *"$STEP"*) echo >>"$0.seen"; [ "$(wc -l <"$0.seen")" -lt "$AT" ] || { echo "cut short before: $STEP" >&2; exit 1; } ;;
esac
exec KUBECTL "$@"
"""


def test_rotation_survives_an_interruption_at_any_step_and_a_restart_of_redis(cluster: Deployed, tmp_path: Path) -> None:
    namespace = cluster.namespace
    hits, posts = namespace.counts()
    old = namespace.kubectl("exec", "redis-0", "--", "cat", "/run/secrets/redis/hitcounter").strip()
    seen: set[str] = set()
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(_CUT.replace("KUBECTL", KUBECTL))
    kubectl.chmod(0o755)
    for action, at in (
        ("redis.sh load-users", 1), ("apply", 2), ("rollout restart", 1), ("apply", 2), ("redis.sh load-users", 2),
    ):  # fmt: skip
        (tmp_path / "kubectl.seen").unlink(missing_ok=True)
        with pytest.raises(AssertionError, match=f"cut short before: {action}"):
            namespace.make("secret-rotate", f"KUBECTL={kubectl}", env={"STEP": action, "AT": str(at)})
        namespace.kubectl("delete", "pod", "redis-0")
        namespace.await_rollout("statefulset/redis")
        hits += 1
        assert wait_for(namespace.answered, 30) == (hits, posts)
        seen |= set(namespace.kubectl("exec", "redis-0", "--", "cat", "/run/secrets/redis/hitcounter").split())
    assert len(seen) == 2  # an interrupted rotation continues with the new password that it had already made
    assert namespace.make("secret-rotate").endswith("Redis accepts the new passwords only\n")
    assert wait_for(namespace.answered, 30) == (hits + 1, posts)
    for password in seen:
        assert re.search("WRONGPASS|NOAUTH", namespace.valkey("PING", user="hitcounter", password=password))
    assert old in seen
