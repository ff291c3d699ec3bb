"""The health of Redis: whether Redis works for this process, and what its errors mean."""

import logging
import time
from collections.abc import Awaitable
from typing import Any

from prometheus_client import CollectorRegistry, Gauge
from redis import exceptions

from nanoservice.errors import UnavailableError

# All exceptions that the driver raises for a broken, busy or unreachable Redis.
REDIS_ERRORS = (exceptions.RedisError, OSError, TimeoutError)

# Errors that say nothing about Redis's health: the handler expects them, or caused them.
_HANDLER_ERRORS = (exceptions.DataError, exceptions.NoScriptError, exceptions.WatchError)

_LOG_INTERVAL = 60.0  # seconds between two log lines about the same cause

# The first entry that matches names the cause. An entry matches a part of the server's message, or the type of the error.
_SIGNS: tuple[tuple[str | type[BaseException] | tuple[type[BaseException], ...], str], ...] = (
    ("ACL failure", "its user may not do this (NOPERM)"),  # The script reports a missing right in these words.
    ("MISCONF", "it refuses writes: it cannot persist them (MISCONF)"),
    ("certificate", "its TLS certificate is not trusted, or it refused the client certificate"),
    ("SSL", "no TLS connection can be made"),
    (exceptions.ReadOnlyError, "it is a read-only replica (READONLY)"),
    (exceptions.OutOfMemoryError, "it is out of memory (OOM)"),
    (exceptions.BusyLoadingError, "it is loading its data"),
    (exceptions.NoPermissionError, "its user may not do this (NOPERM)"),
    ((exceptions.AuthenticationError, exceptions.AuthenticationWrongNumberOfArgsError), "wrong user or password"),
    ("NOAUTH", "it requires a password"),
    ((exceptions.TimeoutError, TimeoutError), "it does not answer in time"),
    ((exceptions.ConnectionError, OSError), "it cannot be reached"),
)

_logger = logging.getLogger(__name__)


def cause(error: BaseException) -> str:
    """Return in a few words why Redis could not serve. Clients see these words, so they contain no address."""
    text = str(error)
    for sign, words in _SIGNS:
        if sign in text if isinstance(sign, str) else isinstance(error, sign):
            return words
    code = text.partition(" ")[0]
    return "an unexpected error: " + (code if code.isupper() else type(error).__name__)


class Health:
    """Records whether Redis works for this process. Logs each cause once per outage, and sets the metric `redis_up`.

    Two activities report here, because one can fail without the other. "probe" checks that Redis answers; during an outage each
    check opens a new connection. "work" is what the service asks of Redis, such as writing. Successful work ends any outage. A
    successful probe ends an outage in which Redis could not be reached, but not an outage in which Redis refused to work.
    """

    def __init__(self, registry: CollectorRegistry, server: str) -> None:
        self._up = Gauge("redis_up", "Whether Redis answers and does what the service asks of it", registry=registry)
        self._server = server  # the server's address, for the log
        self.successes = 0  # how often "work" has succeeded
        self._refused = False
        self._logged: set[str] = set()  # the causes of this outage that were logged
        self._quiet_until: dict[str, float] = {}
        self._since = 0.0
        self.reason = ""  # why Redis does not work; empty while Redis works

    def failed(self, activity: str, error: BaseException, seen: int | None = None) -> str:
        """Record that `activity` failed, and return the cause.

        `seen` is the value of `successes` when the attempt began. If `successes` has grown since then, a later call succeeded,
        and the failure is ignored.
        """
        words, now = cause(error), time.monotonic()
        if seen is not None and seen != self.successes:
            return words
        if not self.reason:
            self._since = now
            self._up.set(0)
        self.reason = words
        self._refused = self._refused or (activity == "work" and isinstance(error, exceptions.ResponseError))
        if words not in self._logged and now >= self._quiet_until.get(words, 0.0):
            self._logged.add(words)
            self._quiet_until[words] = now + _LOG_INTERVAL
            # The server quotes the arguments of an unknown command, and these arguments may be secret.
            text = str(error).partition(", with args")[0]
            _logger.error("Redis fails: %s", words, extra={"redis": self._server, "error": text or type(error).__name__})
        return words

    def worked(self, activity: str) -> None:
        """Record that `activity` succeeded."""
        self.successes += activity == "work"
        if self._refused and activity != "work":
            return
        self._up.set(1)
        self._refused = False
        self.reason = ""
        if self._logged:
            self._logged.clear()
            seconds = round(time.monotonic() - self._since, 1)
            _logger.warning("Redis works again", extra={"redis": self._server, "seconds": seconds})

    async def watch(self, work: Awaitable[Any]) -> Any:
        """Await `work` and return its result. Raises UnavailableError if Redis fails."""
        seen = self.successes
        try:
            result = await work
        except _HANDLER_ERRORS:
            raise
        except REDIS_ERRORS as error:
            raise UnavailableError("Redis: " + self.failed("work", error, seen)) from error
        self.worked("work")
        return result
