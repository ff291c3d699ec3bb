"""The commands of Skaffold work on the cluster, with two services.

The tests run Skaffold itself in a copy of the repository. There, the project has the name of a namespace of this run, and its
services have other ports on the node, because `make deploy` has the ports 30080 and 30081.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from nanoservice.testing.waiting import SLACK, wait_for
from tests.support import ROOT
from tests.support.cluster import KUBECTL, RUN, Namespace, run
from tests.support.images import WHEELS
from tests.support.workflows import CI, runs

pytestmark = pytest.mark.cluster

PLACE = "/app"  # this folder of the image contains the service
APP = (ROOT / "hitcounter" / "app.py").read_text()
GREETING = "Hello from Redis"
SERVICES = ("hitcounter", "likes")


@dataclass
class Project:
    """The copy of the repository, and the namespace into which Skaffold deploys it."""

    copy: Path
    namespace: Namespace
    environ: dict[str, str]
    node: str

    def command(self, beginning: str) -> str:
        """Return the only command of CI that begins with `beginning`, with the name of this project."""
        (line,) = [run.line for run in runs(CI) if run.line.startswith(beginning)]
        return line.replace("namespace/hitcounter", f"namespace/{self.namespace.name}")

    def act(self, line: str) -> "subprocess.CompletedProcess[str]":
        """Run a command in the copy, as a GitHub runner does."""
        command = ["bash", "-e", "-c", line]
        return subprocess.run(command, cwd=self.copy, env=self.environ, text=True, capture_output=True, timeout=600)

    def succeed(self, line: str) -> str:
        ended = self.act(line)
        assert ended.returncode == 0, f"{line}: {ended.returncode}\n{ended.stdout}{ended.stderr}"
        return ended.stdout + ended.stderr

    def url(self, name: str) -> str:
        """Return the address of a service on the node."""
        (port,) = self.namespace.get("service", name)["spec"]["ports"]
        return f"http://{self.node}:{port['nodePort']}/"

    def pod(self, name: str) -> Any:
        (pod,) = self.namespace.pods(f"app.kubernetes.io/name={name}")
        return pod

    def identities(self) -> dict[str, tuple[str, int]]:
        """Return the UID of each service's pod and the restarts of its container. A new or restarted pod has other values."""
        pods = {name: self.pod(name) for name in SERVICES}
        return {
            name: (pod["metadata"]["uid"], pod["status"]["containerStatuses"][0]["restartCount"]) for name, pod in pods.items()
        }


@pytest.fixture(scope="module")
def project(two_services: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """Make the copy. At the end, delete its namespace."""
    skaffold = shutil.which("skaffold")
    assert skaffold, "Skaffold is needed; to fetch it with Docker: make tools"
    state = tmp_path_factory.mktemp("skaffold")
    copy = state / "copy"
    shutil.copytree(two_services, copy)
    namespace = Namespace(f"{RUN}-skaffold")
    run(sys.executable, str(copy / "scripts" / "service.py"), "rename-project", namespace.name)
    kustomization = copy / "manifests" / "minikube" / "kustomization.yaml"
    text = re.sub(r"(?<=nodePort, value: )3008(?=\d)", "3007", kustomization.read_text())
    if valkey := os.environ.get("VALKEY"):
        image, _, tag = valkey.rpartition(":")
        text += f'images:\n  - {{name: docker.io/valkey/valkey, newName: {image}, newTag: "{tag}"}}\n'
    kustomization.write_text(text)
    (copy / "wheels").symlink_to(WHEELS)
    # Skaffold reads its options also from variables, so the commands are those of CI.
    environ = os.environ | {
        "SKAFFOLD_PROFILE": "hermetic,mirror" if "BASE_IMAGE" in os.environ else "hermetic",
        "SKAFFOLD_CONFIG": str(state / "config"),
        "SKAFFOLD_CACHE_FILE": str(state / "cache"),
        "SKAFFOLD_INTERACTIVE": "false",
        "SKAFFOLD_UPDATE_CHECK": "false",
    }
    if registry := os.environ.get("REGISTRY"):
        environ["SKAFFOLD_DEFAULT_REPO"] = registry
    path = "{.items[0].status.addresses[?(@.type=='InternalIP')].address}"
    node = run(KUBECTL, "get", "nodes", f"--output=jsonpath={path}")
    try:
        yield Project(copy, namespace, environ, node)
    finally:
        namespace.delete()


def ask(url: str, seconds: float = 5) -> str:
    """Return the body of the answer to a GET, or an empty string if the GET fails."""
    with contextlib.suppress(OSError), urlopen(url, timeout=seconds) as answer:
        return str(answer.read().decode())
    return ""


def await_answer(url: str, beginning: str = "") -> None:
    """Wait until a GET is answered with a text that begins with `beginning`."""
    wait_for(lambda: (body := ask(url)) and body.startswith(beginning), 30, beginning)


# --- skaffold run, verify and delete ---


@pytest.fixture(scope="module")
def running(project: Project) -> Project:
    """Deploy the production images with `skaffold run`."""
    project.succeed(project.command("skaffold run"))
    return project


def test_skaffold_run_deploys_services_that_answer_on_the_node(running: Project) -> None:
    await_answer(running.url("hitcounter"), GREETING)
    await_answer(running.url("likes"), '{"count": 0}')
    enforced = running.namespace.get("namespace", running.namespace.name)["metadata"]["labels"]
    assert enforced["pod-security.kubernetes.io/enforce"] == "restricted"


def test_skaffold_verify_asks_both_services(running: Project) -> None:
    said = running.succeed(running.command("skaffold build"))
    assert re.findall(r"\{'name': '(\w+)', 'version': ", said) == list(SERVICES), said
    assert "it counts: {'hits'" in said


def test_skaffold_verify_fails_without_redis(running: Project) -> None:
    running.namespace.kubectl("scale", "statefulset/redis", "--replicas=0")
    running.namespace.kubectl("wait", "--for=delete", "pod/redis-0", "--timeout=60s")
    ended = running.act(running.command("skaffold build"))
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert "HTTP Error 503" in ended.stdout + ended.stderr


def test_passwords_are_made_in_the_cluster_that_skaffold_names(running: Project) -> None:
    here = run(KUBECTL, "config", "current-context").strip()
    make = f"make --no-print-directory secret NAMESPACE={running.namespace.name}"
    ended = running.act(f"SKAFFOLD_KUBE_CONTEXT={here} {make}")
    assert (ended.returncode, ended.stdout) == (0, ""), ended.stderr  # the secrets already exist
    ended = running.act(f"SKAFFOLD_KUBE_CONTEXT=another {make}")
    assert (ended.returncode, "no namespace" in ended.stderr) == (2, True), ended.stderr


def test_skaffold_delete_leaves_nothing(running: Project) -> None:
    name = running.namespace.name

    def volumes() -> list[str]:
        found = json.loads(run(KUBECTL, "get", "persistentvolumes", "--output=json"))["items"]
        return [one["metadata"]["name"] for one in found if one["spec"].get("claimRef", {}).get("namespace") == name]

    assert volumes()
    running.succeed(running.command("skaffold delete"))
    running.succeed(running.command("kubectl wait"))
    assert run(KUBECTL, "get", "namespace", name, "--ignore-not-found") == ""
    selector = f"--selector=app.kubernetes.io/part-of={name}"
    assert run(KUBECTL, "get", "all,secrets,configmaps,networkpolicies", "--all-namespaces", selector, "--output=name") == ""
    wait_for(lambda: not volumes(), 60)


# --- skaffold debug and dev ---


@dataclass
class Watching:
    """A `skaffold dev` or `skaffold debug` that has deployed the services."""

    project: Project
    log: Path

    def said(self) -> str:
        return self.log.read_text()

    def forwarded(self, what: str, port: int | str) -> int:
        """Return the port of this machine that Skaffold forwards to a port of the pod or service."""
        text = rf"Port forwarding {what} in namespace {self.project.namespace.name}, remote port {port} -> http://127.0.0.1:(\d+)"
        return int(wait_for(lambda: re.search(text, self.said()), 60, what)[1])


@contextlib.contextmanager
def started(project: Project, command: str) -> Iterator[Watching]:
    """Run `skaffold dev` or `skaffold debug`, wait until it has deployed, and end it with Ctrl-C, which deletes everything."""
    log = project.copy.parent / f"{command}.log"
    with (
        log.open("w") as file,
        subprocess.Popen(
            ["skaffold", command], cwd=project.copy, env=project.environ, stdout=file, stderr=subprocess.STDOUT
        ) as process,
    ):
        one = Watching(project, log)
        try:
            wait_for(lambda: process.poll() is not None or "atching for changes..." in one.said(), 300, command)
            assert process.poll() is None, one.said()
            yield one
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(120)
            except subprocess.TimeoutExpired:
                process.kill()
            print(one.said())
    found = run(KUBECTL, "get", "namespace", project.namespace.name, "--ignore-not-found", "--output=jsonpath={.status.phase}")
    assert found in ("", "Terminating")


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


def test_debugger_attaches_through_a_forwarded_port_and_stops_a_request(project: Project) -> None:
    source = {"path": f"{PLACE}/hitcounter/app.py"}
    line = APP.splitlines().index("        content = _CONTENT[_media_type(headers)]") + 1
    with started(project, "debug") as skaffold:
        before = project.identities()
        service = project.url("hitcounter")
        await_answer(service, GREETING)
        # Skaffold has each pod's debugger on a port of its own.
        ports = [skaffold.forwarded(rf"pod/{name}-\S+", 5678) for name in SERVICES]
        assert len(set(ports)) == len(SERVICES)
        with contextlib.closing(Debugger(ports[0])) as debugger:
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
        assert project.identities() == before
        # Anyone who reaches debugpy can run code in the pod, so debugpy listens only on the pod's loopback.
        pod = project.pod("hitcounter")
        reached = "import socket, sys; print(socket.socket().connect_ex((sys.argv[1], 5678)))"
        assert project.namespace.python(pod["metadata"]["name"], reached, "127.0.0.1") == "0\n"
        assert project.namespace.python(pod["metadata"]["name"], reached, pod["status"]["podIP"]) != "0\n"


@pytest.fixture(scope="module")
def dev(project: Project) -> Iterator[Watching]:
    """Run `skaffold dev` for the tests below. It starts while Kubernetes still deletes what `skaffold debug` had made."""
    with started(project, "dev") as one:
        yield one


def change(project: Project, files: dict[str, str], deleted: tuple[str, ...] = ()) -> None:
    """Write `files` into the copy, and delete the files in `deleted`."""
    for name, text in files.items():
        (project.copy / name).parent.mkdir(exist_ok=True)
        (project.copy / name).write_text(text)
    for name in deleted:
        (project.copy / name).unlink()


def test_changed_new_and_deleted_files_are_answered_by_the_same_pod(project: Project, dev: Watching) -> None:
    before = project.identities()
    changed = APP.replace(GREETING, "Salut from Redis")
    with_new = "from hitcounter.words import FROM\n" + APP.replace(f'b"{GREETING}!', 'FROM + b"!')
    likes = (project.copy / "likes" / "app.py").read_text()
    steps: list[tuple[str, str, dict[str, str], tuple[str, ...], str]] = [
        ("hitcounter", "changed", {"hitcounter/app.py": changed}, (), "Salut from Redis!"),
        (
            "hitcounter",
            "new",
            {"hitcounter/words.py": 'FROM = b"Salve from Redis"\n', "hitcounter/app.py": with_new},
            (),
            "Salve from Redis!",
        ),
        ("hitcounter", "deleted", {"hitcounter/app.py": APP}, ("hitcounter/words.py",), f"{GREETING}!"),
        ("likes", "changed", {"likes/app.py": likes.replace('{"count":', '{"likes":')}, (), '{"likes": 0}'),
        ("likes", "changed", {"likes/app.py": likes}, (), '{"count": 0}'),
    ]
    # Skaffold keeps one port-forward open through all changes. A refused connection would end the port-forward.
    urls = {name: f"http://127.0.0.1:{dev.forwarded(f'service/{name}', '(?:http|80)')}/" for name in SERVICES}
    for name, what, files, deleted, expected in steps:
        await_answer(urls[name])
        began = time.monotonic()
        change(project, files, deleted)
        await_answer(urls[name], expected)
        took = time.monotonic() - began
        print(f"{what} file of {name} to changed answer: {took:.2f} s")
        assert took < 5 * SLACK
    assert project.identities() == before
    pod = project.pod("hitcounter")["metadata"]["name"]
    wait_for(lambda: "words.py" not in project.namespace.kubectl("exec", pod, "--", "ls", f"{PLACE}/hitcounter"), 30)


def test_new_file_that_nothing_imports_is_in_both_pods_and_only_the_service_s_folder_can_be_written(
    project: Project, dev: Watching
) -> None:
    new = "nanoservice/new/file.txt"
    change(project, {new: "x"})
    for name in SERVICES:
        pod = project.pod(name)["metadata"]["name"]

        def content(pod: str = pod) -> str:
            with contextlib.suppress(AssertionError):
                return project.namespace.kubectl("exec", pod, "--", "cat", f"{PLACE}/{new}")
            return ""

        assert wait_for(content, 30) == "x"
        writable = "import os; print([path for path in ('/app', '/usr', '/etc', '/home', '/') if os.access(path, os.W_OK)])"
        assert project.namespace.python(pod, writable) == "['/app']\n"
    change(project, {}, (new,))
    (project.copy / new).parent.rmdir()


def test_log_of_a_service_is_text(project: Project, dev: Watching) -> None:
    assert re.search(r"^\d\d:\d\d:\d\d INFO    listening", dev.said(), re.MULTILINE)


def test_changed_requirements_give_new_pods(project: Project, dev: Watching) -> None:
    before = project.identities()
    lock = (project.copy / "requirements.txt").read_text()
    change(project, {"requirements.txt": f"{lock}# changed\n"})

    def replaced() -> bool:
        with contextlib.suppress(ValueError, KeyError, IndexError):  # there are two pods, or a new pod has no container yet
            return all(uid != before[name][0] for name, (uid, _) in project.identities().items())
        return False

    wait_for(replaced, 300)
    for name in SERVICES:
        await_answer(project.url(name))
