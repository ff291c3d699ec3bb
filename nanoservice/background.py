"""Background tasks: work that a service does beside its requests, for as long as it runs."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable

from aiohttp import web
from prometheus_client import Counter

from nanoservice.health import is_redis_failure, is_refusal
from nanoservice.metrics import REGISTRY
from nanoservice.probes import READINESS

_FIRST_DELAY, _MAX_DELAY = 1.0, 60.0  # seconds until a task that has failed is started again
_MAX_REDIS_DELAY = 5.0  # seconds until a task that failed because of Redis is started again

_FAILURES = web.AppKey("background_task_failures", Counter)

_logger = logging.getLogger(__name__)


def add(app: web.Application, name: str, work: Callable[[], Awaitable[None]]) -> None:
    """Run `work()` in a task from the start of `app` until its shutdown, which cancels the task.

    If `work` raises an error, the error is logged and counted at once, and `/readyz` answers 503 until `work` is called again.
    The first retry follows after 1 s. Each further failure doubles this delay, up to 60 s. So a temporary failure needs no
    restart, and a lasting failure keeps the process unready. If `work` returns, the task is finished.

    If Redis has caused the error (see `is_redis_failure`), the delay is at most 5 s. Unless Redis answered and refused a command,
    the log then has no traceback, and `/readyz` does not count the failure of the task: `/readyz` checks Redis itself, and so
    answers 200 as soon as Redis works again.
    """
    if _FAILURES not in app:
        app[_FAILURES] = Counter("background_task_failures", "Failures of background tasks", ["task"], registry=app[REGISTRY])
    failures, failed = app[_FAILURES].labels(name), app[READINESS].failed

    async def supervise() -> None:
        delay, loop = _FIRST_DELAY, asyncio.get_running_loop()
        while True:
            began = loop.time()
            try:
                await work()
            except (Exception, asyncio.CancelledError) as error:
                if (task := asyncio.current_task()) and task.cancelling():
                    raise
                failures.inc()
                because_of_redis = is_redis_failure(error)
                delay = _FIRST_DELAY if loop.time() - began >= _MAX_DELAY else delay
                delay = min(delay, _MAX_REDIS_DELAY) if because_of_redis else delay
                details = {"task": name, "seconds_until_retry": delay}
                if because_of_redis and not is_refusal(error):  # A traceback every few seconds would hide other lines.
                    _logger.error("a background task failed", extra=details | {"error": str(error)})
                else:
                    failed.add(name)
                    _logger.error("a background task failed", exc_info=error, extra=details)
            else:
                return
            await asyncio.sleep(delay)
            delay = min(2 * delay, _MAX_DELAY)
            failed.discard(name)

    async def running(app: web.Application) -> AsyncIterator[None]:
        task = asyncio.create_task(supervise(), name=name)
        yield
        task.cancel()
        await asyncio.wait({task})

    running.__qualname__ = f"background task {name}"  # The log shows this name if the task takes too long to stop.
    app.cleanup_ctx.append(running)
