"""Run Python again whenever a file of this package or of those beside it changes: `python -m nanoservice.reload -m hitcounter`.

For development: of laptops, and of the image's `dev` target, where live sync changes the files.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from nanoservice.config import Config, StartError
from nanoservice.listen import bind, hand

_LOOK = 0.1  # seconds between two looks at the files: a few dozen, so it costs next to nothing


def main(root: Path, arguments: list[str]) -> int:
    """Run Python with `arguments` until a signal ends it, and again after each change of a package's files below `root`.

    Return the exit status of the last run. A run that fails waits for the change that mends it, but for bad settings.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: sys.exit(number))
    process = None
    public = _listen()
    # Nothing withdraws the address of a service that is about to come back, so there is nothing to go on serving for.
    environ = {**os.environ, "DRAIN_SECONDS": "0", **(hand(public) if public else {})}
    try:
        while True:
            seen = _files(root)
            process = subprocess.Popen([sys.executable, *arguments], env=environ, pass_fds=[public.fileno()] if public else [])
            while _files(root) == seen:
                if process.poll() == os.EX_CONFIG:
                    return os.EX_CONFIG
                time.sleep(_LOOK)
            _end(process)
    except SystemExit as asked:
        if not process:
            return 0
        for number in (signal.SIGTERM, signal.SIGINT):  # a second one is for the run, which else would outlive this
            signal.signal(number, lambda number, _: process.send_signal(number))
        # A terminal's Ctrl-C went to both; another signal would cut off what is in flight.
        return process.wait() if asked.code == signal.SIGINT and sys.stdin.isatty() else _end(process)


def _listen() -> socket.socket | None:
    """Listen in place of each run, so that a request which comes between two of them waits for the next.

    `kubectl port-forward` ends where it is refused once, and a pod whose liveness probe was refused three times starts again
    without what was synced. Return None to leave it to the runs, which then say what is wrong with the settings.
    """
    with contextlib.suppress(StartError, ValueError, OverflowError):
        port = int(os.environ.get("BIND_PORT") or Config.bind_port)
        return bind(os.environ.get("BIND_HOST") or Config.bind_host, port, "BIND_PORT")
    return None


def _files(root: Path) -> dict[Path, tuple[int, int]]:
    """Return the time and size of each file of the packages below `root`."""
    files = {}
    for package in root.glob("*/__init__.py"):
        # Not rglob: on Python 3.11 a folder that goes away meanwhile is an error to it.
        for folder, folders, names in os.walk(package.parent):
            folders[:] = [name for name in folders if name != "__pycache__"]
            for path in (Path(folder, name) for name in names):
                with contextlib.suppress(FileNotFoundError):  # between the listing and here: seen with the next look
                    status = path.stat()
                    files[path] = status.st_mtime_ns, status.st_size
    return files


def _end(process: "subprocess.Popen[bytes]") -> int:
    """Have the process answer what is in flight and end; return its exit status."""
    process.terminate()
    return process.wait()


if __name__ == "__main__":
    sys.exit(main(Path(__file__).parent.parent, sys.argv[1:]))
