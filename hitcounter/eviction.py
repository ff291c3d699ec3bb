"""Report a Redis that may evict keys. An evicted Idempotency-Key would be counted again, and nothing would show this."""

import asyncio
import logging

from redis import exceptions

from nanoservice.health import REDIS_ERRORS
from nanoservice.redis import Store

_RETRY_SECONDS = 5.0

_logger = logging.getLogger(__name__)


async def report_eviction(store: Store, redis_timeout: float) -> None:
    """Wait until Redis answers, then log an error if its settings allow it to evict keys.

    Each attempt takes at most `redis_timeout` seconds. If the user may not run INFO, nothing is logged.
    """
    connection = store.connection()
    while True:
        try:
            async with asyncio.timeout(redis_timeout):
                await connection.connect()
                await connection.send_command("INFO", "memory")
                info = await connection.read_response()
            break
        except exceptions.ResponseError:  # The user lacks the right, or a proxy does not know the command.
            return
        except REDIS_ERRORS:  # The lanes and the probes report an outage.
            pass
        finally:
            await connection.disconnect(nowait=True)
        await asyncio.sleep(_RETRY_SECONDS)
    settings = dict(line.split(":", 1) for line in bytes(info).decode().splitlines() if ":" in line)
    policy = settings.get("maxmemory_policy", "noeviction")
    if policy != "noeviction" and settings.get("maxmemory") != "0":
        _logger.error("Redis may evict keys: set its maxmemory-policy to noeviction", extra={"policy": policy})
