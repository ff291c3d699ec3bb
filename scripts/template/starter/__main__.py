"""Run the service: `python -m starter`, configured by environment variables."""

from nanoservice.run import run

run("starter")
