"""Test the start of the counter, and its first answer."""

import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from nanoservice.testing.valkey import Valkey
from nanoservice.testing.waiting import SLACK
from tests.support import ROOT
from tests.support.process import Process, Spawn, environment, interrupted_at

EMBEDDED = {"BIND_PORT": "0", "ADMIN_PORT": "0", "BIND_HOST": "127.0.0.1"}


def run(settings: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a hitcounter until it exits by itself."""
    command = [sys.executable, "-m", "hitcounter", *arguments]
    return subprocess.run(command, env=environment(settings), cwd=ROOT, text=True, capture_output=True, timeout=30)


def get(process: Process) -> str:
    with urllib.request.urlopen(process.url, timeout=10) as answer:
        return str(answer.read().decode())


def test_bad_settings_are_all_reported_and_the_status_is_78() -> None:
    ended = run({"BIND_PORT": "x", "REDIS_PASWORD": "s3cret", "LANES": "0"})
    assert ended.returncode == os.EX_CONFIG == 78
    assert ended.stderr.splitlines() == [
        "hitcounter: REDIS_PASWORD is not a setting; the nearest is REDIS_PASSWORD",
        "hitcounter: BIND_PORT must be a whole number from 0 to 65535",
        "hitcounter: LANES must be a whole number from 1 to 64",
    ]


def test_help_shows_every_setting() -> None:
    shown = run({}, "--help")
    assert shown.returncode == 0
    assert "| `BIND_PORT` | 8080 |" in shown.stdout
    assert "| `LANES` | 4 |" in shown.stdout


@pytest.mark.parametrize(("how", "expected"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_signal_during_imports_stops_the_process_at_once(tmp_path: Path, how: int, expected: int) -> None:
    status, printed = interrupted_at("aiohttp.hdrs", "hitcounter", how, EMBEDDED, tmp_path)
    # The status is also 0 if the signal arrived after the imports. A negative status would mean that the process had no handler
    # for the signal, so the kernel stopped it. In a container, the kernel would not stop process 1 in this way.
    assert status in (expected, 0)
    assert "Traceback" not in printed


def test_start_is_fast(valkey: Valkey, spawn: Spawn) -> None:
    began = time.monotonic()
    assert "seen 1 times" in get(spawn(valkey.environ()))
    assert time.monotonic() - began < 3 * SLACK
