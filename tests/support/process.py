"""A service as users run it: a process, known by its signals, its exit status and its log."""

import json
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from nanoservice.testing.served import Served

COMMAND = sys.executable, "-m", "hitcounter"
WITHOUT = "import sys, runpy; sys.modules[%r] = None; runpy.run_module('hitcounter', run_name='__main__')"  # a package


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


def resident(process: Process) -> int:
    """Return how many bytes of memory the process uses."""
    return int(Path(f"/proc/{process.popen.pid}/statm").read_text().split()[1]) * 4096


async def metric(service: Served | Process, name: str) -> float:
    """Return the sum of the samples of `name` on the admin port."""
    async with aiohttp.request("GET", f"http://127.0.0.1:{service.admin_port}/metrics") as answer:
        lines = (await answer.text()).splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.split("{")[0].split(" ")[0] == name)
