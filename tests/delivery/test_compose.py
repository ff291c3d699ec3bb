"""`docker compose` runs compose.yaml in a copy of the repository that is like a fresh clone.

`make test-compose` runs these tests. The build has no network: it takes its packages from the folder that `make wheels` made.
"""

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from nanoservice.testing.valkey import free_port
from nanoservice.testing.waiting import SLACK, wait_for
from tests.support import ROOT
from tests.support.command_lines import processes
from tests.support.images import WHEELS, loaded, sources
from tests.support.traffic import Traffic, counts, step, traffic

pytestmark = pytest.mark.compose

VALKEY = os.environ.get("VALKEY_IMAGE") or yaml.safe_load((ROOT / "compose.yaml").read_text())["x-valkey"].split(":-")[1][:-1]
LABEL = "com.docker.compose.project"


def docker(*arguments: str, check: bool = True, seconds: float = 120, **options: Any) -> str:
    """Run `docker` and return its standard output.

    If `check` is false, `docker` may fail, and the result is the exit status, a newline, standard output and standard error.
    """
    ended = subprocess.run(["docker", *arguments], text=True, capture_output=True, timeout=seconds, **options)
    assert not check or ended.returncode == 0, f"docker {' '.join(arguments)}: {ended.returncode}\n{ended.stdout}{ended.stderr}"
    return ended.stdout.strip() if check else f"{ended.returncode}\n{ended.stdout}{ended.stderr}"


class Project:
    """A copy of the repository, and the project that `docker compose` runs in this copy."""

    def __init__(self, folder: Path, name: str) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = sources(folder)
        for path in ("compose.yaml", ".env"):
            shutil.copy2(ROOT / path, folder)
        for path in ("compose", "manifests/redis"):
            shutil.copytree(ROOT / path, folder / path)
        self.name = name
        self.port = free_port()
        self.environ = {name: value for name, value in os.environ.items() if not name.startswith("COMPOSE_")} | {
            "COMPOSE_PROJECT_NAME": name,
            "HITCOUNTER_PORT": str(self.port),
            "WHEELS": str(WHEELS.absolute()),
        }

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def compose(self, *arguments: str, **options: Any) -> str:
        return docker("compose", *arguments, **{"cwd": self.folder, "env": self.environ, "seconds": 300, **options})

    def container(self, service: str) -> str:
        """Return the id of the container of `service`."""
        return docker(
            "ps", "--all", "--quiet", "--no-trunc", f"--filter=label={LABEL}={self.name}",
            f"--filter=label=com.docker.compose.service={service}",
        )  # fmt: skip

    def inspect(self, service: str) -> Any:
        return json.loads(docker("inspect", self.container(service)))[0]

    def hits(self) -> int:
        """Send a request to the service, and return the number of hits that the answer shows."""
        with urllib.request.urlopen(self.url, timeout=5) as answer:
            return int(re.findall(r"seen (\d+) times", answer.read().decode())[0])

    def answer(self) -> str:
        """Return the body of the answer to a GET of `/`, or an empty string if the GET fails."""
        with suppress(OSError), urllib.request.urlopen(self.url, timeout=2) as answer:
            return str(answer.read().decode())
        return ""

    def in_volume(self, user: str, script: str, **options: Any) -> str:
        """Run a shell script in a container whose working directory is the volume of secrets, and return the script's output.

        The script runs as `user` (UID or UID:GID), and has no other groups and no capabilities.
        """
        return docker(
            "run", "--rm", "--network=none", "--cap-drop=ALL", f"--user={user}", f"--volume={self.name}_secrets:/secrets:ro",
            "--workdir=/secrets", "--entrypoint=sh", VALKEY, "-c", script, **options,
        )  # fmt: skip

    def secrets(self) -> dict[str, str]:
        """Return a dict from the path of each secret in the volume to the secret's content."""
        script = "for file in redis/* redis-tls/tls.key hitcounter/password; do echo \"$file\"; tr -d '\\n' <$file; echo; done"
        lines = self.in_volume("0", script).splitlines()
        return dict(zip(lines[::2], lines[1::2], strict=True))

    def left(self) -> dict[str, list[str]]:
        """Return the containers, networks and volumes that the project still has, as a dict from kind to ids."""
        found = {
            "containers": docker("ps", "--all", "--quiet", f"--filter=label={LABEL}={self.name}"),
            "networks": docker("network", "ls", "--quiet", f"--filter=label={LABEL}={self.name}"),
            "volumes": docker("volume", "ls", "--quiet", f"--filter=label={LABEL}={self.name}"),
        }
        return {kind: identities.split() for kind, identities in found.items() if identities}

    def down(self) -> None:
        self.compose("--profile=*", "down", "--volumes", "--rmi=local", "--timeout=5")


@contextmanager
def project(folder: Path, suffix: str) -> Iterator[Project]:
    one = Project(folder, f"hitcounter-test-{os.getpid()}-{suffix}")
    try:
        yield one
    finally:
        one.down()


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """Start a project from nothing with the only command that the README gives for Compose, and yield the project."""
    with project(tmp_path_factory.mktemp("copy"), "run") as one:
        began = time.monotonic()
        one.compose("up", "--build", "--wait", "--quiet-pull")
        print(f"docker compose up --build --wait took {time.monotonic() - began:.1f} s")
        yield one


@pytest.fixture
def running(ran: Project) -> Project:
    """Return the project `ran`. First start its containers that do not run, because a previous test may have stopped some."""
    ran.compose("up", "--wait")
    return ran


def test_one_command_starts_a_service_that_keeps_its_counts_over_down_and_up(ran: Project) -> None:
    first = ran.hits()
    assert ran.hits() == first + 1
    ran.compose("down")
    assert not ran.answer()
    ran.compose("up", "--wait")
    assert ran.hits() == first + 2


def test_variables_in_a_file_take_no_service_away(tmp_path: Path) -> None:
    one = Project(tmp_path, "hitcounter-test-variables")
    del one.environ["HITCOUNTER_PORT"]
    (tmp_path / "my.env").write_text("HITCOUNTER_PORT=8765\n")
    composed = one.compose("--env-file=.env", "--env-file=my.env", "config", "--format=json")
    services = json.loads(composed)["services"]
    assert services.keys() == {"secrets", "redis", "hitcounter"}
    assert services["hitcounter"]["ports"][0]["published"] == "8765"
    refused = one.compose("--env-file=my.env", "config", check=False)
    assert refused.startswith("1\n")
    assert "use --env-file .env --env-file FILE" in refused


def test_second_up_restarts_no_running_container(running: Project) -> None:
    before = [running.inspect(service)["State"]["StartedAt"] for service in ("hitcounter", "redis")]
    running.compose("up", "--build", "--wait")
    assert [running.inspect(service)["State"]["StartedAt"] for service in ("hitcounter", "redis")] == before


def test_only_the_public_port_is_published_and_only_on_loopback(running: Project) -> None:
    published = {
        service: {port: bound for port, bound in running.inspect(service)["NetworkSettings"]["Ports"].items() if bound}
        for service in ("hitcounter", "redis")
    }
    assert published == {"hitcounter": {"8080/tcp": [{"HostIp": "127.0.0.1", "HostPort": str(running.port)}]}, "redis": {}}


# These commands read a file inside each container. The service's image has no `cat`, only Python.
LOOK = {
    "hitcounter": ("/usr/bin/python3.13", "-c", "import sys; print(open(sys.argv[1]).read())"),
    "redis": ("cat",),
}
WRITE = {
    "hitcounter": ("/usr/bin/python3.13", "-c", "import sys; open(sys.argv[1], 'w')"),
    "redis": ("touch",),
}


@pytest.mark.parametrize(("service", "user"), [("hitcounter", 65532), ("redis", 65531)])
def test_container_runs_without_privileges_and_cannot_write_to_its_root(running: Project, service: str, user: int) -> None:
    identity = running.container(service)
    status = dict(
        line.split(":\t", 1) for line in docker("exec", identity, *LOOK[service], "/proc/1/status").splitlines() if ":\t" in line
    )
    assert set(status["Uid"].split()) == set(status["Gid"].split()) == {str(user)}
    assert {int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"  # 2 means that a filter is active
    host = running.inspect(service)["HostConfig"]
    assert host["ReadonlyRootfs"]
    assert host["Memory"] <= 256 << 20
    assert host["NanoCpus"] == 10**9
    assert host["PidsLimit"] == 64
    assert not host["Privileged"]
    for path in ("/written", "/etc/written", "/home/written", "/run/secrets/written"):
        assert re.search(
            "Read-only file system|Permission denied", docker("exec", identity, *WRITE[service], path, check=False)
        ), path
    if service == "redis":
        docker("exec", identity, *WRITE[service], "/tmp/written")  # Valkey may write to /tmp


def test_valkey_has_no_route_to_other_networks_but_the_service_has_one(running: Project) -> None:
    routes = [line.split()[1] for line in docker("exec", running.container("redis"), "cat", "/proc/net/route").splitlines()[1:]]
    assert routes
    assert "00000000" not in routes  # 00000000 is the destination of a default route
    assert "00000000" in docker("exec", running.container("hitcounter"), *LOOK["hitcounter"], "/proc/net/route")


# --- secrets ---


def test_each_secret_is_read_by_its_user_alone(running: Project) -> None:
    secrets = running.secrets()
    names = {f"redis/{name}" for name in ("probe", "operator", "hitcounter")}
    assert set(secrets) == names | {"redis-tls/tls.key", "hitcounter/password"}
    assert len({secrets[name] for name in names}) == 3
    assert all(re.fullmatch("[0-9a-f]{64}", secrets[name]) for name in names)
    assert secrets["hitcounter/password"] == secrets["redis/hitcounter"]
    readers = {
        path: {user for user in ("65531:65531", "65532:65532", "1000:1000") if "readable" in running.in_volume(user, script)}
        for path in secrets
        for script in [f"if cat {path} >/dev/null 2>&1; then echo readable; fi"]
    }
    service = "65532:65532"
    assert readers == {path: {service if path.startswith("hitcounter/") else "65531:65531"} for path in secrets}


def test_secrets_are_made_once(running: Project) -> None:
    before = running.secrets()
    running.compose("up", "--wait", "--force-recreate")
    assert running.secrets() == before


def test_secrets_are_in_no_log_configuration_image_or_process(running: Project) -> None:
    # The next `up` makes new secrets and new containers. So the containers' logs have every line that was logged since these
    # secrets exist.
    running.compose("down", "--volumes")
    with processes() as commands:
        running.compose("up", "--wait")
        running.hits()
    services = ("secrets", "redis", "hitcounter")
    shown = {
        "logs": running.compose("logs", "--no-color"),
        "configuration": running.compose("--profile=*", "config"),
        "containers": "\n".join(json.dumps(running.inspect(service)) for service in services),
        "images": docker("inspect", *(f"{running.name}-{service}" for service in services)),
        "processes": "\n".join(commands),
        "environment": "\n".join(docker("exec", running.container(one), *LOOK[one], "/proc/1/environ") for one in LOOK),
    }
    for where, sign in (
        ("logs", "Ready to accept connections"),
        ("configuration", "REDIS_PASSWORD_FILE"),
        ("containers", "REDIS_PASSWORD_FILE"),
        ("images", "65532"),
        ("processes", "valkey-server"),
        ("environment", "REDIS_PASSWORD_FILE"),
    ):
        assert sign in shown[where], where
    for path, secret in running.secrets().items():
        for line in secret.splitlines():
            for where, text in shown.items():
                assert line not in text, (path, where)


# --- crashes ---


def kill(project: Project, service: str) -> None:
    """Kill process 1 of a container, as in a crash.

    Do not use `docker kill`, because the engine would not restart the container after that command.
    """
    pid = str(project.inspect(service)["State"]["Pid"])
    docker("run", "--rm", "--network=none", "--pid=host", "--user=0", "--entrypoint=sh", VALKEY, "-c", 'kill -9 "$0"', pid)


def again(project: Project, service: str, restarts: int, load: Traffic) -> None:
    """Wait up to 30 s until the engine has restarted the container, and up to 30 s more until a new request is answered."""
    wait_for(lambda: project.inspect(service)["RestartCount"] > restarts, 30, "a restart")
    since = time.monotonic()
    wait_for(lambda: load.last_answered > since, 30, "an answer")


@pytest.mark.parametrize("service", ["hitcounter", "redis"])
async def test_kill_9_loses_no_answered_hit(running: Project, service: str) -> None:
    before = await counts(running.url)
    times = []
    async with traffic(running.url, 100) as load:
        for _ in range(3):
            restarts = running.inspect(service)["RestartCount"]
            began = time.monotonic()
            await step(kill, running, service)
            await step(again, running, service, restarts, load)
            times.append(time.monotonic() - began)
            await asyncio.sleep(1)  # let the load run between two crashes
    print(f"\n{service} killed: answers again after {', '.join(f'{one:.1f}' for one in times)} s; {load.statuses()}")
    assert load.tally.answered > 100
    assert max(times) < 5 * SLACK
    after = await counts(running.url)
    load.check(before, after)


def test_stop_stops_the_service_before_redis_and_kills_neither(running: Project) -> None:
    running.compose("stop")
    for service in ("hitcounter", "redis"):
        container = running.inspect(service)
        assert (container["State"]["ExitCode"], container["State"]["OOMKilled"]) == (0, False), service
        assert container["Config"]["StopTimeout"] == 30, service
    ended = [running.inspect(service)["State"]["FinishedAt"] for service in ("hitcounter", "redis")]
    assert ended == sorted(ended)


# --- what is built ---


def test_image_is_the_one_that_make_image_makes(running: Project) -> None:
    other = loaded(f"{running.name}-made", running.folder)
    ours, theirs = json.loads(docker("inspect", running.inspect("hitcounter")["Image"], other))
    docker("rmi", other)
    assert ours["RootFS"]["Layers"] == theirs["RootFS"]["Layers"]
    assert ours["Config"]["Entrypoint"] == theirs["Config"]["Entrypoint"]


def test_digests_are_those_of_the_containerfile_and_the_manifests() -> None:
    said = yaml.safe_load((ROOT / "compose.yaml").read_text())
    containerfile = (ROOT / "Containerfile").read_text()
    for name in ("python", "base", "debug-base"):
        argument = name.upper().replace("-", "_")
        (image,) = re.findall(rf"^ARG {argument}=(\S+)$", containerfile, re.MULTILINE)
        assert said[f"x-{name}"] == f"${{{argument}_IMAGE:-{image}}}"
    (image,) = re.findall(r"image: (\S+)", (ROOT / "manifests/redis/statefulset.yaml").read_text())
    assert said["x-valkey"] == f"${{VALKEY_IMAGE:-{image}}}"


# --- the profiles ---


@contextmanager
def watching(one: Project, said: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """Run `docker compose up --watch` during the block, and write its output to the file `said`."""
    command = ["docker", "compose", "--profile=dev", "up", "--build", "--watch"]
    options: Any = {"cwd": one.folder, "env": one.environ, "stderr": subprocess.STDOUT}
    with said.open("wb") as output, subprocess.Popen(command, stdout=output, **options) as up:
        try:
            yield up
        finally:
            up.kill()


def test_dev_profile_follows_the_files(tmp_path: Path) -> None:
    said = tmp_path / "said"
    with project(tmp_path / "copy", "dev") as one, watching(one, said) as up:
        wait_for(lambda: "Watch enabled" in said.read_text() and "seen" in one.answer(), 120, "Compose serves and watches")
        identity, before = one.container("hitcounter-dev"), one.hits()

        app, extra = one.folder / "hitcounter" / "app.py", one.folder / "hitcounter" / "new" / "extra.py"
        app.write_text(app.read_text().replace("Hello from Redis", "Salut from Redis"))
        took = seconds_until(lambda: one.answer().startswith("Salut"))
        print(f"saved file to changed answer: {took:.2f} s")
        assert took < 3 * SLACK
        extra.parent.mkdir()
        extra.touch()
        seconds_until(lambda: exists(identity, "/app/hitcounter/new/extra.py"))
        extra.unlink()
        seconds_until(lambda: not exists(identity, "/app/hitcounter/new/extra.py"))
        assert one.container("hitcounter-dev") == identity
        assert one.inspect("hitcounter-dev")["RestartCount"] == 0
        seconds_until(lambda: counted(one) > before)  # each change restarts the service, and the counts must stay

        for name in ("requirements.txt", "requirements-dev.txt", "Containerfile", "image/finish.py"):
            with (one.folder / name).open("a") as file:
                file.write("# changed\n")
            identity = replaced(one, identity)
            wait_for(lambda: one.answer().startswith("Salut"), 60, "the new container answers")
        seconds_until(lambda: counted(one) > before)
        up.send_signal(signal.SIGINT)
        assert up.wait(60) in (0, 130)
        assert one.inspect("hitcounter-dev")["State"]["Status"] == "exited"


def replaced(one: Project, old: str) -> str:
    """Wait up to 120 s until a new container has replaced the container `old`, and return the new container's id."""

    def new() -> str:  # during the replacement both containers exist
        found = one.container("hitcounter-dev").split()
        return found[0] if len(found) == 1 and found != [old] else ""

    return str(wait_for(new, 120, "a new container"))


def counted(one: Project) -> int:
    """Return the number of hits that the service's answer shows, or 0 if there is no answer."""
    return int("".join(re.findall(r"seen (\d+) times", one.answer())) or 0)


def seconds_until(condition: Any) -> float:
    began = time.monotonic()
    wait_for(condition, 30)
    return time.monotonic() - began


def exists(identity: str, path: str) -> bool:
    return docker("exec", identity, "test", "-e", path, check=False).startswith("0\n")


# This script sends PING to Valkey and prints Valkey's answer. The argument is `plain` (no TLS), `tls` (TLS that trusts the
# project's CA) or `other` (TLS that trusts only the CA certificates of the image).
_PING = """
import socket, ssl, sys
raw = socket.create_connection(("redis", 6379), 3)
raw.settimeout(3)
try:
    if sys.argv[1] != "plain":
        context = ssl.create_default_context(cafile="/run/secrets/hitcounter/ca.crt" if sys.argv[1] == "tls" else None)
        raw = context.wrap_socket(raw, server_hostname="redis")
    raw.sendall(b"PING\\r\\n")
    print(raw.recv(64))
except OSError as error:
    print(error)
"""


def test_tls_profile_leaves_no_port_without_tls_and_keeps_the_counts(running: Project) -> None:
    def ping(service: str, how: str) -> str:
        return docker("exec", running.container(service), "/usr/bin/python3.13", "-c", _PING, how)

    hits = running.hits()
    assert "NOAUTH" in ping("hitcounter", "plain")  # as a control, connect to a Valkey without TLS
    running.compose("down")
    try:
        running.compose("--profile=tls", "up", "--build", "--wait")
        assert running.hits() == hits + 1
        assert "NOAUTH" in ping("hitcounter-tls", "tls")
        assert "NOAUTH" not in ping("hitcounter-tls", "plain")
        assert "CERTIFICATE_VERIFY_FAILED" in ping("hitcounter-tls", "other")
    finally:
        running.compose("--profile=tls", "down")


def test_down_leaves_nothing(tmp_path: Path) -> None:
    with project(tmp_path, "down") as one:
        one.compose("up", "--build", "--wait")
        assert {kind: len(found) for kind, found in one.left().items()} == {"containers": 3, "networks": 2, "volumes": 2}
        one.compose("--profile", "*", "down", "--volumes")
        assert one.left() == {}
