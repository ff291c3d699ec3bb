"""Network policies, Redis's users and Pod Security deny everything that is not needed.

Each denial has a control: the same attempt succeeds where it is allowed.
"""

import json

import pytest

from nanoservice.testing.waiting import wait_for
from tests.support.cluster import Deployed, Namespace, namespace, start

pytestmark = pytest.mark.cluster

# This script prints, for each argument HOST:PORT, whether a TCP connection to it succeeds.
_REACH = """
import json, socket, sys
def reach(target):
    host, port = target.rsplit(":", 1)
    try:
        socket.create_connection((host, int(port)), 2).close()
    except OSError as error:
        return False
    return True
print(json.dumps({target: reach(target) for target in sys.argv[1:]}))
"""


def reach(namespace: Namespace, pod: str, *targets: str) -> dict[str, bool]:
    """Return for each of the targets (HOST:PORT) whether the pod can connect to it."""
    answer: dict[str, bool] = json.loads(namespace.python(pod, _REACH, *targets))
    return answer


def test_only_the_service_reaches_redis_and_only_prometheus_the_admin_port(
    cluster: Deployed, other: Namespace, monitoring: Namespace
) -> None:
    ours = cluster.namespace
    redis, (pod,) = f"redis.{ours.name}:6379", ours.pods()
    address = pod["status"]["podIP"]
    start(other, cluster.image)
    start(monitoring, cluster.image)
    start(monitoring, cluster.image, "prometheus", {"app.kubernetes.io/name": "prometheus"})
    start(ours, cluster.image, "stranger")

    wait_for(lambda: reach(ours, ours.ready()[0], redis) == {redis: True}, 15)
    assert reach(other, "client", redis, f"{address}:8080", f"{address}:9090") == {
        redis: False,
        f"{address}:8080": True,
        f"{address}:9090": False,
    }
    # `default-deny` applies to every pod of the namespace, also to a pod that no other policy selects.
    assert reach(ours, "stranger", redis, f"{address}:8080") == {redis: False, f"{address}:8080": False}
    ours.kubectl("delete", "pod", "stranger")

    def monitored() -> bool:  # the policies admit a new pod a moment after the pod has its address
        return reach(monitoring, "prometheus", f"{address}:9090", redis) == {f"{address}:9090": True, redis: False}

    wait_for(monitored, 15)
    public, admin = f"{address}:8080", f"{address}:9090"
    assert reach(monitoring, "client", public, admin) == {public: True, admin: False}


def test_service_reaches_redis_and_dns_and_nothing_else(cluster: Deployed, other: Namespace) -> None:
    ours = cluster.namespace
    server = f"{start(other, cluster.image)}:8000"
    api = "kubernetes.default.svc:443"
    redis = f"redis.{ours.name}:6379"  # a connection to this name also shows that the service reaches DNS
    assert reach(ours, ours.ready()[0], redis, server, api) == {redis: True, server: False, api: False}
    start(other, cluster.image, "control")
    assert reach(other, "control", server, api) == {server: True, api: True}


def test_redis_reaches_nothing(cluster: Deployed, other: Namespace) -> None:
    server = start(other, cluster.image)
    # The only client program in Redis's pod is valkey-cli. Here it tries to connect to an HTTP server. That server would accept
    # the connection, although it does not know Redis's protocol.
    command = ["timeout", "3", "valkey-cli", "-h", server, "-p", "8000", "PING"]
    with pytest.raises(AssertionError, match=r"Could not connect|: (124|143)"):
        cluster.namespace.kubectl("exec", "redis-0", "--", *command)
    start(other, cluster.image, "control")
    assert reach(other, "control", f"{server}:8000") == {f"{server}:8000": True}


DENIED = [
    ("FLUSHALL",), ("KEYS", "*"), ("CONFIG", "GET", "*"), ("CLIENT", "KILL", "TYPE", "normal"), ("GET", "{another}:hits"),
    ("SET", "{another}:hits", "1"), ("ACL", "LIST"), ("SHUTDOWN",), ("EVAL", "return 1", "0"),
]  # fmt: skip


def test_each_user_of_redis_may_run_only_the_commands_that_it_needs(cluster: Deployed) -> None:
    ours = cluster.namespace

    def ask(*command: str, user: str = "hitcounter") -> str:
        return ours.valkey(*command, user=user)

    # The error must be NOPERM, not "unknown command". NOPERM shows that Redis would run the command for a user with more rights.
    for command in DENIED:
        assert ask(*command).startswith("NOPERM"), command
    ours.counts()
    assert int(ask("GET", "{hitcounter}:hits")) > 0
    assert ask("PING") == "PONG"
    assert ask("PING", user="probe") == "PONG"
    assert ask("GET", "{hitcounter}:hits", user="probe").startswith("NOPERM")
    assert ask("GET", "{hitcounter}:hits", user="operator").startswith("NOPERM")
    assert ask("ACL", "LOAD", user="operator") == "OK"
    assert "NOAUTH" in ours.kubectl("exec", "redis-0", "--", "valkey-cli", "-s", "/run/valkey/socket", "PING")


def test_namespace_admits_only_restricted_pods(cluster: Deployed) -> None:
    command = ["run", "root", "--image=x", "--dry-run=server"]
    with pytest.raises(AssertionError, match='violates PodSecurity "restricted'):
        cluster.namespace.kubectl(*command)
    with namespace("privileged", "privileged") as control:
        control.kubectl(*command)
