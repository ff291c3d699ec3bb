"""What `make deploy` leaves: it counts, is ready soon, warns of nothing, and tells no secret."""

import time
from pathlib import Path

import pytest
from cluster import KUBECTL, SERVICE, Deployed, cluster, compose, counts, deployed, namespace, run
from conftest import ROOT, wait_for
from processes import processes

__all__ = ["cluster"]  # a fixture

pytestmark = pytest.mark.cluster

# What a start may bring: the first look comes before the service listens, or before Redis is there.
EXPECTED = [
    ("Unhealthy", "Startup probe failed: Get "),
    ("Unhealthy", "Readiness probe failed: HTTP probe failed with statuscode: 503"),
    ("Unhealthy", "Readiness probe failed: Could not connect to Valkey at /run/valkey/socket"),
]


async def test_deployed_service_counts_and_warns_of_nothing() -> None:
    one = deployed()
    hits, posts = await counts(one.url)
    assert await counts(one.url) == (hits + 1, posts)
    enforced = one.namespace.get("namespace", one.namespace.name)["metadata"]["labels"]["pod-security.kubernetes.io/enforce"]
    assert enforced == "restricted"
    unexpected = [
        warning for warning in one.warnings if not any(warning[0] == a and warning[1].startswith(b) for a, b in EXPECTED)
    ]
    assert not unexpected


def test_cold_pod_is_ready_within_three_seconds(cluster: Deployed) -> None:
    ours = cluster.namespace
    (first,) = ours.ready()
    began = time.monotonic()
    ours.kubectl("scale", "deployment/hitcounter", "--replicas=2")
    wait_for(lambda: len(ours.pods()) == 2, 10)
    (new,) = [pod["metadata"]["name"] for pod in ours.pods() if pod["metadata"]["name"] != first]
    ours.kubectl("wait", "--for=condition=Ready", f"pod/{new}", "--timeout=60s")
    seconds = time.monotonic() - began
    print(f"\nready {seconds:.1f} s after it was asked for")
    assert seconds < 3 * 3  # the machines are shared: three times what is promised


def test_deploying_again_changes_nothing(cluster: Deployed) -> None:
    ours = cluster.namespace
    ours.make("deploy", seconds=900)  # it takes back what other tests changed
    before = [pod["metadata"]["uid"] for pod in ours.pods("app.kubernetes.io/part-of=hitcounter")]
    assert ours.make("deploy", seconds=900).splitlines()[-1] == cluster.url
    assert [pod["metadata"]["uid"] for pod in ours.pods("app.kubernetes.io/part-of=hitcounter")] == before


def test_image_that_cannot_be_pushed_is_not_deployed(cluster: Deployed) -> None:
    with pytest.raises(AssertionError, match="localhost:1/"):
        cluster.namespace.make("deploy", "REGISTRY=localhost:1", seconds=300)
    (container,) = cluster.namespace.get("deployment", "hitcounter")["spec"]["template"]["spec"]["containers"]
    assert container["image"] == cluster.image


def test_cluster_that_does_not_answer_is_told() -> None:
    with pytest.raises(AssertionError, match=r"make: no cluster answers; start one \(minikube start\)"):
        run("make", "deploy", env={"KUBECONFIG": "/dev/null"})


def test_rendered_manifests_are_those_of_the_sources(tmp_path: Path) -> None:
    run(str(ROOT / "manifests" / "render.sh"), str(tmp_path), env={"KUBECTL": KUBECTL})
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


def test_secrets_are_made_once_and_told_to_nobody(cluster: Deployed) -> None:
    with namespace("secrets") as one, processes() as seen:
        said = one.make("secret")
        made = [one.get("secret", name)["data"] for name in ("redis-users", "hitcounter-redis")]
        assert one.make("secret") == ""
        assert [one.get("secret", name)["data"] for name in ("redis-users", "hitcounter-redis")] == made
        passwords = one.kubectl(
            "get", "secrets", "--output=go-template={{range .items}}{{range .data}}{{base64decode .}}{{end}}{{end}}"
        ).split()
        described = one.kubectl("describe", "secrets")
    assert "create secret generic redis-users" in "".join(seen)  # it was watched
    assert len(set(passwords)) == 3
    assert len(passwords) == 4  # the service's is in both
    for password in passwords:
        assert len(password) == 64
        assert password not in said + described + "".join(seen)


def test_passwords_are_in_no_log_event_or_description(cluster: Deployed) -> None:
    ours = cluster.namespace
    (pod,) = ours.ready()
    passwords = ours.kubectl("exec", "redis-0", "--", "sh", "-c", "cat /run/secrets/redis/*").split()
    assert len(passwords) == 3
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
    assert passwords[0] in ours.kubectl("exec", "redis-0", "--", "cat", "/run/secrets/redis/hitcounter")  # it would be found


def test_service_selects_only_the_service(cluster: Deployed) -> None:
    slices = cluster.namespace.get("endpointslices", "--selector=kubernetes.io/service-name=hitcounter")
    ports = [port["port"] for one in slices for port in one["ports"]]
    assert ports == [8080]
    assert len([endpoint for one in slices for endpoint in one["endpoints"]]) == len(cluster.namespace.pods(SERVICE))
