"""The service stays live, and its memory stays below the pod's limit, while clients try to exhaust it."""

import os
import re
import time
from pathlib import Path

import pytest

from nanoservice.testing.valkey import Valkey
from nanoservice.testing.waiting import SLACK, eventually
from tests.support.attack import MIB, hit
from tests.support.exhaustion import ATTACKS, attacked, memory_limit
from tests.support.loops import EVENT_LOOP
from tests.support.process import Process, Spawn

pytestmark = pytest.mark.attack

SECONDS = float(os.environ.get("ATTACK_SECONDS", "1"))
PROBE_LIMIT = 0.1  # on a quiet machine 99 of 100 probes are answered within this time; a test allows ten times as much


def peak(process: Process) -> int:
    """Return the highest resident memory that the process has ever had, in bytes."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process.popen.pid}/status").read_text())
    assert found
    return int(found[1]) * 1024


@pytest.mark.skipif(EVENT_LOOP != "uvloop", reason="the limits hold for uvloop, the event loop of the image")
@pytest.mark.parametrize("name", ATTACKS)
async def test_service_stays_live_and_small_under_attack(spawn: Spawn, valkey: Valkey, name: str) -> None:
    process = spawn(valkey.environ())
    for attempt in range(3):  # Other processes of the machine may delay the probes too, so one attempt in time is enough.
        probes, attack = await attacked(name, "127.0.0.1", process.port, process.admin_port, SECONDS)
        memory = peak(process)
        print(f"{name}: {attack}")
        print(f"probes: p99 {probes.p99 * 1000:.0f} ms, failed {dict(probes.failures)}; memory at most {memory / MIB:.1f} MiB")
        assert memory < memory_limit()
        if not probes.failures and probes.p99 < 10 * PROBE_LIMIT:
            break
        assert attempt < 2, "the probes were late in each of three attacks"

    async def served() -> bool:
        return bool(await hit(process.port))

    await eventually(served, 5 * SLACK)
    began = time.monotonic()
    assert process.end() == 0
    assert time.monotonic() - began < 2 * SLACK, "the clients are gone, so the shutdown has nothing to wait for"
    assert not [line for line in process.log if "Traceback" in str(line)]
    assert len(process.log) < 1000
