"""docs/operations.md is correct: these tests cause each fault, look for the symptoms, apply the fixes and follow the recipes."""

import base64
import json
import re
import shlex
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import yaml

from nanoservice.testing.waiting import wait_for
from tests.support import ROOT
from tests.support.cluster import KUBECTL, SERVICE, Deployed, Namespace, compose, install, namespace

pytestmark = pytest.mark.cluster

REDIS = "app.kubernetes.io/name=redis"


@pytest.fixture
def installed(cluster: Deployed, other: Namespace) -> Namespace:
    """Install a service and a Redis in the second namespace, where a test may break them. Return this namespace."""
    install(cluster, other)
    assert wait_for(other.answered, 30) == (1, 0)
    return other


def log(namespace: Namespace, pod: str, *options: str) -> str:
    with suppress(AssertionError):  # the pod may have no log yet
        return namespace.kubectl("logs", pod, *options)
    return ""


def newcomer(namespace: Namespace, *known: str) -> str:
    """Wait until the service has a pod that is not one of `known`, and return the pod's name."""

    def new() -> list[str]:
        return [name for pod in namespace.pods() if (name := pod["metadata"]["name"]) not in known]

    return str(wait_for(new, 30)[0])


def detail(namespace: Namespace) -> str:
    """Send a request to the service's pod. Return an error's status and `detail`, or an empty string if the request succeeds."""
    script = (
        "import urllib.request as u, urllib.error as e, json\n"
        "try: u.urlopen('http://localhost:8080/', timeout=9).read(); print()\n"
        "except e.HTTPError as error: print(error.code, json.load(error)['detail'])"
    )
    return namespace.python(namespace.pods()[0]["metadata"]["name"], script).strip()


def test_wrong_password_keeps_the_new_pod_out_and_the_old_one_serving(installed: Namespace) -> None:
    (old,) = installed.ready()
    wrong = base64.b64encode(b"wrong").decode()
    installed.kubectl("patch", "secret", "hitcounter-redis", "--patch", json.dumps({"data": {"password": wrong}}))
    installed.kubectl("rollout", "restart", "deployment/hitcounter")
    new = newcomer(installed, old)
    wait_for(lambda: "Redis fails: wrong user or password" in log(installed, new), 60)
    assert installed.ready() == [old]
    assert wait_for(installed.answered, 30) == (2, 0)
    assert installed.make("secret").strip() == "wrote the secret hitcounter-redis"
    installed.kubectl("rollout", "restart", "deployment/hitcounter")  # without a restart, the pod would get the new file later
    installed.await_rollout("deployment/hitcounter")
    assert wait_for(installed.answered, 30) == (3, 0)


def test_image_that_cannot_be_pulled_leaves_the_old_pod_serving(installed: Namespace) -> None:
    (old,) = installed.ready()
    installed.kubectl("set", "image", "deployment/hitcounter", "hitcounter=localhost:5000/no-such-image:1")
    new = newcomer(installed, old)

    def reason() -> Any:
        states = installed.get("pod", new)["status"].get("containerStatuses", [{}])
        return states[0].get("state", {}).get("waiting", {}).get("reason", "")

    wait_for(lambda: reason() in ("ErrImagePull", "ImagePullBackOff"), 60)
    assert installed.ready() == [old]
    assert wait_for(installed.answered, 30) == (2, 0)
    installed.kubectl("rollout", "undo", "deployment/hitcounter")
    installed.await_rollout("deployment/hitcounter")


def test_pod_without_room_is_pending_and_leaves_the_old_pod_serving(installed: Namespace) -> None:
    (old,) = installed.ready()
    installed.kubectl("set", "resources", "deployment/hitcounter", "--requests=cpu=1000", "--limits=cpu=1000")
    new = newcomer(installed, old)
    wait_for(lambda: "Insufficient cpu" in installed.kubectl("describe", "pod", new), 30)
    assert installed.get("pod", new)["status"]["phase"] == "Pending"
    assert wait_for(installed.answered, 30) == (2, 0)
    installed.kubectl("rollout", "undo", "deployment/hitcounter")
    installed.await_rollout("deployment/hitcounter")
    assert installed.ready() == [old]


def test_claim_without_a_storage_class_keeps_redis_pending(cluster: Deployed, other: Namespace) -> None:
    other.make("secret")
    text = compose(cluster, other, "resources: [../hitcounter, ../redis]")
    other.apply(text.replace("accessModes:", "storageClassName: no-such-class\n      accessModes:"))
    wait_for(lambda: "unbound immediate PersistentVolumeClaims" in other.kubectl("describe", "pod", "redis-0"), 30)
    # The claim keeps the wrong class. So the fix deletes the claim and the StatefulSet, and deploys again.
    for what in "statefulset/redis", "persistentvolumeclaim/data-redis-0":
        other.kubectl("delete", what, "--timeout=60s")
    other.apply(text)
    for what in "statefulset/redis", "deployment/hitcounter":
        other.await_rollout(what)
    assert wait_for(other.answered, 30) == (1, 0)


def test_cluster_without_dns_keeps_new_pods_out_and_old_ones_serving(installed: Namespace) -> None:
    (old,) = installed.ready()
    rules = installed.get("networkpolicy", "hitcounter")["spec"]["egress"]
    patch = [{"op": "replace", "path": "/spec/egress", "value": rules[:1]}]
    installed.kubectl("patch", "networkpolicy", "hitcounter", "--type=json", f"--patch={json.dumps(patch)}")
    installed.kubectl("rollout", "restart", "deployment/hitcounter")
    new = newcomer(installed, old)
    wait_for(lambda: re.search("Redis fails: it (does not answer in time|cannot be reached)", log(installed, new)), 60)
    assert installed.ready() == [old]
    assert wait_for(installed.answered, 30) == (2, 0)  # the old pod's connections to Redis are still open
    assert "never retrieved" not in log(installed, new)  # asyncio must not log the look-ups that fail later
    began = time.monotonic()
    installed.kubectl("delete", "pod", new)
    print(f"\nended after {time.monotonic() - began:.0f} s, 5 of them to drain")
    assert time.monotonic() - began < 20  # the exit does not wait for DNS look-ups, which fail after 21 s
    patch[0]["value"] = rules
    installed.kubectl("patch", "networkpolicy", "hitcounter", "--type=json", f"--patch={json.dumps(patch)}")
    began = time.monotonic()
    installed.await_rollout("deployment/hitcounter")
    print(f"ready {time.monotonic() - began:.0f} s after DNS was back")


def test_redis_that_is_away_for_a_minute_restarts_no_service(installed: Namespace) -> None:
    installed.kubectl("scale", "statefulset/redis", "--replicas=0")
    began = time.monotonic()
    installed.kubectl("wait", "pod/redis-0", "--for=delete", "--timeout=60s")  # Redis may count until its pod is gone
    wait_for(lambda: detail(installed).startswith("503 Redis: it "), 30)
    wait_for(lambda: not installed.ready(), 90)
    print(f"\nnot ready after {time.monotonic() - began:.0f} s")
    # Wait 45 s: in this time the kubelet runs four liveness probes, and it would restart the service if three of them failed.
    time.sleep(max(0.0, began + 45 - time.monotonic()))
    installed.kubectl("scale", "statefulset/redis", "--replicas=1")
    installed.await_rollout("statefulset/redis")
    began = time.monotonic()
    assert wait_for(installed.answered, 60) == (2, 0)
    print(f"counts {time.monotonic() - began:.0f} s after Redis was ready")
    (pod,) = installed.pods()
    assert pod["status"]["containerStatuses"][0]["restartCount"] == 0


def test_redis_with_full_memory_refuses_to_count_and_forgets_nothing(cluster: Deployed, installed: Namespace) -> None:
    manifests = compose(cluster, installed, "resources: [../hitcounter, ../redis]")

    def limit(memory: str) -> None:
        installed.apply(manifests.replace("maxmemory 64mb", f"maxmemory {memory}"))
        installed.kubectl("rollout", "restart", "statefulset/redis")
        installed.await_rollout("statefulset/redis")

    limit("500kb")  # even an empty Redis uses more than this
    wait_for(lambda: detail(installed) == "503 Redis: it is out of memory (OOM)", 30)
    assert "Redis fails: it is out of memory (OOM)" in installed.kubectl("logs", "deployment/hitcounter")
    assert installed.ready()  # Redis answers, so the service stays ready: more pods would not help
    limit("64mb")
    assert wait_for(installed.answered, 30) == (2, 0)


# This script writes 60 MB into Redis as the service's user. The append-only file then has more than 64 MB, so Redis rewrites it.
_FILL = """
export REDISCLI_AUTH="$(tail -n 1 /run/secrets/redis/hitcounter)"
for i in $(seq 20); do
  head -c 4000000 /dev/zero | tr '\\0' x |
  valkey-cli -s /run/valkey/socket --user hitcounter -x SET "{hitcounter}:fill:$((i % 14))"
done
"""


def test_full_redis_has_room_to_rewrite_its_file(installed: Namespace) -> None:
    assert set(installed.kubectl("exec", "redis-0", "--", "sh", "-c", _FILL).split()) == {"OK"}
    wait_for(lambda: "2.base.rdb" in installed.kubectl("exec", "redis-0", "--", "ls", "/data/appendonlydir"), 60)
    assert wait_for(installed.answered, 30) == (2, 0)
    (pod,) = installed.pods(REDIS)
    assert pod["status"]["containerStatuses"][0]["restartCount"] == 0


# This kustomization replaces Redis's volume with a small volume, and adds a container that can fill the small volume.
_SMALL = """
patches:
  - target: {kind: StatefulSet, name: redis}
    patch: |-
      - {op: remove, path: /spec/volumeClaimTemplates}
      - {op: add, path: /spec/template/spec/volumes/-, value: {name: data, emptyDir: {medium: Memory, sizeLimit: 16Mi}}}
      - op: add
        path: /spec/template/spec/containers/-
        value:
          name: filler
          image: docker.io/valkey/valkey
          command: [sleep, "3600"]
          securityContext: {allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}}
          volumeMounts: [{name: data, mountPath: /data}]
"""


def test_full_disk_stops_redis_and_loses_no_answered_hit(cluster: Deployed, other: Namespace) -> None:
    install(cluster, other, _SMALL)
    for number in range(1, 6):
        assert wait_for(other.answered, 30) == (number, 0)
    fill = ["exec", "redis-0", "--container=filler", "--", "sh", "-c"]
    other.kubectl(*fill, "head -c 32000000 /dev/zero >/data/filler || true")
    wait_for(lambda: detail(other).startswith("503 Redis: it "), 60)

    def ended() -> bool:
        words = log(other, "redis-0", "--container=redis", "--previous") + log(other, "redis-0", "--container=redis")
        return "Can't recover from AOF write error" in words

    wait_for(ended, 60)
    other.kubectl(*fill, "rm /data/filler")
    began = time.monotonic()
    after = wait_for(other.answered, 180)
    print(f"\ncounts {time.monotonic() - began:.0f} s after there was space again, the kubelet's back-off included")
    assert after >= (6, 0)


def test_missing_secret_is_named_and_made(cluster: Deployed, other: Namespace) -> None:
    other.apply(compose(cluster, other, "resources: [../hitcounter, ../redis]"))

    def named() -> bool:
        told = " ".join(event["message"] for event in other.get("events", "--field-selector=type=Warning"))
        return 'secret "redis-users" not found' in told and 'secret "hitcounter-redis" not found' in told

    wait_for(named, 60)
    assert "redis-users" in other.make("secret")
    began = time.monotonic()
    other.await_rollout("deployment/hitcounter")
    print(f"\nready {time.monotonic() - began:.0f} s after the secrets were made")


# This script writes $1 x 1000 commands into the append-only file, as the service's user. At the next start, Redis loads for $1 s
# if it needs 1 ms for each command.
_COMMANDS = """
export REDISCLI_AUTH="$(tail -n 1 /run/secrets/redis/hitcounter)"
seq "$(($1 * 1000))" | sed 's/.*/SET {hitcounter}:fill &/' | valkey-cli -s /run/valkey/socket --user hitcounter | sort -u
"""


def test_redis_that_loads_is_not_ready_and_not_restarted(cluster: Deployed, installed: Namespace) -> None:
    assert installed.kubectl("exec", "redis-0", "--", "sh", "-c", _COMMANDS, "sh", "10").strip() == "OK"
    # Make Redis load slowly, and make the kubelet restart Redis after one failed liveness probe. While Redis loads, it answers
    # clients only once for every thousand loaded commands, about once a second, and less often on a busy machine. The probe's
    # timeout is long, because this test is about a Redis that answers LOADING, not about a Redis that answers late.
    probe = {"initialDelaySeconds": 5, "periodSeconds": 1, "failureThreshold": 1, "timeoutSeconds": 60}
    container = {"name": "redis", "args": ["--key-load-delay", "1000"], "livenessProbe": probe}
    patch = {"spec": {"template": {"spec": {"containers": [container]}}}}
    installed.kubectl("patch", "statefulset", "redis", f"--patch={json.dumps(patch)}")
    wait_for(lambda: "Loading" in log(installed, "redis-0") and not installed.ready(REDIS), 60)
    assert installed.answered() is None
    began = time.monotonic()
    installed.await_rollout("statefulset/redis")
    print(f"\nready after {time.monotonic() - began:.0f} s of loading")
    assert wait_for(installed.answered, 30) == (2, 0)
    (pod,) = installed.pods(REDIS)
    assert pod["status"]["containerStatuses"][0]["restartCount"] == 0


def test_redis_that_cannot_start_is_fixed_by_the_next_deploy(installed: Namespace) -> None:
    def set_arguments(*arguments: str) -> None:
        container = {"name": "redis", "args": arguments or None}
        patch = {"spec": {"template": {"spec": {"containers": [container]}}}}
        installed.kubectl("patch", "statefulset", "redis", f"--patch={json.dumps(patch)}")

    set_arguments("--no-such-setting", "1")
    wait_for(lambda: "Bad directive" in log(installed, "redis-0"), 60)
    set_arguments()
    installed.await_rollout("statefulset/redis")
    assert wait_for(installed.answered, 30) == (2, 0)


def test_redis_that_cannot_start_is_rolled_back(cluster: Deployed, installed: Namespace) -> None:
    # A change of valkey.conf makes a ConfigMap with another name, so Redis's pod is replaced.
    generator = "configMapGenerator: [{name: redis, behavior: merge, literals: [valkey.conf=no-such-setting 1]}]"
    installed.apply(compose(cluster, installed, "resources: [../hitcounter, ../redis]", generator))
    wait_for(lambda: "Bad directive" in log(installed, "redis-0"), 60)
    installed.kubectl("rollout", "undo", "statefulset/redis")
    installed.await_rollout("statefulset/redis")
    assert wait_for(installed.answered, 30) == (2, 0)


def with_settings(cluster: Deployed, namespace: Namespace, *literals: str) -> str:
    """Return the manifests with the settings `literals` (NAME=VALUE) added to the service's ConfigMap."""
    generator = f"configMapGenerator: [{{name: hitcounter, behavior: merge, literals: [{', '.join(literals)}]}}]"
    return compose(cluster, namespace, "resources: [../hitcounter, ../redis]", generator)


def test_setting_is_changed_and_rolled_back(cluster: Deployed, installed: Namespace) -> None:
    def settings() -> str:
        (pod,) = installed.ready()
        script = "import os; print(os.environ.get('LANES'), os.environ['LOG_FORMAT'])"
        return installed.python(pod, script).strip()

    def one_is_left() -> bool:
        return len(installed.pods()) == 1

    assert settings() == "None json"
    installed.apply(with_settings(cluster, installed, "LANES=8", "LOG_FORMAT=text"))
    installed.await_rollout("deployment/hitcounter")
    wait_for(one_is_left, 60)
    assert settings() == "8 json"  # `env` in the Deployment sets LOG_FORMAT and overrides the ConfigMap
    assert wait_for(installed.answered, 30) == (2, 0)
    installed.kubectl("rollout", "undo", "deployment/hitcounter")
    installed.await_rollout("deployment/hitcounter")
    wait_for(one_is_left, 60)
    assert settings() == "None json"
    assert wait_for(installed.answered, 30) == (3, 0)


def test_wrong_setting_keeps_the_new_pod_out_and_the_old_one_serving(cluster: Deployed, installed: Namespace) -> None:
    (old,) = installed.ready()
    installed.apply(with_settings(cluster, installed, "LOGLEVEL=debug"))
    new = newcomer(installed, old)

    def status() -> Any:
        (container,) = installed.get("pod", new)["status"].get("containerStatuses", [{}])
        return container

    wait_for(lambda: status().get("state", {}).get("waiting", {}).get("reason") == "CrashLoopBackOff", 60)
    assert status()["lastState"]["terminated"]["exitCode"] == 78
    assert log(installed, new, "--previous") == "hitcounter: LOGLEVEL is not a setting; the nearest is LOG_LEVEL\n"
    assert installed.ready() == [old]
    assert wait_for(installed.answered, 30) == (2, 0)
    installed.kubectl("rollout", "undo", "deployment/hitcounter")
    installed.await_rollout("deployment/hitcounter")
    assert installed.ready() == [old]


def test_enlarged_claim_is_deployed_without_a_restart(cluster: Deployed, installed: Namespace) -> None:
    larger = compose(cluster, installed, "resources: [../hitcounter, ../redis]").replace("storage: 1Gi", "storage: 2Gi")
    (before,) = installed.pods(REDIS)
    with pytest.raises(AssertionError, match="Forbidden"):
        installed.apply(larger)
    installed.kubectl("delete", "statefulset", "redis", "--cascade=orphan")
    installed.apply(larger)
    installed.await_rollout("statefulset/redis")
    (after,) = installed.pods(REDIS)
    assert after["metadata"]["uid"] == before["metadata"]["uid"]
    assert wait_for(installed.answered, 30) == (2, 0)


def test_redis_moves_to_a_new_volume_with_its_counts(cluster: Deployed, installed: Namespace, tmp_path: Path) -> None:
    def volume() -> Any:
        return installed.get("persistentvolumeclaim", "data-redis-0")["spec"]["volumeName"]

    file, old = tmp_path / "hitcounter.rdb", volume()
    installed.make("backup", f"FILE={file}")
    installed.kubectl("delete", "statefulset", "redis")
    installed.kubectl("delete", "persistentvolumeclaim", "data-redis-0", "--timeout=60s")
    larger = compose(cluster, installed, "resources: [../hitcounter, ../redis]").replace("storage: 1Gi", "storage: 2Gi")
    installed.apply(larger)
    installed.await_rollout("statefulset/redis")
    assert volume() != old
    installed.make("restore", f"FILE={file}")
    assert wait_for(installed.answered, 60) == (2, 0)


def forwarded(namespace: Namespace, port: str, path: str) -> str:
    """Send a GET for `path` to the service's pod through `kubectl port-forward`, and return the body of the answer.

    `port` is an argument of kubectl: `:8080` forwards a free local port to the pod's port 8080.
    """
    command = [KUBECTL, f"--namespace={namespace.name}", "port-forward", "deployment/hitcounter", port]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            address = process.stdout.readline().split()[2]  # Forwarding from ... -> ...
            with urllib.request.urlopen(f"http://{address}{path}", timeout=10) as answer:
                return str(answer.read().decode())
        finally:
            process.terminate()


def blocks() -> Iterator[tuple[str, Any]]:
    """Yield each YAML object in the README and docs/, with the file's name."""
    for file in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for block in re.findall(r"^```yaml\n(.*?)^```", file.read_text(), re.MULTILINE | re.DOTALL):
            for one in yaml.safe_load_all(block):
                yield file.name, one


def test_examples_in_the_texts_apply() -> None:
    with namespace("examples") as one:
        kinds = set()
        for file, example in blocks():
            assert {"apiVersion", "kind"} <= example.keys(), file
            if example["kind"] not in ("Certificate", "ExternalSecret", "Gateway", "HTTPRoute"):  # a kind that every cluster has
                one.kubectl("apply", "--dry-run=server", "--filename=-", input=json.dumps(example))
                kinds.add(example["kind"])
    assert kinds == {"Secret", "Ingress"}


# These commands would change the cluster, so the test runs them with --dry-run=server.
_DRY = ("apply", "delete", "patch", "scale", "taint", "undo")
# These errors of the runbook's commands are expected on this cluster: the storage class cannot resize volumes, no container has
# restarted, there is no earlier revision for `undo`, or the node does not have the taint. Only the replicated Redis, which
# test_replicated.py tests, has more than one server.
_REFUSALS = (
    "must support resize|previous terminated container .* not found|no last revision to roll back to|taint .* not found"
    r'|"(data-)?redis-[12]" not found|pods "\$pod" not found'
    '|services "redis-0" not found|poddisruptionbudgets.policy "redis" not found|unknown command: (hand-over|is-primary)'
)


def test_commands_of_the_runbook_work(cluster: Deployed) -> None:
    ours = cluster.namespace
    ours.kubectl("rollout", "restart", "deployment/hitcounter")  # this makes a second revision, so `undo` can go back
    ours.await_rollout("deployment/hitcounter")
    # While two pods exist, kubectl may choose the pod that is stopping when a command names `deployment/...`.
    wait_for(lambda: len(ours.get("pods", f"--selector={SERVICE}")) == 1, 60)
    values = {
        "NODE": ours.kubectl("get", "nodes", "--output=name").split()[0].removeprefix("node/"),
        "POD": "redis-0",
        "NAME": "hitcounter",
        # Kubernetes deletes the oldest revisions at each restart below, so take the newest revision.
        "N": re.findall(r"^(\d+)", ours.kubectl("rollout", "history", "deployment/hitcounter"), re.MULTILINE)[-1],
    }
    production = compose(cluster, ours, "resources: [../production]")
    ran = set()
    # A command of the runbook is one line, unless a newline is inside its quotation marks.
    lines = re.findall(r"^ *kubectl ((?:[^'\n]|'[^']*')*)", (ROOT / "docs" / "operations.md").read_text(), re.MULTILINE)
    for line in dict.fromkeys(lines):
        if "before-restore" in line:
            continue  # test_backup.py runs this command
        filled = re.sub(r"\b(NODE|POD|NAME|N)\b", lambda name: values[name[1]], line)
        command = list(takewhile("|".__ne__, shlex.split(filled, comments=True)))
        verb = next(word for word in command if not word.startswith("--"))
        action = command[1] if verb == "rollout" else verb
        dry = ["--dry-run=server"] if action in _DRY else []
        ran.add(action)
        if verb == "port-forward":
            assert command[1:] == ["deployment/hitcounter", "9090", "8080"]
            assert forwarded(ours, ":9090", "/metrics").startswith("# HELP")
            assert "ready" in forwarded(ours, ":8080", "/readyz")
        elif command[-1] == "--kustomize=manifests/production":
            command[-1] = "--filename=-"  # the text `production` has a namespace and an image that exist
            with suppress(AssertionError) if verb == "diff" else nullcontext():  # `kubectl diff` fails if there is a difference
                ours.kubectl(*command, *dry, input=production)
        else:
            try:
                ours.kubectl(*command, *dry)
            except AssertionError as refused:
                assert re.search(_REFUSALS, str(refused)), command
        if action == "restart":
            ours.await_rollout(command[-1])
    reads = {"get", "describe", "logs", "port-forward", "exec", "diff", "history", "status", "wait"}
    assert ran == reads | {"restart"} | set(_DRY)
