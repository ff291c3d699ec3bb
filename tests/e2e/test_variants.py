"""The components work on the cluster: TLS to Redis, a Redis outside the cluster, other users. A second service needs one file."""

import json
import shutil
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import trustme

from nanoservice.testing.waiting import wait_for
from tests.support import ROOT
from tests.support.cluster import Deployed, Namespace, compose, install, namespace

pytestmark = pytest.mark.cluster

# This script sends PING to Redis and prints Redis's answer. The argument is `plain` (no TLS) or `tls`. With TLS, the script
# prints Redis's certificate too.
_PING = """
import socket, ssl, sys
raw = socket.create_connection(("redis", 6379), 3)
raw.settimeout(3)
if sys.argv[1] == "tls":
    context = ssl.create_default_context(cafile="/run/secrets/redis-ca/ca.crt")
    raw = context.wrap_socket(raw, server_hostname="redis")
    print(raw.getpeercert(True).hex())
raw.sendall(b"PING\\r\\n")
try:
    print(raw.recv(64))
except OSError as error:
    print(error)
"""


def renew_certificate(namespace: Namespace, authority: trustme.CA) -> str:
    """Write a new certificate for Redis into the secret `redis-tls`. Return the certificate as `_PING` prints it."""
    certificate = authority.issue_cert("redis")
    chain = b"".join(part.bytes() for part in certificate.cert_chain_pems).decode()
    data = {
        "ca.crt": authority.cert_pem.bytes().decode(),
        "tls.crt": chain,
        "tls.key": certificate.private_key_pem.bytes().decode(),
    }
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "redis-tls"}, "type": "kubernetes.io/tls"}
    namespace.apply(json.dumps(secret | {"stringData": data}))
    return ssl.PEM_cert_to_DER_cert(chain).hex()


def test_tls_component_leaves_no_port_without_tls(cluster: Deployed, other: Namespace) -> None:
    authority = trustme.CA()
    first = renew_certificate(other, authority)
    install(cluster, other, "components: [../components/redis-tls]")
    assert wait_for(other.answered, 30) == (1, 0)
    (pod,) = other.ready()
    said = other.python(pod, _PING, "tls")
    assert "NOAUTH" in said
    assert first in said
    assert "NOAUTH" not in other.python(pod, _PING, "plain")
    # The control: a Redis without TLS answers the same client.
    assert "NOAUTH" in cluster.namespace.python(cluster.namespace.ready()[0], _PING, "plain")
    # After a renewal, Valkey needs a restart, and the service needs none.
    second = renew_certificate(other, authority)
    assert first in other.python(pod, _PING, "tls")
    other.kubectl("rollout", "restart", "statefulset/redis")
    other.await_rollout("statefulset/redis")
    assert wait_for(other.answered, 30) == (2, 0)
    assert second in other.python(pod, _PING, "tls")
    assert other.ready() == [pod]


def test_pods_run_as_the_users_that_openshift_gives_them(cluster: Deployed, other: Namespace) -> None:
    given = {"runAsUser": 1000700000, "runAsGroup": 0, "fsGroup": 1000700000}
    path = "/spec/template/spec/securityContext"
    # The operation `test` fails if the component has left a number in place.
    patch: list[dict[str, Any]] = [{"op": "test", "path": f"{path}/{name}", "value": None} for name in given]
    patch += [{"op": "add", "path": f"{path}/{name}", "value": value} for name, value in given.items()]
    patches = [{"target": {"kind": "Deployment|StatefulSet"}, "patch": json.dumps(patch)}]
    install(cluster, other, "components: [../components/openshift]", f"patches: {json.dumps(patches)}")
    assert wait_for(other.answered, 30) == (1, 0)
    assert other.python(other.ready()[0], "import os; print(os.getuid(), os.getgid())").split() == ["1000700000", "0"]
    assert other.kubectl("exec", "redis-0", "--", "id", "-u").strip() == "1000700000"
    other.kubectl("delete", "pod", "redis-0")  # the next Redis reads the files that this user has written
    other.await_rollout("statefulset/redis")
    assert wait_for(other.answered, 30) == (2, 0)


def test_second_service_is_one_file(cluster: Deployed, other: Namespace) -> None:
    folder = ROOT / "manifests" / f".greeter-{other.name}"
    folder.mkdir()
    try:
        first = (ROOT / "manifests" / "hitcounter" / "kustomization.yaml").read_text()
        (folder / "kustomization.yaml").write_text(first.replace("hitcounter", "greeter"))
        second = compose(cluster, other, f"resources: [../{folder.name}]")
        both = compose(cluster, other, f"resources: [../hitcounter, ../redis, ../{folder.name}]")
    finally:
        shutil.rmtree(folder)
    assert "hitcounter" not in second.replace(other.name, "")
    assert "nanoservice" not in second
    said = other.kubectl("apply", "--dry-run=server", "--filename=-", input=both)
    for one in ("hitcounter", "greeter"):
        for kind in ("deployment.apps", "service", "poddisruptionbudget.policy", "networkpolicy.networking.k8s.io"):
            assert f"{kind}/{one} created" in said


@contextmanager
def redis_outside(cluster: Deployed) -> Iterator[tuple[str, str]]:
    """Run a Redis without TLS in a namespace of its own. Yield its address, and the password of its user `hitcounter`."""
    password = "of-the-provider"
    with namespace("outside") as outside:
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "redis-0"},
            "spec": {
                "automountServiceAccountToken": False,
                "terminationGracePeriodSeconds": 1,
                "securityContext": {"runAsNonRoot": True, "runAsUser": 65531, "seccompProfile": {"type": "RuntimeDefault"}},
                "containers": [
                    {
                        "name": "redis",
                        "image": cluster.valkey,
                        "command": ["valkey-server", "--protected-mode", "no", "--dir", "/tmp"],
                        "args": ["--user", "hitcounter", "on", f">{password}", "~*", "+@all"],
                        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
                    }
                ],
            },
        }
        outside.apply(json.dumps(pod))
        outside.kubectl("wait", "--for=condition=Ready", "pod/redis-0", "--timeout=60s")
        yield outside.get("pod", "redis-0")["status"]["podIP"], password


def set_password(namespace: Namespace, password: str) -> None:
    """Write the password of a Redis outside into the secret that the service reads."""
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "hitcounter-redis"}}
    namespace.apply(json.dumps(secret | {"stringData": {"password": password}}))


def test_redis_outside_is_used_and_no_other_address_is_allowed(cluster: Deployed, other: Namespace) -> None:
    with redis_outside(cluster) as (address, password):
        set_password(other, password)
        text = compose(
            cluster,
            other,
            "resources: [../hitcounter, ../redis]",
            "components: [../components/redis-outside]",
        )
        assert "kind: StatefulSet" not in text
        # Set the values that depend on the provider: the host is this pod, and this Redis has no TLS.
        text = text.replace("redis.example.com", address).replace('REDIS_TLS: "true"', 'REDIS_TLS: "false"')
        other.apply(text)
        other.kubectl("wait", "--for=create", "deployment/hitcounter", "--timeout=10s")
        wait_for(lambda: other.pods(), 30)
        assert not other.ready()  # the network policy still allows other addresses only
        other.apply(text.replace("192.0.2.0/24", f"{address}/32"))
        other.await_rollout("deployment/hitcounter")
        assert wait_for(other.answered, 30) == (1, 0)
