"""A real Valkey that a test can stop, kill, freeze and start again."""

import atexit
import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import redis

from nanoservice.embedded import executable
from nanoservice.testing.waiting import SLACK, wait_for


def free_port() -> int:
    """Return a free port. On Linux, a bound socket that does not listen keeps the kernel from giving the port to others."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("127.0.0.1", 0))
    port = int(sock.getsockname()[1])
    if sys.platform == "linux":
        atexit.register(sock.close)  # The open socket reserves the port until this process exits.
    else:
        sock.close()
    return port


def program() -> str:
    """Return the path of the server for the tests: Valkey, or the server that the environment variable `REDIS_SERVER` names."""
    return os.environ.get("REDIS_SERVER") or executable()


class Valkey:
    """A real Valkey on a TCP port of loopback, with its data in the folder `data`.

    Before Valkey answers, it passes each write to the kernel, so a kill of the process loses nothing. To keep tests fast, Valkey
    does not wait until the write is on disk.
    """

    def __init__(self, data: Path, *options: str) -> None:
        self.data = data
        self.port = free_port()
        self.options = options
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *options: str) -> None:
        """Start the server on its data, with further command-line `options`, and wait until it answers."""
        command = [program(), "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.data), "--save", ""]
        command += ["--appendonly", "yes", "--appendfsync", "no", "--maxmemory-policy", "noeviction", "--loglevel", "warning"]
        self.process = subprocess.Popen([*command, *self.options, *options], stdout=subprocess.DEVNULL)
        wait_for(self.answers, 10 * SLACK, "Valkey answers")

    def answers(self) -> bool:
        """Return whether the server answers a PING."""
        assert self.process
        assert self.process.poll() is None
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1) as client:
            client.sendall(b"PING\r\n")
            return client.recv(64).startswith((b"+PONG", b"-NOAUTH"))
        return False

    def end(self, how: int = signal.SIGTERM) -> None:
        """Send the server the signal `how`, and wait until it has stopped."""
        if self.process:
            self.process.send_signal(signal.SIGCONT)
            self.process.send_signal(how)
            self.process.wait(30)
            self.process = None

    def kill(self) -> None:
        """Stop the server as a crash would."""
        self.end(signal.SIGKILL)

    def freeze(self) -> None:
        """Suspend the server: it keeps its connections and answers nothing."""
        assert self.process
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Resume a frozen server."""
        assert self.process
        self.process.send_signal(signal.SIGCONT)

    def client(self, **options: Any) -> "redis.Redis":
        """Return a client of the server. The caller closes it."""
        return redis.Redis(port=self.port, decode_responses=True, **options)

    def run(self, *command: Any) -> Any:
        """Send one command, and return its reply."""
        with self.client() as client:
            return client.execute_command(*command)

    def environ(self, **more: str) -> dict[str, str]:
        """Return the settings of a service that uses this server and listens on free ports. `more` adds settings."""
        return {"REDIS_HOST": "127.0.0.1", "REDIS_PORT": str(self.port), "BIND_PORT": "0", "ADMIN_PORT": "0", **more}
