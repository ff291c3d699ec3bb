"""Run the service: `python -m hitcounter`, configured by environment variables."""

import os
import sys

from hitcounter.app import SERVICE
from nanoservice.server import main

sys.exit(main(SERVICE, os.environ, sys.argv[1:]))
