"""Run a service in a separate process, so that a test can send signals and read the exit status and the log, as users do."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import aiohttp

from nanoservice.testing.served import Served
from nanoservice.testing.valkey import Valkey
from nanoservice.testing.waiting import SLACK, eventually, wait_for
from tests.support import ROOT
from tests.support.loops import EVENT_LOOP, python_path


def environment(settings: dict[str, str], loop: str = EVENT_LOOP) -> dict[str, str]:
    """Return the complete environment for a service: `settings`, and the variables for imports, event loop and coverage."""
    coverage = {name: value for name, value in os.environ.items() if name.startswith(("COVERAGE", "COV_"))}
    return {"PATH": os.environ["PATH"], "PYTHONPATH": python_path(ROOT, loop=loop), **coverage, **settings}


def without(package: str, module: str) -> tuple[str, ...]:
    """Return a command that runs `module` as if `package` were not installed."""
    code = f"import runpy, sys; sys.modules[{package!r}] = None; runpy.run_module({module!r}, run_name='__main__')"
    return sys.executable, "-c", code


@dataclass
class Process:
    """A service that runs in a separate process."""

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

    def logged(self, message: str) -> bool:
        """Return whether a line of the service's log has this message."""
        return any(line["message"] == message for line in self.log)

    def wait_until_it_listens(self, seconds: float = 20 * SLACK) -> None:
        """Wait for the log line that names the ports, and set `port` and `admin_port`."""

        def listening() -> dict[str, Any] | None:
            assert self.popen.poll() is None, f"it stopped with status {self.popen.returncode}"
            return next((line for line in self.log if "port" in line), None)

        line = wait_for(listening, seconds, "it listens")
        self.port, self.admin_port = line["port"], line["admin_port"]

    def end(self, how: int = signal.SIGTERM, seconds: float = 30) -> int:
        """Send the signal `how`, wait until the process exits, and return the exit status.

        Signal 0 has no effect. Use it for a process that is already stopping.
        """
        if self.popen.poll() is None:
            self.popen.send_signal(how)
        status = self.popen.wait(seconds)
        self._reader.join(5)
        return status


class Spawn(Protocol):
    """A function that starts a service with the settings `environ`, and returns when the service listens."""

    def __call__(
        self, environ: dict[str, str], cwd: Path = ROOT, command: Sequence[str] = (), loop: str = EVENT_LOOP
    ) -> Process: ...


@contextlib.contextmanager
def spawning(module: str) -> Iterator[Spawn]:
    """Yield a function that starts services with `python -m module` or another command; stop all these services afterwards."""
    processes: list[Process] = []

    def spawn(environ: dict[str, str], cwd: Path = ROOT, command: Sequence[str] = (), loop: str = EVENT_LOOP) -> Process:
        popen = subprocess.Popen(
            command or (sys.executable, "-m", module),
            env=environment({"LOG_FORMAT": "json", **environ}, loop),
            cwd=cwd,
            text=True,
            bufsize=1,
            stdout=subprocess.PIPE,
        )
        process = Process(popen)
        processes.append(process)
        process.wait_until_it_listens()
        return process

    try:
        yield spawn
    finally:
        for process in processes:
            if process.popen.poll() is None:
                process.popen.terminate()
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.end(0, seconds=20)
            process.popen.kill()
            process.popen.wait()
            assert process.popen.stdout
            process.popen.stdout.close()


def interrupted(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Wait until the process exits after a signal. Return the exit status and the output."""
    try:
        output, errors = process.communicate(timeout=10 * SLACK)
    finally:
        process.kill()  # otherwise the caller's `with` would wait for ever for a process that ignores the signal
    return process.returncode, output + errors


def interrupted_at(imported: str, module: str, how: int, settings: dict[str, str], cwd: Path) -> tuple[int, str]:
    """Run `module`, and send the signal `how` after the import of `imported`. Return the exit status and the output."""
    command = [sys.executable, "-X", "importtime", "-m", module]  # standard error names each import
    with subprocess.Popen(
        command, env=environment(settings), cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr
        next(line for line in process.stderr if line.rstrip().endswith(f" {imported}"))
        process.send_signal(how)
        return interrupted(process)


def resident(process: Process) -> int:
    """Return the resident memory of the process, in bytes."""
    return int(Path(f"/proc/{process.popen.pid}/statm").read_text().split()[1]) * 4096


async def metric(service: Served | Process, name: str) -> float:
    """Return the sum of all samples of the metric `name`, from the admin port. `name` may have labels: `a{b="c"}`."""
    async with aiohttp.request("GET", f"http://127.0.0.1:{service.admin_port}/metrics") as answer:
        lines = (await answer.text()).splitlines()
    samples = [line.rsplit(" ", 1) for line in lines]
    return sum(float(value) for sample, value in samples if name in (sample, sample.partition("{")[0]))


async def check_requests_in_flight(process: Process, valkey: Valkey, pending: str) -> None:
    """Send SIGTERM while a request waits for Redis. Fail unless the request is answered and the process exits with status 0.

    `pending` is the metric with the number of requests that wait.
    """

    async def one_waits() -> bool:
        return await metric(process, pending) == 1

    async with aiohttp.ClientSession() as client:
        async with client.get(process.url) as answer:
            assert answer.status == 200
        valkey.freeze()
        waiting = asyncio.create_task(client.get(process.url))
        await eventually(one_waits, 5)
        process.popen.send_signal(signal.SIGTERM)
        await asyncio.to_thread(wait_for, lambda: process.logged("draining"), 5)
        valkey.thaw()
        async with await waiting as answer:
            assert answer.status == 200
    assert process.end(0) == 0
