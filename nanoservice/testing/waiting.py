"""Wait for a condition, never for a time."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

SLACK = 3  # the machines are shared: a limit that a test checks is allowed this many times as much


def wait_for(condition: Callable[[], Any], seconds: float, what: str = "") -> Any:
    """Return what `condition` returns, as soon as that is true; fail after `seconds`."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"not within {seconds} s: {what or condition}"
        time.sleep(0.01)
    return value


async def eventually(condition: Callable[[], Any], seconds: float) -> None:
    """Return as soon as `condition`, which may be a coroutine function, returns something true; fail after `seconds`."""
    async with asyncio.timeout(seconds):
        while not (await value if asyncio.iscoroutine(value := condition()) else value):
            await asyncio.sleep(0.01)
