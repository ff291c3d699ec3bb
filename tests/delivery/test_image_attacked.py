"""A container with the memory limit of the manifests survives the attacks that take most memory."""

import json
import os
import re
from pathlib import Path

import pytest

from nanoservice.testing.waiting import wait_for
from tests.delivery.test_image_runs import RESTRICTED, container, get
from tests.support.exhaustion import MIB, attacked, memory_limit
from tests.support.images import run

pytestmark = pytest.mark.image

SECONDS = float(os.environ.get("ATTACK_SECONDS", "0.5"))
WORST = (
    "1,000 unfinished heads of many headers",
    "bodies of 1 MB",
    "slow bodies behind large heads",
    "chunks of one byte",
    "trailers",
    "answers that nobody reads",
    "idle connections",
    "admin port: unread /metrics",
)


async def test_container_survives_the_worst_attacks_without_more_memory(network: str) -> None:
    limit = f"--memory={memory_limit() // MIB}m"
    with container(network, *RESTRICTED, limit, f"--memory-swap={memory_limit() // MIB}m", "--cpus=1") as identity:
        wait_for(lambda: "seen" in get(identity), 30)
        began = state(identity)
        host = next(iter(json.loads(run("inspect", identity))[0]["NetworkSettings"]["Networks"].values()))["IPAddress"]
        for name in WORST:
            probes, _ = await attacked(name, host, 8080, 9090, SECONDS)
            now = state(identity)
            assert (now["Running"], now["OOMKilled"], now["Pid"]) == (True, False, began["Pid"]), f"killed by: {name}"
            print(f"{name}: p99 {probes.p99 * 1000:.0f} ms, failed {dict(probes.failures)}; memory {memory(now['Pid'])}")
        wait_for(lambda: "seen" in get(identity), 30)


def state(identity: str) -> dict[str, object]:
    return dict(json.loads(run("inspect", identity))[0]["State"])


def memory(pid: object) -> str:
    """Return the current and the highest resident memory of the process, if this machine can see the process."""
    status = Path(f"/proc/{pid}/status")
    found = re.findall(r"Vm(?:HWM|RSS):\s+(\d+) kB", status.read_text() if status.exists() else "")
    return " at most, now ".join(f"{int(size) / 1024:.0f} MiB" for size in found)
