"""The steps of `skaffold dev`, `debug` and `verify` work on the cluster. The tests run each step themselves, not Skaffold.

The tests build the targets that skaffold.yaml names, deploy the manifests of its profiles, and change files in the pod with the
same commands as Skaffold.
"""

import contextlib
import io
import json
import os
import re
import socket
import subprocess
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from urllib.request import urlopen

import pytest
import yaml

from nanoservice.testing.waiting import SLACK, wait_for
from tests.support import ROOT
from tests.support.cluster import KUBECTL, Namespace, compose, deployed, namespace, run

pytestmark = pytest.mark.cluster

CONFIG = yaml.safe_load((ROOT / "skaffold.yaml").read_text())
PLACE = "/app"  # this folder of the image contains the service
APP = (ROOT / "hitcounter" / "app.py").read_text()
GREETING = "Hello from Redis"
# Only one Service of a cluster can have the port 30080. With this patch, Kubernetes chooses another port.
ANY_NODE_PORT = [{"op": "remove", "path": "/spec/ports/0/nodePort"}]


def published(target: str) -> str:
    """Build a target of the Containerfile, give the image to the cluster, and return the image's name in the cluster."""
    name = f"hitcounter-{target}"
    options = f"{os.environ.get('BUILD_OPTIONS', '')} --target={target}"
    run("make", "--no-print-directory", "image", "SERVICE=hitcounter", f"IMAGE={name}", f"BUILD_OPTIONS={options}", seconds=600)
    return run("sh", "scripts/image-to-cluster.sh", env={"IMAGE": name}).splitlines()[-1]


@pytest.fixture(scope="module")
def dev() -> Iterator[Namespace]:
    """Yield a namespace with the deployment of `skaffold dev`. Kubernetes chooses the node's port for the service."""
    images = replace(deployed(), image=published("dev"))
    with namespace("dev") as one:
        one.make("secret")
        patches = [{"target": {"kind": "Service", "name": "hitcounter"}, "patch": json.dumps(ANY_NODE_PORT)}]
        one.apply(compose(images, one, "resources: [../dev]", f"patches: {json.dumps(patches)}"))
        for what in "statefulset/redis", "deployment/hitcounter":
            one.await_rollout(what)
        yield one


@contextlib.contextmanager
def forwarded(pod: Any, port: int) -> Iterator[int]:
    """Forward a free port of loopback to the pod's port `port`, and yield the free port."""
    metadata = pod["metadata"]
    command = [KUBECTL, f"--namespace={metadata['namespace']}", "port-forward", f"pod/{metadata['name']}", f":{port}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            # Do not connect to check the port: debugpy would take the connection for an editor, and the editor's own connection
            # would wait until this connection closes.
            yield int(re.findall(r"Forwarding from 127.0.0.1:(\d+)", process.stdout.readline())[0])
        finally:
            process.terminate()


def url(namespace: Namespace) -> str:
    """Return the service's address on the node."""
    (port,) = namespace.get("service", "hitcounter")["spec"]["ports"]
    return deployed().url.replace(":30080", f":{port['nodePort']}")


def ask(url: str, seconds: float = 5) -> str:
    """Return the body of the answer to a GET, or an empty string if the GET fails."""
    with contextlib.suppress(OSError), urlopen(url, timeout=seconds) as answer:
        return str(answer.read().decode())
    return ""


def the_pod(namespace: Namespace) -> Any:
    (pod,) = namespace.pods()
    return pod


def identity(pod: Any) -> tuple[str, int]:
    """Return the pod's UID and the restarts of its container, which show whether the pod was replaced or has restarted."""
    return pod["metadata"]["uid"], pod["status"]["containerStatuses"][0]["restartCount"]


def sync(pod: Any, files: dict[str, str], deleted: tuple[str, ...] = ()) -> None:
    """Write `files` into the pod and remove the files in `deleted`. Skaffold's pkg/skaffold/sync runs the same commands."""
    place = [KUBECTL, "exec", pod["metadata"]["name"], "--namespace", pod["metadata"]["namespace"], "-c", "hitcounter"]
    if deleted:
        run(*place, "--", "rm", "-rf", "--", *(f"{PLACE}/{name}" for name in deleted))
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name, text in files.items():
            entry = tarfile.TarInfo(f"{PLACE}/{name}")
            entry.size = len(text.encode())
            tar.addfile(entry, io.BytesIO(text.encode()))
    command = [*place, "-i", "--", "tar", "xmf", "-", "-C", "/", "--no-same-owner"]
    subprocess.run(command, input=packed.getvalue(), check=True, capture_output=True, timeout=60)


def test_changed_new_and_deleted_files_are_answered_by_the_same_pod(dev: Namespace) -> None:
    assert dev.get("namespace", dev.name)["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    pod = the_pod(dev)
    changed = APP.replace(GREETING, "Salut from Redis")
    with_new = "from hitcounter.words import FROM\n" + APP.replace(f'b"{GREETING}!', 'FROM + b"!')
    steps: list[tuple[str, dict[str, str], tuple[str, ...], str]] = [
        ("changed", {"hitcounter/app.py": changed}, (), "Salut from Redis!"),
        ("new", {"hitcounter/words.py": 'FROM = b"Salve from Redis"\n', "hitcounter/app.py": with_new}, (), "Salve from Redis!"),
        ("deleted", {"hitcounter/app.py": APP}, ("hitcounter/words.py",), f"{GREETING}!"),
    ]
    # Keep one port-forward open through all changes, as `skaffold dev` does. A refused connection would end the port-forward.
    with forwarded(pod, 8080) as port:
        service = f"http://127.0.0.1:{port}/"
        last = int(wait_for(lambda: re.findall(r"seen (\d+) times", ask(service)), 30)[0])
        for what, files, deleted, expected in steps:
            began = time.monotonic()
            sync(pod, files, deleted)
            answer = wait_for(lambda: (it := ask(service)).startswith(expected) and it, 30)
            took = time.monotonic() - began
            print(f"{what} file to changed answer: {took:.2f} s")
            assert took < 3 * SLACK
            before, last = last, int(re.findall(r"seen (\d+) times", answer)[0])
            assert last > before
    assert identity(the_pod(dev)) == identity(pod)
    assert "words.py" not in dev.kubectl("exec", pod["metadata"]["name"], "--", "ls", f"{PLACE}/hitcounter")


def test_new_file_that_nothing_imports_is_there_and_only_the_service_s_folder_can_be_written(dev: Namespace) -> None:
    pod = the_pod(dev)
    sync(pod, {"nanoservice/new/file.txt": "x"})
    name = pod["metadata"]["name"]
    assert dev.kubectl("exec", name, "--", "cat", f"{PLACE}/nanoservice/new/file.txt") == "x"
    sync(pod, {}, ("nanoservice/new",))
    writable = "import os; print([path for path in ('/app', '/usr', '/etc', '/home', '/') if os.access(path, os.W_OK)])"
    assert dev.python(name, writable) == "['/app']\n"


def test_passwords_are_made_in_the_cluster_that_skaffold_names(dev: Namespace) -> None:
    here = run(KUBECTL, "config", "current-context").strip()
    assert dev.make("secret", env={"SKAFFOLD_KUBE_CONTEXT": here}) == ""  # the secrets already exist
    with pytest.raises(AssertionError, match="no namespace"):
        dev.make("secret", env={"SKAFFOLD_KUBE_CONTEXT": "another"})


def test_log_format_is_text(dev: Namespace) -> None:
    log = dev.kubectl("logs", "deployment/hitcounter")
    assert re.search(r"^\d\d:\d\d:\d\d INFO    listening", log, re.MULTILINE)


# --- skaffold verify ---


def smoke_test(namespace: Namespace, image: str, name: str = "smoke-test", wait: int = 0) -> tuple[str, str]:
    """Run the smoke test as Skaffold does. Return the job's last condition and its log.

    The job sleeps for `wait` seconds before it sends the first request.
    """
    (case,) = CONFIG["verify"]
    job = yaml.safe_load((ROOT / case["executionMode"]["kubernetesCluster"]["jobManifestPath"]).read_text())
    script, *names = case["container"]["args"]
    job["metadata"] = {"name": name, "namespace": namespace.name}
    template = job["spec"]["template"]
    template["metadata"]["labels"] = {"app.kubernetes.io/name": name}
    # If no name server answers, a look-up fails within a second with these options. Without them it takes half a minute.
    template["spec"]["dnsConfig"] = {"options": [{"name": "timeout", "value": "1"}, {"name": "attempts", "value": "1"}]}
    template["spec"]["containers"][0] |= {
        "image": image,
        "command": case["container"]["command"],
        "args": [f"import time; time.sleep({wait})\n{script}", *names],
    }
    namespace.apply(json.dumps(job))
    status = wait_for(lambda: _ended(namespace.get("job", name)), case["timeout"])
    log = namespace.kubectl("logs", f"job/{name}")
    namespace.kubectl("delete", "job", name)
    return status, log


def _ended(job: Any) -> str:
    conditions = {one["type"] for one in job["status"].get("conditions", []) if one["status"] == "True"}
    return next((kind for kind in ("Complete", "Failed") if kind in conditions), "")


def test_only_the_smoke_test_s_own_policy_lets_it_pass(dev: Namespace) -> None:
    image = deployed().image
    status, log = smoke_test(dev, image)
    assert (status, "it counts: {'hits'" in log) == ("Complete", True), log
    status, log = smoke_test(dev, image, "another", wait=5)  # the policies apply to a pod only a moment after it starts
    assert status == "Failed", log
    assert "URLError" in log


def test_smoke_test_fails_without_redis(dev: Namespace) -> None:
    dev.kubectl("scale", "statefulset/redis", "--replicas=0")
    dev.kubectl("wait", "--for=delete", "pod/redis-0", "--timeout=60s")
    try:
        status, log = smoke_test(dev, deployed().image)
    finally:
        dev.kubectl("scale", "statefulset/redis", "--replicas=1")
        dev.await_rollout("statefulset/redis")
    assert status == "Failed", log
    assert "HTTP Error 503" in log


# --- skaffold debug ---


class Debugger:
    """A client of the Debug Adapter Protocol, which editors use: https://microsoft.github.io/debug-adapter-protocol/"""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), 10)
        self._socket.settimeout(30)
        self._stream = self._socket.makefile("rb")
        self._number = 0
        self._passed_over: list[Any] = []

    def send(self, command: str, **arguments: Any) -> int:
        self._number += 1
        request = {"seq": self._number, "type": "request", "command": command, "arguments": arguments}
        body = json.dumps(request).encode()
        self._socket.sendall(b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
        return self._number

    def _read(self) -> Any:
        length = 0
        while line := self._stream.readline().strip():
            length = int(line.rpartition(b":")[2])
        message = json.loads(self._stream.read(length))
        assert message.get("success", True), message
        return message

    def await_message(self, matches: Callable[[Any], bool]) -> Any:
        for message in self._passed_over:
            if matches(message):
                self._passed_over.remove(message)
                return message
        while not matches(message := self._read()):
            self._passed_over.append(message)
        return message

    def event(self, name: str) -> Any:
        return self.await_message(lambda message: message.get("event") == name).get("body")

    def response(self, number: int) -> Any:
        return self.await_message(lambda message: message.get("request_seq") == number).get("body")

    def ask(self, command: str, **arguments: Any) -> Any:
        return self.response(self.send(command, **arguments))

    def close(self) -> None:
        self._stream.close()
        self._socket.close()


def test_debugger_attaches_through_a_forwarded_port_and_stops_a_request(dev: Namespace) -> None:
    dev.kubectl("set", "image", "deployment/hitcounter", f"hitcounter={published('debug')}")
    dev.await_rollout("deployment/hitcounter")
    wait_for(lambda: len(dev.pods()) == 1, 60)
    pod = the_pod(dev)
    source = {"path": f"{PLACE}/hitcounter/app.py"}
    line = APP.splitlines().index("        content = _CONTENT[_media_type(headers)]") + 1
    service = url(dev)
    wait_for(lambda: ask(service).startswith(GREETING), 30)
    with forwarded(pod, 5678) as debug:
        with contextlib.closing(Debugger(debug)) as debugger:
            debugger.ask("initialize", adapterID="test", pathFormat="path")
            attached = debugger.send("attach", justMyCode=False)
            debugger.event("initialized")
            (point,) = debugger.ask("setBreakpoints", source=source, breakpoints=[{"line": line}])["breakpoints"]
            assert point["verified"]
            debugger.ask("configurationDone")
            debugger.response(attached)
            answers: list[str] = []
            client = threading.Thread(target=lambda: answers.append(ask(service, 60)))
            client.start()
            stopped = debugger.event("stopped")
            assert stopped["reason"] == "breakpoint"
            frame = debugger.ask("stackTrace", threadId=stopped["threadId"])["stackFrames"][0]
            assert (frame["name"], frame["source"]["path"], frame["line"]) == ("get", source["path"], line)
            assert "urllib" in debugger.ask("evaluate", expression="headers['User-Agent']", frameId=frame["id"])["result"]
            assert not answers
            debugger.ask("setBreakpoints", source=source, breakpoints=[])
            debugger.ask("continue", threadId=stopped["threadId"])
            client.join(60)
            assert answers[0].startswith(GREETING)
    assert identity(the_pod(dev)) == identity(pod)
    # Anyone who reaches debugpy can run code in the pod, so debugpy listens only on the pod's loopback.
    reached = "import socket, sys; print(socket.socket().connect_ex((sys.argv[1], 5678)))"
    assert dev.python(pod["metadata"]["name"], reached, "127.0.0.1") == "0\n"
    assert dev.python(pod["metadata"]["name"], reached, pod["status"]["podIP"]) != "0\n"
