"""The health of Redis: what its errors mean, and whether it works for this process."""

import logging
import re
import time
from collections.abc import Awaitable
from typing import Any

from prometheus_client import CollectorRegistry, Gauge
from redis import exceptions

from nanoservice.errors import UnavailableError

# Everything that a broken, busy or unreachable Redis raises.
REDIS_ERRORS = (exceptions.RedisError, OSError, TimeoutError)

# Errors that say nothing about Redis's health: the handler expects them, or caused them.
_HANDLER_ERRORS = (exceptions.DataError, exceptions.NoScriptError, exceptions.WatchError)

_LOG_INTERVAL = 60.0  # seconds between two log lines about the same cause

# By the code of the server's error.
_CODES = {
    **dict.fromkeys(("ASK", "CLUSTERDOWN", "CROSSSLOT", "MOVED"), "it is a node of a Redis Cluster, which is not supported"),
    "LOADING": "it is loading its data",
    "MISCONF": "it refuses writes: it cannot persist them (MISCONF)",
    "NOAUTH": "it requires a password",
    "NOPERM": "its user may not do this (NOPERM)",
    "NOREPLICAS": "it has too few replicas (NOREPLICAS)",
    "OOM": "it is out of memory (OOM)",
    "READONLY": "it is a read-only replica (READONLY)",
    "WRONGPASS": "wrong user or password",
}

# For errors without such a code the first entry that matches names the cause: a part of the text, or the type of the error.
_SIGNS: tuple[tuple[str | type[BaseException] | tuple[type[BaseException], ...], str], ...] = (
    ("ACL failure", _CODES["NOPERM"]),  # The script reports a missing right in these words, and Redis 7.0 and older in the next.
    ("The user executing the script can't run this command", _CODES["NOPERM"]),
    ("unknown command", "it does not know a command: it is a Sentinel, or older than Redis 6.2"),
    ("max number of clients", "it has too many clients (maxclients)"),
    ("certificate", "its TLS certificate is not trusted, or it refused the client certificate"),
    ("SSL", "no TLS connection can be made"),
    ((exceptions.AuthenticationError, exceptions.AuthenticationWrongNumberOfArgsError), _CODES["WRONGPASS"]),
    (exceptions.InvalidResponse, "its replies do not follow the protocol of Redis"),
    ((exceptions.TimeoutError, TimeoutError), "it does not answer in time"),
    ((exceptions.ConnectionError, OSError), "it cannot be reached"),
)

# An error begins with its code. Redis 6.2 puts the error of a command in a script behind "ERR Error running script (...)".
_CODE = re.compile(r"(?:^|@user_script: ?\d+: -?)([A-Z]+)\b")

_POOL_IS_EMPTY = "No connection available."  # the driver's words

_logger = logging.getLogger(__name__)


def _text(error: BaseException) -> str:
    """Return the text of `error`, its code first, without the arguments of commands: they may be secret."""
    # The driver quotes a pipeline's command, and then the error's text as a tuple.
    text = str(error).rpartition(" of pipeline caused error: ")[2].lstrip("('\"").partition(", with args")[0]
    code = error.status_code if isinstance(error, exceptions.RedisError) else None
    return f"{code} {text}" if code else text


def _code(error: BaseException) -> str:
    """Return the code that the server gave `error`, or nothing."""
    from_server = isinstance(error, exceptions.ResponseError) or (isinstance(error, exceptions.RedisError) and error.status_code)
    codes = _CODE.findall(_text(error)) if from_server else []
    return str(codes[-1]) if codes else ""


def cause(error: BaseException) -> str:
    """Return in a few words why Redis could not serve. Clients see them, so they contain no address."""
    code, text = _code(error), _text(error)
    if code in _CODES:
        return _CODES[code]
    for sign, words in _SIGNS:
        if sign in text if isinstance(sign, str) else isinstance(error, sign):
            return words
    return "an unexpected error" + (f": {code}" if code not in ("", "ERR") else "")


class Health:
    """Whether Redis works for this process. Logs each cause once an outage, and sets the metric `redis_up`.

    Two activities report here, because one can fail without the other. "probe": Redis answers; while anything fails, over a
    new connection. "work": Redis does what the service asks, such as writing. Successful work ends any outage. A successful
    probe ends an outage in which Redis could not be reached, but not one in which Redis refused to work.
    """

    def __init__(self, registry: CollectorRegistry, server: str) -> None:
        self._up = Gauge("redis_up", "Whether Redis answers and does what the service asks of it", registry=registry)
        self._server = server  # for the log
        self.successes = 0  # of work
        self._refused = False
        self._logged: set[str] = set()  # the causes of this outage that were logged
        self._quiet_until: dict[str, float] = {}
        self._since = 0.0
        self.reason = ""  # Why Redis does not work; empty while it does.

    def failed(self, activity: str, error: BaseException, seen: int | None = None) -> str:
        """Record that `activity` failed, and return the cause.

        `seen` is the value of `successes` when the try began. If `successes` has moved since, a later call succeeded and the
        failure is ignored.
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
            details = {"redis": self._server, "error": _text(error) or type(error).__name__}
            _logger.error("Redis fails: %s", words, extra=details)
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
        """Return what `work` returns; raises UnavailableError if Redis cannot do it, and a handler's own errors as they are."""
        seen = self.successes
        try:
            result = await work
        except _HANDLER_ERRORS:
            raise
        except REDIS_ERRORS as error:
            if _code(error) == "WRONGTYPE":
                raise
            if str(error) == _POOL_IS_EMPTY:  # Handlers hold all connections, which says nothing about Redis.
                raise UnavailableError("no connection to Redis is free") from error
            raise UnavailableError("Redis: " + self.failed("work", error, seen)) from error
        self.worked("work")
        return result
