"""After `make deploy`, the service counts, new pods are soon ready, nothing warns, and no command reveals a secret."""

import re
import time
from pathlib import Path

import pytest

from nanoservice.testing.waiting import SLACK, wait_for
from tests.support import ROOT
from tests.support.cluster import KUBECTL, SERVICE, Deployed, Namespace, compose, deployed, namespace, run
from tests.support.command_lines import processes
from tests.support.traffic import counts

pytestmark = pytest.mark.cluster

# A start may cause these events, because the first probe may run before the service listens or before Redis answers.
EXPECTED = [
    r"Unhealthy Startup probe failed: Get ",
    r"Unhealthy Readiness probe failed: HTTP probe failed with statuscode: 503",
    r"Unhealthy Readiness probe failed: Could not connect to Valkey at /run/valkey/socket",
    # The events below happen on a busy node, and the pod recovers by itself.
    r"Unhealthy Readiness probe failed: (Get |command timed out)",
    r"FailedMount .* failed to sync (secret|configmap) cache: timed out",
    r'FailedScheduling .*persistentvolumeclaim "data-redis-0" not found',
]


async def test_deployed_service_counts_and_warns_of_nothing() -> None:
    one = deployed()
    hits, posts = await counts(one.url)
    assert await counts(one.url) == (hits + 1, posts)
    enforced = one.namespace.get("namespace", one.namespace.name)["metadata"]["labels"]["pod-security.kubernetes.io/enforce"]
    assert enforced == "restricted"
    assert not [warning for warning in one.warnings if not re.match("|".join(EXPECTED), " ".join(warning))]


def seconds_until_ready(namespace: Namespace) -> float:
    """Scale the service from one pod to two. Return the seconds until the new pod is ready."""
    namespace.kubectl("scale", "deployment/hitcounter", "--replicas=1")
    wait_for(lambda: len(namespace.pods()) == 1, 60)
    (first,) = namespace.ready()
    began = time.monotonic()
    namespace.kubectl("scale", "deployment/hitcounter", "--replicas=2")
    wait_for(lambda: len(namespace.pods()) == 2, 10)
    (new,) = [pod["metadata"]["name"] for pod in namespace.pods() if pod["metadata"]["name"] != first]
    namespace.kubectl("wait", "--for=condition=Ready", f"pod/{new}", "--timeout=60s")
    return time.monotonic() - began


def test_cold_pod_is_ready_within_three_seconds(cluster: Deployed) -> None:
    took: list[float] = []
    # The first readiness check fails if it runs before the network policies know the new pod, because then the pod cannot reach
    # Redis. The next check runs 5 s later. This does not happen every time, so try up to three times.
    while not took or (min(took) >= 3 * SLACK and len(took) < 3):
        took.append(seconds_until_ready(cluster.namespace))
    print(f"\nready {min(took):.1f} s after the pod was requested")
    assert min(took) < 3 * SLACK


def test_deploying_again_changes_nothing(cluster: Deployed) -> None:
    ours = cluster.namespace
    ours.make("deploy", seconds=900)  # this reverts the changes of other tests
    before = [pod["metadata"]["uid"] for pod in ours.pods("app.kubernetes.io/part-of=hitcounter")]
    assert ours.make("deploy", seconds=900).splitlines()[-1] == cluster.url
    assert [pod["metadata"]["uid"] for pod in ours.pods("app.kubernetes.io/part-of=hitcounter")] == before


def test_image_that_cannot_be_pushed_is_not_deployed(cluster: Deployed) -> None:
    with pytest.raises(AssertionError, match="localhost:1/"):
        cluster.namespace.make("deploy", "REGISTRY=localhost:1", seconds=300)
    (container,) = cluster.namespace.get("deployment", "hitcounter")["spec"]["template"]["spec"]["containers"]
    assert container["image"] == cluster.image


def test_undeploy_deletes_only_a_namespace_of_the_service() -> None:
    with namespace("away") as one:
        one.kubectl("create", "configmap", "something")
        with pytest.raises(AssertionError, match="is not this service's"):
            one.make("undeploy")
        assert "something" in one.kubectl("get", "configmaps")
        run(KUBECTL, "label", "namespace", one.name, "app.kubernetes.io/part-of=hitcounter")
        one.make("undeploy")
        assert run(KUBECTL, "get", "namespace", one.name, "--ignore-not-found") == ""


def test_cluster_that_does_not_answer_is_reported() -> None:
    with pytest.raises(
        AssertionError, match=r"make: the cluster's version cannot be read \(see above\): start a cluster \(minikube start\)"
    ):
        run("make", "deploy", env={"KUBECONFIG": "/dev/null"})


def test_rendered_manifests_are_those_of_the_sources(tmp_path: Path) -> None:
    run("sh", "scripts/manifests.sh", str(tmp_path), env={"KUBECTL": KUBECTL})
    committed = ROOT / "manifests" / "rendered"
    assert {file.name for file in tmp_path.iterdir()} == {file.name for file in committed.iterdir()}
    for file in tmp_path.iterdir():
        assert file.read_text() == (committed / file.name).read_text(), f"{file.name} is stale; run: make manifests"


@pytest.mark.parametrize("components", ["", "redis-tls", "redis-outside"])
def test_production_is_accepted_by_the_api(cluster: Deployed, components: str) -> None:
    with namespace("production") as one:
        chosen = f"components: [../components/{components}]" if components else ""
        text = compose(cluster, one, "resources: [../production]", chosen)
        said = one.kubectl("apply", "--dry-run=server", "--filename=-", input=text)
        for kind in (
            "deployment.apps",
            "horizontalpodautoscaler.autoscaling",
            "ingress.networking.k8s.io",
            "poddisruptionbudget.policy",
        ):
            assert f"{kind}/hitcounter " in said
        assert ("statefulset.apps/redis " in said) == (components != "redis-outside")


def test_secrets_are_made_once_and_revealed_nowhere(cluster: Deployed, tmp_path: Path) -> None:
    slow = tmp_path / "kubectl"  # each kubectl runs long enough for the test to see its command line
    slow.write_text(f'#!/bin/sh\nsleep 0.3\nexec {KUBECTL} "$@"\n')
    slow.chmod(0o755)
    with namespace("secrets") as one, processes() as seen:
        said = one.make("secret", f"KUBECTL={slow}")
        made = [one.get("secret", name)["data"] for name in ("redis-users", "hitcounter-redis")]
        assert one.make("secret") == ""
        assert [one.get("secret", name)["data"] for name in ("redis-users", "hitcounter-redis")] == made
        passwords = one.kubectl(
            "get", "secrets", "--output=go-template={{range .items}}{{range .data}}{{base64decode .}}{{end}}{{end}}"
        ).split()
        described = one.kubectl("describe", "secrets")
    assert "create secret generic redis-users" in "".join(seen)  # the control: the test saw the command lines
    assert len(set(passwords)) == 5
    assert len(passwords) == 6  # both secrets contain the service's password
    for password in passwords:
        assert len(password) == 64
        assert password not in said + described + "".join(seen)


def test_passwords_are_in_no_log_event_or_description(cluster: Deployed) -> None:
    ours = cluster.namespace
    (pod,) = ours.ready()
    passwords = ours.kubectl("exec", "redis-0", "--", "sh", "-c", "cat /run/secrets/redis/*").split()
    assert len(passwords) == 5
    told = [
        ours.kubectl("logs", pod),
        ours.kubectl("logs", "redis-0"),
        ours.kubectl("get", "events", "--output=yaml"),
        ours.kubectl("describe", "all,configmaps,secrets"),
        ours.kubectl("get", "all,configmaps", "--output=yaml"),
        ours.kubectl("exec", "redis-0", "--", "sh", "-c", "cat /proc/[0-9]*/cmdline /proc/1/environ | tr '\\0' ' '"),
        ours.python(pod, "print(open('/proc/1/cmdline').read(), open('/proc/1/environ').read())"),
    ]
    assert all(told)
    for password in passwords:
        assert not [text for text in told if password in text]
    assert passwords[0] in ours.kubectl(
        "exec", "redis-0", "--", "cat", "/run/secrets/redis/hitcounter"
    )  # the control: the same search finds a password in a text that has it


def test_service_selects_only_the_service(cluster: Deployed) -> None:
    slices = cluster.namespace.get("endpointslices", "--selector=kubernetes.io/service-name=hitcounter")
    ports = [port["port"] for one in slices for port in one["ports"]]
    assert ports == [8080]
    ready = [endpoint for one in slices for endpoint in one["endpoints"] if endpoint["conditions"]["ready"]]
    assert len(ready) == len(cluster.namespace.pods(SERVICE))
