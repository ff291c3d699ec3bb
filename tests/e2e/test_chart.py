"""With Helm, the chart is installed, upgraded, rolled back, tested and uninstalled, and takes over what `make deploy` made."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
import yaml

from nanoservice.testing.waiting import wait_for
from tests.e2e.test_variants import redis_outside, renew_certificate, set_password
from tests.support import ROOT
from tests.support.cluster import KUBECTL, Deployed, Namespace, compose, deployed, namespace, run
from tests.support.helm import helm
from tests.support.traffic import counts, step, traffic

pytestmark = pytest.mark.cluster

CHART = ROOT / "chart"
PORT = 30180  # `make deploy` uses the service's own port of the node


def images() -> list[str]:
    """Return the values that name the images of this run."""
    one = deployed()
    return [f"--set=services.hitcounter.image={one.image},store.image={one.valkey}"]


def helm_in(one: Namespace, command: str, *arguments: str) -> str:
    """Run Helm for the release `counter` in a namespace, and return its output."""
    words = command.split()
    ended = helm(*words, "counter", *arguments, f"--namespace={one.name}", check=False, seconds=400)
    output = ended.stdout + ended.stderr
    assert ended.returncode == 0, output
    return output


@pytest.fixture
def empty() -> Iterator[Namespace]:
    """Create an empty namespace as chart/README.md says, and yield it."""
    with namespace("chart") as one:
        yield one


@pytest.fixture
def previous(tmp_path: Path) -> Path:
    """Return a chart of the version before, in which the service has another setting."""
    copy = Path(shutil.copytree(CHART, tmp_path / "previous"))
    chart = copy / "Chart.yaml"
    chart.write_text(re.sub(r"(?m)^version: .*", "version: 0.0.1", chart.read_text()))
    for file in (copy / "manifests").iterdir():
        # Kustomize gives the ConfigMap of each version another name.
        text = re.sub(r"hitcounter-[0-9a-z]{10}\b", "hitcounter-0000000000", file.read_text())
        file.write_text(text.replace("  REDIS_USERNAME: hitcounter\n", '  LANES: "3"\n  REDIS_USERNAME: hitcounter\n'))
    return copy


async def test_upgrade_and_rollback_fail_no_request(empty: Namespace, cluster: Deployed, previous: Path) -> None:
    values = [*images(), f"--set=expose=nodePort,services.hitcounter.nodePort={PORT},services.hitcounter.replicas=2", "--wait"]
    said = await step(helm_in, empty, "install", str(previous), *values)
    assert "helm test --namespace=" in said
    url = re.sub(r":\d+/", f":{PORT}/", cluster.url)
    passwords = await step(empty.get, "secret", "redis-users")
    revisions = [await step(config, empty)]
    before = await counts(url)
    async with traffic(url, 100) as load:
        await step(helm_in, empty, "upgrade", str(CHART), *values)
        revisions.append(await step(config, empty))
        # The value `settings` does not rename the ConfigMap, so only the annotation with the checksum replaces the pods.
        await step(helm_in, empty, "upgrade", str(CHART), *values, "--set=services.hitcounter.settings.LANES=2")
        revisions.append(await step(config, empty))
        # A rollback must not bring back the passwords of its revision, which Redis no longer accepts.
        await step(empty.make, "secret-rotate")
        rotated = await step(empty.get, "secret", "redis-users")
        await step(helm_in, empty, "rollback", "1", "--wait")
        revisions.append(await step(config, empty))
    print(f"\n{load.statuses()}")
    assert not load.failures
    load.check(before, await counts(url))
    assert [one.get("LANES") for one in revisions] == ["3", None, "2", "3"]
    after = await step(empty.get, "secret", "redis-users")
    assert after["metadata"]["uid"] == passwords["metadata"]["uid"]
    assert after["data"] == rotated["data"] != passwords["data"]


def config(one: Namespace) -> dict[str, str]:
    """Return the settings in the environment of a running pod that is not older than the Deployment's template."""
    wait_for(lambda: len(one.pods()) == 2, 60)
    script = "import json, os; print(json.dumps(dict(os.environ)))"
    found = [json.loads(one.python(pod, script)) for pod in one.ready()]
    assert found[0].get("LANES") == found[1].get("LANES")
    return dict(found[0])


def production(one: Namespace, *components: str) -> str:
    """Return the objects of the variant `production` with `components`, for a namespace and with the images of this run.

    Give the namespace the labels of this variant, because the chart does not.
    """
    folders = ", ".join(f"../components/{name}" for name in components)
    text = compose(deployed(), one, f"resources: [../production]\ncomponents: [{folders}]")
    text = re.sub(r"registry\.example\.com/hitcounter@sha256:0{64}", deployed().image, text)
    assert text.count(f"image: {deployed().image}\n") == 1
    (labels,) = (it["metadata"]["labels"] for it in yaml.safe_load_all(text) if it["kind"] == "Namespace")
    run(KUBECTL, "label", "--overwrite", "namespace", one.name, *(f"{key}={value}" for key, value in labels.items()))
    return text


def check_installation(one: Namespace, text: str, *values: str) -> None:
    """Install the chart with `values`. Fail unless the service counts, and the objects are those of `text`."""
    helm_in(one, "install", str(CHART), *images(), "--set=passwords.create=false", *values, "--wait")
    assert wait_for(one.answered, 60) == (1, 0)
    assert one.kubectl("diff", "--filename=-", input=text) == ""
    with pytest.raises(AssertionError, match="-  progressDeadlineSeconds: 120"):  # the control
        one.kubectl("diff", "--filename=-", input=text.replace("progressDeadlineSeconds: 120", "progressDeadlineSeconds: 121"))


def test_installed_objects_are_those_of_kustomize(empty: Namespace) -> None:
    empty.make("secret")
    check_installation(empty, production(empty))


@pytest.mark.usefixtures("custom_resources")
def test_installed_objects_with_tls_and_monitoring_are_those_of_kustomize(empty: Namespace) -> None:
    empty.make("secret")
    renew_certificate(empty, trustme.CA())
    text = production(empty, "redis-tls", "monitoring")
    check_installation(empty, text, "--set=store.tls=true,monitoring.enabled=true")


def test_installed_objects_with_a_redis_outside_are_those_of_kustomize(empty: Namespace, cluster: Deployed) -> None:
    with redis_outside(cluster) as (address, password):
        set_password(empty, password)
        text = production(empty, "redis-outside").replace('REDIS_TLS: "true"', 'REDIS_TLS: "false"')
        text = text.replace("redis.example.com", address).replace("192.0.2.0/24", f"{address}/32")
        check_installation(empty, text, f"--set=store.kind=outside,store.host={address},store.cidr={address}/32")


def test_smoke_test_counts_and_uninstall_keeps_the_data_and_says_so(empty: Namespace) -> None:
    values = [*images(), "--set=expose=none,autoscaling=false", "--wait"]
    helm_in(empty, "install", str(CHART), *values)
    said = helm_in(empty, "test")
    assert re.search("Phase: +Succeeded", said)
    assert "it counts: {'hits'" in said
    hits, posts = empty.counts()
    said = helm_in(empty, "uninstall", "--wait")
    assert f"kubectl --namespace={empty.name} delete persistentvolumeclaim data-redis-0" in said
    wait_for(lambda: not empty.pods() and not empty.get("pods"), 90)
    assert [one["metadata"]["name"] for one in empty.get("persistentvolumeclaims")] == ["data-redis-0"]
    assert not empty.get("jobs,configmaps,networkpolicies", "--selector=app.kubernetes.io/part-of=hitcounter")
    helm_in(empty, "install", str(CHART), *values)
    assert empty.counts() == (hits + 1, posts)


def test_smoke_test_fails_without_redis_until_a_forced_upgrade(empty: Namespace) -> None:
    values = [*images(), "--set=expose=none,autoscaling=false", "--wait"]
    helm_in(empty, "install", str(CHART), *values)
    empty.kubectl("scale", "statefulset/redis", "--replicas=0")
    empty.kubectl("wait", "--for=delete", "pod/redis-0", "--timeout=60s")
    with pytest.raises(AssertionError, match="HTTP Error 503"):
        helm_in(empty, "test")
    # With --force-conflicts, an upgrade replaces a field that kubectl has changed. Without it, upgrades and rollbacks fail.
    empty.kubectl("set", "resources", "deployment/hitcounter", "--limits=memory=300Mi")
    for command, *arguments in ["upgrade", str(CHART), *values], ["rollback", "1"]:
        with pytest.raises(AssertionError, match=r'conflict with "kubectl-set".*\.resources\.limits\.memory'):
            helm_in(empty, command, *arguments)
    helm_in(empty, "upgrade", str(CHART), *values, "--force-conflicts")
    assert "300Mi" not in json.dumps(empty.get("deployment", "hitcounter")["spec"])
    assert re.search("Phase: +Succeeded", helm_in(empty, "test"))


def test_chart_takes_over_what_make_deploy_made(cluster: Deployed) -> None:
    one = cluster.namespace
    one.make("deploy", seconds=300)  # an earlier test may have changed the objects with kubectl
    wait_for(lambda: len(one.get("pods")) == 2, 90, "no old pod is left")
    hits, posts = one.counts()

    def uids(*kinds: str) -> dict[str, Any]:
        found = one.get(",".join(kinds))
        return {f"{it['kind']}/{it['metadata']['name']}": it["metadata"]["uid"] for it in found}

    running, secrets = uids("pods", "deployments", "statefulsets", "services", "networkpolicies"), uids("secrets")
    values = [*images(), "--set=expose=nodePort,autoscaling=false"]
    with pytest.raises(AssertionError, match="exists and cannot be imported into the current release"):  # the control
        helm_in(one, "install", str(CHART), *values)
    try:
        helm_in(one, "install", str(CHART), *values, "--take-ownership", "--force-conflicts", "--wait")
        assert uids("pods", "deployments", "statefulsets", "services", "networkpolicies") == running
        assert uids("secrets").items() >= secrets.items()
        assert one.counts() == (hits + 1, posts)
        helm_in(one, "upgrade", str(CHART), *values, "--set=services.hitcounter.replicas=2", "--wait")
        assert len(one.ready()) == 2
        assert one.counts() == (hits + 2, posts)
    finally:
        # Delete only Helm's record of the release, because other tests use the objects of `make deploy`.
        one.kubectl("delete", "secrets", "--selector=owner=helm")
