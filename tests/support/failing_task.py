"""Run hitcounter with a background task that fails, as soon as the working directory has a file `fails`."""

import asyncio
import dataclasses
import sys
from pathlib import Path

from aiohttp import web

from hitcounter import app
from nanoservice import background, run

FAILING_TASK = sys.executable, "-m", "tests.support.failing_task"  # the command


async def task() -> None:
    while not await asyncio.to_thread(Path("fails").exists):
        await asyncio.sleep(0.1)
    raise RuntimeError("this task fails on purpose")


def setup(application: web.Application, config: app.CounterConfig) -> None:
    app.setup(application, config)
    background.add(application, "fails", task)


if __name__ == "__main__":
    app.SERVICE = dataclasses.replace(app.SERVICE, setup=setup)
    run.run("hitcounter")
