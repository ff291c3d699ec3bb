"""Run the service: `python -m hitcounter`, configured by environment variables."""

import os
import sys

try:
    from hitcounter.app import SERVICE
    from nanoservice.server import main

    status = main(SERVICE, os.environ, sys.argv[1:])
except KeyboardInterrupt:  # Ctrl-C before the service itself listens for it, or after
    status = 130
sys.exit(status)
