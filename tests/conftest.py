"""What the tests share: a real Valkey that can be killed and restarted, and the service, in this process or in its own."""

import asyncio
import atexit
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import redis

from hitcounter.app import SERVICE
from nanoservice.embedded import executable
from nanoservice.listen import bind
from nanoservice.server import Running
from nanoservice.service import Service

ROOT = Path(__file__).parent.parent
COMMAND = sys.executable, "-m", "hitcounter"
WITHOUT = "import sys, runpy; sys.modules[%r] = None; runpy.run_module('hitcounter', run_name='__main__')"  # a package
SLACK = 3  # the machines are shared: a limit that a test checks is allowed this many times as much


def wait_for(condition: Callable[[], Any], seconds: float, what: str = "") -> Any:
    """Return what `condition` returns, as soon as that is true; fail after `seconds`."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"not within {seconds} s: {what or condition}"
        time.sleep(0.01)
    return value


def free_port() -> int:
    """Return a port for whoever is told of it. On Linux, a socket that does not listen keeps it from being given to others."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("127.0.0.1", 0))
    port = int(sock.getsockname()[1])
    if sys.platform == "linux":
        atexit.register(sock.close)  # until then it keeps the port
    else:
        sock.close()
    return port


class Valkey:
    """A real Valkey on a TCP port of loopback. A kill costs it nothing; it does not wait for the disk."""

    def __init__(self, data: Path, *options: str) -> None:
        self.data = data
        self.port = free_port()
        self.options = options
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *options: str) -> None:
        """Start it on its data, and wait until it serves."""
        command = [executable(), "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.data), "--save", ""]
        command += ["--appendonly", "yes", "--appendfsync", "no", "--maxmemory-policy", "noeviction", "--loglevel", "warning"]
        self.process = subprocess.Popen([*command, *self.options, *options], stdout=subprocess.DEVNULL)
        wait_for(self.answers, 10 * SLACK, "Valkey answers")

    def answers(self) -> bool:
        assert self.process
        assert self.process.poll() is None
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1) as client:
            client.sendall(b"PING\r\n")
            return client.recv(64).startswith((b"+PONG", b"-NOAUTH"))
        return False

    def end(self, how: int = signal.SIGTERM) -> None:
        """End it with the signal `how`, and wait for that."""
        if self.process:
            self.process.send_signal(signal.SIGCONT)
            self.process.send_signal(how)
            self.process.wait(30)
            self.process = None

    def kill(self) -> None:
        """End it as a crash would."""
        self.end(signal.SIGKILL)

    def freeze(self) -> None:
        """Stop it in its tracks: it keeps its connections and answers nothing."""
        assert self.process
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self.process
        self.process.send_signal(signal.SIGCONT)

    def client(self, **options: Any) -> "redis.Redis":
        return redis.Redis(port=self.port, decode_responses=True, **options)

    def run(self, *command: Any) -> Any:
        """Return the answer to one command."""
        with self.client() as client:
            return client.execute_command(*command)

    def environ(self, **more: str) -> dict[str, str]:
        """Return the settings of a service that uses this server."""
        return {"REDIS_HOST": "127.0.0.1", "REDIS_PORT": str(self.port), "BIND_PORT": "0", "ADMIN_PORT": "0", **more}


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[Valkey]:
    """A Valkey of the test's own, started."""
    data = tmp_path / "valkey"
    data.mkdir()
    server = Valkey(data)
    server.start()
    yield server
    server.end(signal.SIGKILL)


@dataclass
class Served:
    """A service that runs in this process, and a client of it."""

    running: Running
    port: int
    admin_port: int
    client: aiohttp.ClientSession


@contextlib.asynccontextmanager
async def serving(environ: dict[str, str], service: Service[Any] = SERVICE) -> AsyncIterator[Served]:
    """Serve `service` with the settings `environ` on free ports of loopback."""
    public, admin = bind("127.0.0.1", 0, "BIND_PORT"), bind("127.0.0.1", 0, "ADMIN_PORT")
    running = await Running.start(service, service.config.read(environ), public, admin)
    port, admin_port = public.getsockname()[1], admin.getsockname()[1]
    try:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}", connector=aiohttp.TCPConnector(limit=0)) as client:
            yield Served(running, port, admin_port, client)
    finally:
        await running.close()


@pytest.fixture
async def served(valkey: Valkey) -> AsyncIterator[Served]:
    """The hitcounter in this process, on a Valkey of its own."""
    async with serving(valkey.environ()) as it:
        yield it


@dataclass
class Process:
    """A hitcounter that runs as users run it: a process, known by its signals, its exit status and its log."""

    popen: subprocess.Popen[str]
    port: int = 0
    admin_port: int = 0
    log: list[dict[str, Any]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def __post_init__(self) -> None:
        self._reader = threading.Thread(target=self._read_log)
        self._reader.start()

    def _read_log(self) -> None:
        assert self.popen.stdout
        for line in self.popen.stdout:
            self.log.append(json.loads(line))

    def end(self, how: int = signal.SIGTERM, seconds: float = 30) -> int:
        """Send the signal `how` (0: it was asked to end already), and return the exit status."""
        if self.popen.poll() is None:
            self.popen.send_signal(how)
        status = self.popen.wait(seconds)
        self._reader.join(5)
        return status


@pytest.fixture
def spawn() -> Iterator[Callable[..., Process]]:
    """Return a function that starts a hitcounter with the settings it is given and waits until it listens."""
    processes: list[Process] = []

    def start(environ: dict[str, str], cwd: Path = ROOT, command: Sequence[str] = COMMAND) -> Process:
        environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "LOG_FORMAT": "json", **environ}
        environ |= {name: value for name, value in os.environ.items() if name.startswith(("COVERAGE", "COV_"))}
        popen = subprocess.Popen(command, env=environ, cwd=cwd, text=True, bufsize=1, stdout=subprocess.PIPE)
        process = Process(popen)
        processes.append(process)

        def listens() -> bool:
            assert popen.poll() is None, f"it ended with status {popen.returncode}"
            return any("port" in line for line in process.log)

        wait_for(listens, 20 * SLACK, "it listens")
        started = next(line for line in process.log if "port" in line)
        process.port, process.admin_port = started["port"], started["admin_port"]
        return process

    yield start
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.end(seconds=20)
        process.popen.kill()
        process.popen.wait()
        assert process.popen.stdout
        process.popen.stdout.close()


def resident(process: Process) -> int:
    """Return how many bytes of memory the process uses."""
    return int(Path(f"/proc/{process.popen.pid}/statm").read_text().split()[1]) * 4096


async def metric(service: Served | Process, name: str) -> float:
    """Return the sum of the samples of `name` on the admin port."""
    async with aiohttp.request("GET", f"http://127.0.0.1:{service.admin_port}/metrics") as answer:
        lines = (await answer.text()).splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.split("{")[0].split(" ")[0] == name)


async def eventually(condition: Callable[[], Any], seconds: float) -> None:
    """Return as soon as `condition`, which may be a coroutine function, returns something true; fail after `seconds`."""
    async with asyncio.timeout(seconds):
        while not (await value if asyncio.iscoroutine(value := condition()) else value):
            await asyncio.sleep(0.01)
