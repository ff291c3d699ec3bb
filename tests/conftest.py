"""What the tests share: a real Valkey that can be killed and restarted, and the service, in this process or in its own."""

import contextlib
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path

import pytest

from hitcounter.app import SERVICE
from nanoservice.testing.served import Served, serving
from nanoservice.testing.valkey import Valkey
from nanoservice.testing.waiting import SLACK, wait_for
from tests.support import ROOT
from tests.support.process import COMMAND, Process


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[Valkey]:
    """A Valkey of the test's own, started."""
    data = tmp_path / "valkey"
    data.mkdir()
    server = Valkey(data)
    server.start()
    yield server
    server.end(signal.SIGKILL)


@pytest.fixture
async def served(valkey: Valkey) -> AsyncIterator[Served]:
    """The hitcounter in this process, on a Valkey of its own."""
    async with serving(SERVICE, valkey.environ()) as it:
        yield it


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
