"""Choose the event loop of the tests: uvloop, as in production, or asyncio's own event loop with `EVENT_LOOP=asyncio`."""

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import uvloop

FACTORIES: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "uvloop": uvloop.new_event_loop,
    "asyncio": asyncio.SelectorEventLoop,
}
EVENT_LOOP = os.environ.get("EVENT_LOOP", "uvloop")
assert EVENT_LOOP in FACTORIES, f"EVENT_LOOP must be one of {', '.join(FACTORIES)}"

_HIDES_UVLOOP = Path(__file__).parent / "asyncio_loop"


def python_path(*folders: Path, loop: str = EVENT_LOOP) -> str:
    """Return the PYTHONPATH for a process that imports modules from `folders` and runs on the event loop `loop`."""
    return os.pathsep.join(str(folder) for folder in ((_HIDES_UVLOOP, *folders) if loop == "asyncio" else folders))
