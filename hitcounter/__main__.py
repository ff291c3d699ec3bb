"""Run the service: `python -m hitcounter`, configured by environment variables."""

from nanoservice.run import run

run("hitcounter")
