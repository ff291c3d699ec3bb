"""Bundles are deployed, upgraded and rolled back without internet. Nodes pull only from the registry with the bundle's images."""

import asyncio
import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from nanoservice import __version__ as VERSION
from nanoservice.testing.waiting import wait_for
from tests.support.bundle import copy, make, unpack
from tests.support.cluster import KUBECTL, RUN, Deployed, Namespace, namespace
from tests.support.helm import program
from tests.support.traffic import counts, reachable, step, traffic

pytestmark = pytest.mark.cluster

PORT = 30181  # `make deploy` uses the service's own port of the node
# Each run has a different higher version, and so a different image. The kubelet remembers the name under which it pulled an
# image. If a pod gives this image another name, the kubelet pulls it again, even if it was loaded under the other name.
HIGHER = f"99.0.{secrets.randbelow(10**6)}"
NOWHERE = f"nowhere.example.com/not-{RUN}"  # no registry has images under this name
REGISTRY = f"{os.environ.get('REGISTRY', '').strip()}/{RUN}"

# A second Service, because the variant `production` opens no port on the nodes.
ENTRY = f"""
apiVersion: v1
kind: Service
metadata: {{name: entry}}
spec:
  type: NodePort
  selector: {{app.kubernetes.io/name: hitcounter}}
  ports: [{{port: 80, targetPort: 8080, nodePort: {PORT}}}]
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {{name: entry}}
spec:
  podSelector: {{matchLabels: {{app.kubernetes.io/name: hitcounter}}}}
  ingress: [{{ports: [{{port: 8080}}]}}]
"""


@dataclass
class Bundle:
    """An unpacked bundle, and the digest of the service's image in this bundle."""

    folder: Path
    digest: str

    def install(self, namespace: Namespace, *arguments: str, **environ: str) -> tuple[int, str, str]:
        """Run install.sh, and return its exit status, output and error output."""
        given = {"NAMESPACE": namespace.name, "KUBECTL": KUBECTL, "HELM": program(), **environ}
        given |= {name: os.environ[name] for name in ("PATH", "HOME", "KUBECONFIG", "CONTAINERD_ADDRESS") if name in os.environ}
        ended = subprocess.run(
            ["sh", str(self.folder / "install.sh"), *arguments], env=given, text=True, capture_output=True, timeout=400
        )
        return ended.returncode, ended.stdout, ended.stderr

    def installed(self, namespace: Namespace, *arguments: str, **environ: str) -> str:
        """Run install.sh, which must succeed, and return its output."""
        status, output, errors = self.install(namespace, *arguments, **environ)
        assert status == 0, output + errors
        return output


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> list[Bundle]:
    """Return bundles of this version and of a higher version."""
    found = []
    for version in (VERSION, HIGHER):
        folder = tmp_path_factory.mktemp("bundle")
        file = make("bundle", copy(folder / "sources", version), folder / "dist", REGISTRIES=NOWHERE)
        there = unpack(file, folder)
        lines = dict(line.split("=") for line in (there / "images.txt").read_text().split())
        found.append(Bundle(there, lines["hitcounter"].partition("@")[2]))
    return found


@pytest.fixture
def empty() -> Iterator[Namespace]:
    """Yield a namespace that does not exist, and delete it after the test."""
    one = Namespace(f"{RUN}-bundle-{secrets.token_hex(2)}")
    yield one
    one.delete()


def images(namespace: Namespace) -> set[str]:
    """Return the images of all pods that are not terminating."""
    return {it["image"] for pod in namespace.pods("app.kubernetes.io/part-of=hitcounter") for it in pod["spec"]["containers"]}


def pulls(namespace: Namespace) -> dict[str, list[str]]:
    """Return a dict from the reason of each event about an image to the messages."""
    found: dict[str, list[str]] = {}
    for event in namespace.get("events"):
        if "mage" in event["message"] and event["involvedObject"]["kind"] == "Pod":
            found.setdefault(event["reason"], []).append(event["message"])
    return found


def test_chart_and_images_that_were_loaded_need_no_registry(empty: Namespace, tmp_path: Path, bundles: list[Bundle]) -> None:
    if not shutil.which("ctr"):
        pytest.skip("images can be loaded into a node's containerd only on this node")
    _, higher = bundles
    image = f"{NOWHERE}/hitcounter@{higher.digest}"
    with namespace("pull", "privileged") as other:  # the control: before `load`, no node can get the image
        other.kubectl("run", "pull", f"--image={image}")
        wait_for(lambda: "Failed" in pulls(other), 60)
    higher.installed(empty, "load", "ctr")
    (tmp_path / "values.yaml").write_text("{expose: none, autoscaling: false}\n")
    said = higher.installed(empty, "deploy", VARIANT="chart", VALUES=str(tmp_path / "values.yaml"))
    assert said == f"kubectl --namespace={empty.name} port-forward service/hitcounter 8080:80\n"
    hits, _ = empty.counts()
    assert image in images(empty)
    assert "Pulling" not in pulls(empty)
    assert all("already present on machine" in message for message in pulls(empty)["Pulled"])
    # An annotation of the namespace has the variant, and Helm's release has the values.
    assert higher.install(empty, "diff")[0] == 0
    higher.installed(empty, "upgrade")
    assert not empty.get("ingresses")
    assert empty.counts()[0] == hits + 1


async def test_upgrade_and_rollback_from_a_registry_fail_no_request(
    empty: Namespace, cluster: Deployed, bundles: list[Bundle]
) -> None:
    lower, higher = bundles
    for one in bundles:
        said = await step(one.installed, empty, "push", REGISTRY)
        assert f"{REGISTRY}/hitcounter@{one.digest}" in said.split()
    assert "no bundle is deployed in the namespace" in (await step(lower.install, empty, "upgrade"))[2]
    for _ in range(2):
        url = await step(lower.installed, empty, "deploy", REGISTRY, REGISTRY_USERNAME="me", REGISTRY_PASSWORD='a"\\b')
        assert url == "http://hitcounter.example.com/\n"
    assert (await step(lower.install, empty, "diff"))[0] == 0
    status, shown, _ = await step(higher.install, empty, "diff")
    assert status == 1
    assert higher.digest in shown
    wait_for(lambda: len(empty.ready()) == 2, 90)
    empty.apply(ENTRY)
    (pod, *_) = empty.pods()
    assert pod["spec"]["imagePullSecrets"] == [{"name": "registry"}]
    url = cluster.url.replace(":30080/", f":{PORT}/")
    for _ in range(30):
        if await reachable(url):
            break
        await asyncio.sleep(1)
    before = await counts(url)
    async with traffic(url, 100) as load:
        for one in (higher, lower):
            said = (await step(one.install, empty, "upgrade"))[2]
            assert f"upgrade from {VERSION if one is higher else HIGHER} to {HIGHER if one is higher else VERSION}" in said
            wait_for(lambda: len(empty.pods()) == 2, 60)
            assert {image for image in images(empty) if "/hitcounter@" in image} == {f"{REGISTRY}/hitcounter@{one.digest}"}
    print(f"\n{load.statuses()}")
    assert not load.failures
    load.check(before, await counts(url))
    assert all(f"{REGISTRY}/" in message for messages in pulls(empty).values() for message in messages)
    assert len(pulls(empty)["Pulling"]) >= 2
    # The chart takes over the objects of the variant, and a field that someone has changed.
    hits, posts = await counts(url)
    empty.kubectl("set", "resources", "deployment/hitcounter", "--requests=cpu=123m")
    await step(lower.installed, empty, "upgrade", VARIANT="chart")
    assert (await step(lower.install, empty, "diff"))[0] == 0
    assert images(empty) >= {f"{REGISTRY}/hitcounter@{lower.digest}"}
    assert await counts(url) == (hits + 1, posts)
