"""Restart Python whenever a file of this package or of a package beside it changes: `python -m nanoservice.reload -m hitcounter`.

This module is for development: on a laptop, and in the image's `dev` target, where live sync changes the files.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from nanoservice.config import Config
from nanoservice.errors import StartError
from nanoservice.listen import bind, child_environ

_POLL_SECONDS = 0.1  # the time between two scans of the files; scanning a few dozen files costs next to nothing
# The service must stop within this time, which is longer than the service's own limits. A service whose handler blocks the event
# loop does not react to signals.
_STOP_SECONDS = 20.0


def main(root: Path, arguments: list[str]) -> int:
    """Run Python with `arguments` until a signal arrives, and restart it after each change of a package's files below `root`.

    Return the exit status of the last run. If a run fails, wait for the next change and run again; but if its settings are bad
    (status 78), return at once.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: sys.exit(number))
    process = None
    public = _listen()
    # Skip the drain: the service comes back at the same address, so no endpoint has to be withdrawn.
    environ = {**os.environ, "DRAIN_SECONDS": "0", **(child_environ(public) if public else {})}
    try:
        while True:
            seen = _files(root)
            process = subprocess.Popen([sys.executable, *arguments], env=environ, pass_fds=[public.fileno()] if public else [])
            while _files(root) == seen:
                if process.poll() == os.EX_CONFIG:
                    return os.EX_CONFIG
                time.sleep(_POLL_SECONDS)
            _stop(process)
    except SystemExit as signalled:
        if not process:
            return 0
        for number in (signal.SIGTERM, signal.SIGINT):  # Pass a second signal to the run, or it would outlive this process.
            signal.signal(number, lambda number, _: process.send_signal(number))
        # A terminal sends Ctrl-C to the service, too. Another signal would cut off the requests in flight, so only wait.
        return _stop(process, ask=signalled.code != signal.SIGINT or not sys.stdin.isatty())


def _listen() -> socket.socket | None:
    """Open one listening socket for all runs, so that a request between two runs waits for the next run.

    Without this socket, connections between two runs would be refused. `kubectl port-forward` exits after one refused connection.
    After three failed liveness probes the kubelet restarts the container, and the synced files are lost.

    Return None if listening fails: then the service itself listens, and reports what is wrong.
    """
    with contextlib.suppress(StartError, ValueError, OverflowError):
        port = int(os.environ.get("BIND_PORT") or Config.bind_port)
        return bind(os.environ.get("BIND_HOST") or Config.bind_host, port, "BIND_PORT")
    return None


def _files(root: Path) -> dict[Path, tuple[int, int]]:
    """Return the modification time and size of each file of the packages below `root`."""
    files = {}
    for package in root.glob("*/__init__.py"):
        # On Python 3.11, rglob would raise an error if a folder disappeared during the scan.
        for folder, folders, names in os.walk(package.parent):
            folders[:] = [name for name in folders if name != "__pycache__"]
            for path in (Path(folder, name) for name in names):
                with contextlib.suppress(FileNotFoundError):  # The file has just disappeared. The next scan notices this.
                    status = path.stat()
                    files[path] = status.st_mtime_ns, status.st_size
    return files


def _stop(process: "subprocess.Popen[bytes]", *, ask: bool = True) -> int:
    """Let the process finish the requests in flight and exit, or kill it if it takes too long; return its exit status."""
    if ask:
        process.terminate()
    try:
        return process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


if __name__ == "__main__":
    sys.exit(main(Path(__file__).parent.parent, sys.argv[1:]))
