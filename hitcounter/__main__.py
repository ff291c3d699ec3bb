"""Run the service: `python -m hitcounter`, configured by environment variables."""

import os
import signal
import sys

# A signal while it imports ends it at once. Without a handler, process 1 of a container would not hear it; and an exception, as
# Python makes of Ctrl-C, can get lost in there.
signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
signal.signal(signal.SIGINT, lambda *_: os._exit(130))
from hitcounter.app import SERVICE  # noqa: E402 - see above
from nanoservice.server import main  # noqa: E402 - the same

try:
    sys.exit(main(SERVICE, os.environ, sys.argv[1:]))
except KeyboardInterrupt:  # Ctrl-C once more, when the service listens for it no longer
    sys.exit(130)
