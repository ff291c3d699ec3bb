"""Run the service: `python -m hitcounter`, configured by environment variables."""

import os
import signal
import sys

# Ctrl-C while it imports ends it at once: an exception, as Python makes of it, can get lost in there.
before = signal.signal(signal.SIGINT, signal.SIG_DFL)
from hitcounter.app import SERVICE  # noqa: E402 - see above
from nanoservice.server import main  # noqa: E402 - the same

signal.signal(signal.SIGINT, before)
try:
    status = main(SERVICE, os.environ, sys.argv[1:])
except KeyboardInterrupt:  # Ctrl-C before the service itself listens for it, or after
    status = 130
sys.exit(status)
