"""Run the service: `python -m hitcounter`, configured by environment variables."""

import os
import signal
import sys

# Exit at once on a signal during imports. Process 1 of a container ignores signals without a handler, and a KeyboardInterrupt
# raised inside an import can be swallowed.
signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
signal.signal(signal.SIGINT, lambda *_: os._exit(130))
from hitcounter.app import SERVICE  # noqa: E402 - see above
from nanoservice.server import main  # noqa: E402 - see above

try:
    sys.exit(main(SERVICE, os.environ, sys.argv[1:]))
except KeyboardInterrupt:  # A second Ctrl-C arrived after the service had removed its handlers.
    sys.exit(130)
