"""A cluster with the service on it, as `make deploy` leaves it, and a constant load on it.

`make e2e` says which cluster: the current context of kubectl. All lies in namespaces of this run, which it deletes.
"""

import asyncio
import atexit
import functools
import itertools
import json
import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest
from conftest import ROOT, wait_for
from load import Tally

KUBECTL = os.environ.get("KUBECTL", "kubectl")
SERVICE = "app.kubernetes.io/name=hitcounter"


def run(*command: str, input: str | None = None, env: dict[str, str] | None = None, seconds: float = 300) -> str:
    """Return what `command` writes to standard output; fail with all that it says if it fails."""
    done = subprocess.run(
        command, input=input, capture_output=True, text=True, cwd=ROOT, env=os.environ | (env or {}), timeout=seconds
    )
    assert done.returncode == 0, f"{' '.join(command)}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


class Namespace:
    """A namespace of the cluster, and what is done in it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def kubectl(self, *arguments: str, **options: Any) -> str:
        return run(KUBECTL, f"--namespace={self.name}", "--request-timeout=60s", *arguments, **options)

    def make(self, *arguments: str, **options: Any) -> str:
        """Run a target of the Makefile on this namespace."""
        return run("make", "--no-print-directory", f"NAMESPACE={self.name}", *arguments, **options)

    def get(self, *what: str) -> Any:
        """Return an object, or the list of those that are selected."""
        found = json.loads(self.kubectl("get", *what, "--output=json"))
        return found["items"] if found["kind"] == "List" else found

    def pods(self, selector: str = SERVICE) -> list[Any]:
        """Return the pods that are selected and not about to end."""
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
        """Run a Python script in a pod that has the service's image, which has nothing else to run."""
        return self.kubectl("exec", pod, "--", "/usr/bin/python3.13", "-c", script, *arguments, **options)

    def counts(self) -> tuple[int, int]:
        """Count a hit from within the service's pod, and return hits and posts."""
        script = (
            "import urllib.request as u; r = u.Request('http://localhost:8080/', headers={'Accept': 'application/json'});"
            "print(u.urlopen(r, timeout=5).read().decode())"
        )
        content = json.loads(self.python(self.ready()[0], script))
        return content["hits"], content["posts"]

    def create(self, level: str = "restricted") -> None:
        """Make it, with Pod Security of this level."""
        run(KUBECTL, "create", "namespace", self.name)
        run(KUBECTL, "label", "namespace", self.name, f"pod-security.kubernetes.io/enforce={level}")

    def delete(self) -> None:
        run(KUBECTL, "delete", "namespace", self.name, "--ignore-not-found", "--wait=false")

    def valkey(self, *command: str, user: str = "operator", password: str | None = None) -> str:
        """Return what Valkey answers to a command, given in its pod: through the socket, as a user of its own."""
        script = (
            'export REDISCLI_AUTH="${2:-$(tail -n 1 "/run/secrets/redis/$1")}"; user=$1; shift 2;'
            'exec valkey-cli -s /run/valkey/socket --user "$user" "$@"'
        )
        return self.kubectl("exec", "redis-0", "--", "sh", "-c", script, "sh", user, password or "", *command).strip()


RUN = f"hitcounter-e2e-{secrets.token_hex(3)}"  # how the namespaces of this run begin


@dataclass
class Deployed:
    """What `make deploy` left."""

    namespace: Namespace
    url: str
    image: str  # as the cluster knows it
    valkey: str
    warnings: list[tuple[str, str]]  # the events that it brought: reason, message


@functools.cache
def deployed() -> Deployed:
    """Return the service and its Redis as `make deploy` leaves them: once in a run, which ends with `make undeploy`."""
    namespace = Namespace(RUN)
    atexit.register(namespace.make, "undeploy")
    url = namespace.make("deploy", seconds=900).splitlines()[-1]
    image, valkey = [
        namespace.get(kind, name)["spec"]["template"]["spec"]["containers"][0]["image"]
        for kind, name in (("deployment", "hitcounter"), ("statefulset", "redis"))
    ]
    warnings = namespace.get("events", "--field-selector=type=Warning")
    return Deployed(namespace, url, image, valkey, [(event["reason"], event["message"]) for event in warnings])


@pytest.fixture
def cluster() -> Deployed:
    """What `make deploy` left, with one pod that is ready, whatever the test before did."""
    namespace = deployed().namespace
    namespace.kubectl("scale", "deployment/hitcounter", "--replicas=1")
    for what in "statefulset/redis", "deployment/hitcounter":
        namespace.await_rollout(what)
    wait_for(lambda: len(namespace.pods()) == 1 and namespace.ready(), 60)
    return deployed()


@pytest.fixture
def other() -> Iterator[Namespace]:
    """A second namespace, with nothing in it."""
    with namespace("other") as one:
        yield one


@contextmanager
def namespace(name: str, level: str = "restricted") -> Iterator[Namespace]:
    """Make a namespace of this run, and delete it at the end, when nobody waits for that any more."""
    one = Namespace(f"{RUN}-{name}-{secrets.token_hex(2)}")
    one.create(level)
    try:
        yield one
    finally:
        one.delete()


def compose(deployed: Deployed, namespace: Namespace, *lines: str) -> str:
    """Return what Kustomize makes of the lines, in `namespace` and with the images of this run."""
    folder = ROOT / "manifests" / f".{namespace.name}"
    folder.mkdir(exist_ok=True)
    images = {"hitcounter": deployed.image, "docker.io/valkey/valkey": deployed.valkey}
    try:
        text = [f"namespace: {namespace.name}", *lines, "images:"]
        for name, image in images.items():
            if "@" not in image:  # else it is the one that stands in the manifests
                new, tag = image.rsplit(":", 1)
                text.append(f'  - {{name: {name}, newName: {new}, newTag: "{tag}"}}')
        (folder / "kustomization.yaml").write_text("\n".join(text))
        return run(KUBECTL, "kustomize", str(folder.relative_to(ROOT)))
    finally:
        shutil.rmtree(folder)


def install(deployed: Deployed, namespace: Namespace, *lines: str) -> None:
    """Have the service and its Redis run in `namespace`: not on a port of the node, which there is once. `lines` go on with the
    kustomization, such as `components: [../components/redis-tls]`.
    """
    namespace.make("secret")
    namespace.apply(compose(deployed, namespace, "resources: [../hitcounter, ../redis]", *lines))
    for what in "statefulset/redis", "deployment/hitcounter":
        namespace.await_rollout(what)


# --- load ---


_ports = itertools.cycle(range(10_000, 30_000))


def own_port(address: Any) -> socket.socket:
    """Return a socket with a local port that no connection had for a long time.

    This runs on the node, or beside it. A connection that is refused there, since the service has no pod at the moment, leaves an
    entry in the kernel's table of connections for two minutes, and another one from the same port would be refused by that.
    """
    family, kind, protocol, *_ = address
    while True:
        one = socket.socket(family, kind, protocol)
        one.setblocking(False)
        try:
            one.bind(("", next(_ports)))
        except OSError:  # in use
            one.close()
        else:
            return one


@dataclass
class Failure:
    """A request that was not answered with 200: when it was sent, how long it took, and what came."""

    at: float
    seconds: float
    what: str


@dataclass
class Traffic:
    """Requests at a constant rate: nine GETs for a POST. Each is sent once; nothing hides a failure by a second try."""

    url: str
    rate: float
    tally: Tally = field(default_factory=Tally)
    failures: list[Failure] = field(default_factory=list)
    slowest: float = 0.0
    sent: int = 0
    last_answered: float = 0.0  # when the last request was sent that was answered with 200

    async def _ask(self, session: aiohttp.ClientSession, kind: str | None) -> None:
        began = time.monotonic()
        try:
            async with session.request("GET" if kind is None else "POST", self.url) as answer:
                status, body = answer.status, await answer.read()
                what = str(status)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            status, body, what = 0, b"", type(error).__name__
        seconds = time.monotonic() - began
        self.slowest = max(self.slowest, seconds)
        self.tally.add(kind, status, body)
        if status == 200:
            self.last_answered = max(self.last_answered, began)
        else:
            self.failures.append(Failure(began, seconds, what))

    async def run(self, ended: asyncio.Event, least: int) -> None:
        """Send until `ended` is set and `least` were sent."""
        connector = aiohttp.TCPConnector(
            limit=0, socket_factory=own_port
        )  # else requests would wait here while Redis is away, not at the service
        timeout = aiohttp.ClientTimeout(total=10, connect=5)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers={"Accept": "application/json"}) as session:
            session._retry_connection = False
            under_way: set[asyncio.Task[None]] = set()
            loop = asyncio.get_running_loop()
            due = loop.time()
            while self.sent < least or not ended.is_set():
                task = asyncio.create_task(self._ask(session, None if self.sent % 10 else ""))
                under_way.add(task)
                task.add_done_callback(under_way.discard)
                self.sent += 1
                due += 1 / self.rate
                await asyncio.sleep(max(0.0, due - loop.time()))
            if under_way:
                await asyncio.wait(under_way, timeout=15)

    def check(self, before: tuple[int, int], after: tuple[int, int]) -> None:
        """Fail unless each number was given once, and the store counted all that was answered, and nothing that was not sent.

        `before` and `after`: the counts, each with a hit of its own.
        """
        tally = self.tally
        for kind, numbers, failed, first, last in (
            ("hits", tally.hits, tally.failed_hits, before[0], after[0] - 1),
            ("posts", tally.posts, tally.failed_posts, before[1], after[1]),
        ):
            assert len(set(numbers)) == len(numbers), f"{kind}: a number was answered twice"
            assert max(numbers, default=first) <= last, f"{kind}: the store is behind what was answered"
            assert len(numbers) <= last - first <= len(numbers) + failed, f"{kind}: {first} to {last}, {len(numbers)} answered"

    def statuses(self) -> str:
        """Return what came of the requests, in a line."""
        counts: dict[str, int] = {}
        for failure in self.failures:
            counts[failure.what] = counts.get(failure.what, 0) + 1
        return f"{self.sent} requests, slowest {self.slowest:.2f} s, failed: {counts or 0}"


@asynccontextmanager
async def traffic(url: str, rate: float, *, least: int = 0) -> AsyncIterator[Traffic]:
    """Send requests to `url` while the block runs, and until `least` were sent."""
    one = Traffic(url, rate)
    ended = asyncio.Event()
    task = asyncio.create_task(one.run(ended, least))
    try:
        yield one
    finally:
        ended.set()
        await task


async def step(work: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Do what blocks in a thread, while the load goes on."""
    return await asyncio.to_thread(work, *arguments, **options)


async def counts(url: str) -> tuple[int, int]:
    """Count a hit, and return hits and posts."""
    async with (
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(socket_factory=own_port)) as session,
        session.get(url, headers={"Accept": "application/json"}) as answer,
    ):
        content = await answer.json()
        assert answer.status == 200, content
        return content["hits"], content["posts"]


async def reachable(url: str) -> bool:
    """Return whether a new connection is answered."""
    try:
        async with (
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(socket_factory=own_port)) as session,
            session.get(f"{url}livez", timeout=aiohttp.ClientTimeout(total=5)) as answer,
        ):
            return answer.status == 200
    except (aiohttp.ClientError, OSError, TimeoutError):
        return False
