"""Deploy the service on a cluster with `make deploy`, and run commands there.

`make e2e` uses the cluster of kubectl's current context. The tests create namespaces of their own, and delete these namespaces.
Two pods of the tests are in the namespace `monitoring`. If the cluster lacks this namespace, the tests create and delete it.
"""

import atexit
import functools
import json
import os
import secrets
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from tests.support import ROOT

KUBECTL = os.environ.get("KUBECTL", "kubectl")
SERVICE = "app.kubernetes.io/name=hitcounter"


def run(*command: str, input: str | None = None, env: dict[str, str] | None = None, seconds: float = 300) -> str:
    """Return the standard output of `command`. If the command fails, raise an AssertionError with its whole output."""
    done = subprocess.run(
        command, input=input, capture_output=True, text=True, cwd=ROOT, env=os.environ | (env or {}), timeout=seconds
    )
    assert done.returncode == 0, f"{' '.join(command)}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


class Namespace:
    """A namespace of the cluster, and commands to use in it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def kubectl(self, *arguments: str, **options: Any) -> str:
        return run(KUBECTL, f"--namespace={self.name}", "--request-timeout=60s", *arguments, **options)

    def make(self, *arguments: str, **options: Any) -> str:
        """Run `make` with `arguments` for this namespace, and return the output."""
        return run("make", "--no-print-directory", f"NAMESPACE={self.name}", *arguments, **options)

    def get(self, *what: str) -> Any:
        """Return one object, or the list of the selected objects."""
        found = json.loads(self.kubectl("get", *what, "--output=json"))
        return found["items"] if found["kind"] == "List" else found

    def pods(self, selector: str = SERVICE) -> list[Any]:
        """Return the selected pods that are not terminating."""
        pods = self.get("pods", f"--selector={selector}")
        return [pod for pod in pods if "deletionTimestamp" not in pod["metadata"]]

    def ready(self, selector: str = SERVICE) -> list[str]:
        """Return the names of the pods that are ready."""
        return [
            pod["metadata"]["name"]
            for pod in self.pods(selector)
            if any(one["type"] == "Ready" and one["status"] == "True" for one in pod["status"].get("conditions", []))
        ]

    def await_rollout(self, what: str, seconds: int = 180) -> None:
        self.kubectl("rollout", "status", what, f"--timeout={seconds}s", seconds=seconds + 30)

    def apply(self, text: str) -> None:
        self.kubectl("apply", "--filename=-", input=text)

    def python(self, pod: str, script: str, *arguments: str, **options: Any) -> str:
        """Run a Python script in a pod that has the service's image. The only program of this image is Python."""
        return self.kubectl("exec", pod, "--", "/usr/bin/python3.13", "-c", script, *arguments, **options)

    def counts(self) -> tuple[int, int]:
        """Count a hit from within the service's pod, and return the counted hits and posts."""
        script = (
            "import urllib.request as u; r = u.Request('http://localhost:8080/', headers={'Accept': 'application/json'});"
            "print(u.urlopen(r, timeout=5).read().decode())"
        )
        content = json.loads(self.python(self.ready()[0], script))
        return content["hits"], content["posts"]

    def answered(self) -> tuple[int, int] | None:
        """Count a hit and return the counts, as `counts` does; return None if the answer is 503 or no pod is ready."""
        with suppress(AssertionError, IndexError):
            return self.counts()
        return None

    def create(self, level: str = "restricted") -> None:
        """Create the namespace, and let it enforce the Pod Security Standard `level`."""
        run(KUBECTL, "create", "namespace", self.name)
        run(KUBECTL, "label", "namespace", self.name, f"pod-security.kubernetes.io/enforce={level}")

    def delete(self) -> None:
        run(KUBECTL, "delete", "namespace", self.name, "--ignore-not-found", "--wait=false")

    def valkey(self, *command: str, user: str = "operator", password: str | None = None) -> str:
        """Send Valkey a command as `user`, through the socket in its pod, and return the answer."""
        script = (
            'export REDISCLI_AUTH="${2:-$(tail -n 1 "/run/secrets/redis/$1")}"; user=$1; shift 2;'
            'exec valkey-cli -s /run/valkey/socket --user "$user" "$@"'
        )
        return self.kubectl("exec", "redis-0", "--", "sh", "-c", script, "sh", user, password or "", *command).strip()


RUN = f"hitcounter-e2e-{secrets.token_hex(3)}"  # the names of this run's namespaces begin with this text


@dataclass
class Deployed:
    """The result of `make deploy`."""

    namespace: Namespace
    url: str
    image: str  # the image's name in the Deployment
    valkey: str
    warnings: list[tuple[str, str]]  # reason and message of each warning event of the deployment


@functools.cache
def deployed() -> Deployed:
    """Run `make deploy` once for all tests, and return the result; run `make undeploy` when the tests are finished."""
    namespace = Namespace(RUN)
    atexit.register(namespace.make, "undeploy")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # on SIGTERM, delete everything, as on Ctrl-C
    url = namespace.make("deploy", seconds=900).splitlines()[-1]
    image, valkey = [
        namespace.get(kind, name)["spec"]["template"]["spec"]["containers"][0]["image"]
        for kind, name in (("deployment", "hitcounter"), ("statefulset", "redis"))
    ]
    warnings = namespace.get("events", "--field-selector=type=Warning")
    return Deployed(namespace, url, image, valkey, [(event["reason"], event["message"]) for event in warnings])


def start(namespace: Namespace, image: str, name: str = "client", labels: dict[str, str] | None = None) -> str:
    """Start a pod that serves HTTP on port 8000, and return its address. Tests also run Python in this pod to try connections."""
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": labels or {}},
        "spec": {
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "terminationGracePeriodSeconds": 0,
            "securityContext": {"runAsNonRoot": True, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [
                {
                    "name": "client",
                    "image": image,
                    "command": ["/usr/bin/python3.13", "-m", "http.server", "8000", "--directory", "/tmp"],
                    "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
                }
            ],
        },
    }
    namespace.apply(json.dumps(pod))
    namespace.kubectl("wait", "--for=condition=Ready", f"pod/{name}", "--timeout=60s")
    return str(namespace.get("pod", name)["status"]["podIP"])


@contextmanager
def namespace(name: str, level: str = "restricted") -> Iterator[Namespace]:
    """Create a namespace of this run. After the block, start to delete the namespace, without waiting until it is deleted."""
    one = Namespace(f"{RUN}-{name}-{secrets.token_hex(2)}")
    one.create(level)
    try:
        yield one
    finally:
        one.delete()


def compose(deployed: Deployed, namespace: Namespace, *lines: str) -> str:
    """Render a kustomization of `lines`, in `namespace` and with the images of this run; return the rendered objects."""
    folder = ROOT / "manifests" / f".{namespace.name}"
    folder.mkdir(exist_ok=True)
    images = {"hitcounter": deployed.image, "docker.io/valkey/valkey": deployed.valkey}
    try:
        text = [f"namespace: {namespace.name}", *lines, "images:"]
        for name, image in images.items():
            if "@" not in image:  # an image with a digest is the one that the manifests name already
                new, tag = image.rsplit(":", 1)
                text.append(f'  - {{name: {name}, newName: {new}, newTag: "{tag}"}}')
        (folder / "kustomization.yaml").write_text("\n".join(text))
        return run(KUBECTL, "kustomize", str(folder.relative_to(ROOT)))
    finally:
        shutil.rmtree(folder)


def install(deployed: Deployed, namespace: Namespace, *lines: str) -> None:
    """Install the service and its Redis in `namespace`. The service gets no port on the node.

    Only one Service of a cluster can have the node's port, and the deployment of `make deploy` may already have it. `lines` are
    more lines of the kustomization, such as `components: [../components/redis-tls]`.
    """
    namespace.make("secret")
    namespace.apply(compose(deployed, namespace, "resources: [../hitcounter, ../redis]", *lines))
    for what in "statefulset/redis", "deployment/hitcounter":
        namespace.await_rollout(what)
