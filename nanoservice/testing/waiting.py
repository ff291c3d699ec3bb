"""Wait for a condition, with a limit. A test that sleeps instead is slow on a fast machine and fails on a slow one."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

SLACK = 3  # A test allows this many times the promised duration, because machines are shared.


def wait_for(condition: Callable[[], Any], seconds: float, what: str = "") -> Any:
    """Call `condition` until its result is true, and return that result; fail after `seconds`."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"not within {seconds} s: {what or condition}"
        time.sleep(0.01)
    return value


async def eventually(condition: Callable[[], Any], seconds: float) -> None:
    """Call or await `condition` until its result is true; fail after `seconds`."""
    async with asyncio.timeout(seconds):
        while not (await value if asyncio.iscoroutine(value := condition()) else value):
            await asyncio.sleep(0.01)
