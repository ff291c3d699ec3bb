"""Tools that several tests share. A tool that a test of the chassis uses must not import a service."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def needs_linux(reason: str) -> pytest.MarkDecorator:
    """Return a mark that skips a test on other systems than Linux."""
    return pytest.mark.skipif(sys.platform != "linux", reason=reason)
