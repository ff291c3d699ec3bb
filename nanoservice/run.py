"""Run a service as a process. Each service's `__main__.py` calls `run`.

This module imports only the standard library before `run` has installed its signal handlers.
"""

import importlib
import os
import signal
import sys


def run(package: str) -> None:
    """Run `SERVICE` of the module `package`.app with the process's environment and arguments, then exit the process."""
    # Exit at once on a signal during imports. Process 1 of a container ignores signals without a handler, and a
    # KeyboardInterrupt raised inside an import can be swallowed.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    server, app = (importlib.import_module(name) for name in ("nanoservice.server", f"{package}.app"))
    try:
        sys.exit(server.main(app.SERVICE, os.environ, sys.argv[1:]))
    except KeyboardInterrupt:  # A second Ctrl-C arrived after the service had removed its handlers.
        sys.exit(130)
