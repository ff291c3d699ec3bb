"""The health of Redis: whether Redis works for this process, and what its errors mean."""

import contextlib
import logging
import re
import time
from collections.abc import Awaitable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge
from redis import exceptions

from nanoservice.errors import UnavailableError

# All exceptions that the driver raises for a broken, busy or unreachable Redis.
REDIS_ERRORS = (exceptions.RedisError, OSError, TimeoutError)


class CauseError(exceptions.RedisError):
    """Redis cannot serve, for a cause that the chassis found. The text of this error is the cause, without an address."""


class TooFewReplicasError(CauseError):
    """Redis has executed a command, but too few replicas have what it wrote."""

    def __init__(self) -> None:
        super().__init__("too few replicas have what it wrote")


# Errors that say nothing about Redis's health: the handler expects them, or caused them.
_HANDLER_ERRORS = (exceptions.DataError, exceptions.NoScriptError, exceptions.WatchError)

_MAX_TEXT = 300  # characters of an error in the log
_LOG_INTERVAL = 60.0  # seconds between two log lines about the same cause

# Maps the code at the beginning of a server's error to the cause.
_CODES = {
    **dict.fromkeys(
        ("ASK", "CLUSTERDOWN", "CROSSSLOT", "MOVED", "TRYAGAIN"), "it is a node of a Redis Cluster, which is not supported"
    ),
    "BUSY": "a script has kept it busy for long (BUSY)",
    "DENIED": "it is in protected mode: it accepts only clients on its own machine (DENIED)",
    "LOADING": "it is loading its data",
    "MASTERDOWN": "it is a replica without its primary (MASTERDOWN)",
    "MISCONF": "it refuses writes: it cannot persist them (MISCONF)",
    "NOAUTH": "it requires a password",
    "NOPERM": "its user may not do this (NOPERM)",
    "NOREPLICAS": "it has too few replicas (NOREPLICAS)",
    "OOM": "it is out of memory (OOM)",
    "READONLY": "it is a read-only replica (READONLY)",
    "WRONGPASS": "wrong user or password",
}

# If the error has none of the codes above, the first entry that matches names the cause. An entry matches a part of the
# server's message, or the type of the error.
_SIGNS: tuple[tuple[str | type[BaseException] | tuple[type[BaseException], ...], str], ...] = (
    # If the user lacks a right that the script needs, Redis sends the first of the next two messages. Redis 7.0 and older send
    # the second.
    ("ACL failure", _CODES["NOPERM"]),
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

# The cause if no entry matches. If a handler's command gets such an error, the command is wrong: for example, it has a wrong
# argument, or its key has another type.
_UNEXPECTED = "an unexpected error"

# An error begins with its code. If a command in a script fails, Redis 6.2 puts "ERR Error running script (...)" before its error.
# If EXEC itself is refused, Redis puts "EXECABORT Transaction discarded because of: " before the error.
_CODE = re.compile(r"(?:^|@user_script: ?\d+: -?|discarded because of: )([A-Z]+)\b")

_POOL_IS_EMPTY = "No connection available."  # the driver's message if all connections of its pool are in use

_logger = logging.getLogger(__name__)


def _text(error: BaseException) -> str:
    """Return the code and the message of `error`, without the arguments of commands, because these may be secret."""
    if isinstance(error, CauseError) and error.__cause__:
        error = error.__cause__
    # If a command of a pipeline fails, the driver's message has the command first, and then the server's message as a tuple.
    text = str(error).rpartition(" of pipeline caused error: ")[2].lstrip("('\"").partition(", with args")[0]
    code = error.status_code if isinstance(error, exceptions.RedisError) else None
    return (f"{code} {text}" if code else text)[:_MAX_TEXT]


def _code(error: BaseException) -> str:
    """Return the code of an error that the server replied, or an empty string."""
    from_server = isinstance(error, exceptions.ResponseError) or (isinstance(error, exceptions.RedisError) and error.status_code)
    codes = _CODE.findall(_text(error)) if from_server else []
    return str(codes[-1]) if codes else ""


def cause(error: BaseException) -> str:
    """Return in a few words why Redis could not serve. Clients see these words, so they contain no address."""
    if isinstance(error, CauseError):
        return str(error)
    code, text = _code(error), _text(error)
    if code in _CODES:
        return _CODES[code]
    for sign, words in _SIGNS:
        if sign in text if isinstance(sign, str) else isinstance(error, sign):
            return words
    return _UNEXPECTED + (f": {code}" if code not in ("", "ERR") else "")


@contextlib.contextmanager
def not_of_a_handler() -> Iterator[None]:
    """Turn an error that Redis replies to the chassis into a CauseError, so that `Health.watch` does not blame the handler."""
    try:
        yield
    except exceptions.ResponseError as error:
        raise CauseError(cause(error)) from error


def is_redis_failure(error: BaseException) -> bool:
    """Return whether `error`, an UnavailableError or an error of the driver, says that Redis fails."""
    return isinstance(error, (UnavailableError, exceptions.RedisError)) and not _is_of_handler(error)


def is_refusal(error: BaseException) -> bool:
    """Return whether Redis has answered, but refused the command. A PING may work all the same."""
    return isinstance(error.__cause__ if isinstance(error, UnavailableError) else error, exceptions.ResponseError)


def _is_of_handler(error: BaseException) -> bool:
    """Return whether a handler expects `error` from Redis, or has caused it."""
    wrong = isinstance(error, exceptions.ResponseError) and cause(error).startswith(_UNEXPECTED)
    return wrong or isinstance(error, _HANDLER_ERRORS)


class Health:
    """Records whether Redis works for this process. Logs each cause once per outage, and sets the metrics.

    Two activities report to this class, because one can fail without the other. "probe" checks that Redis answers; during an
    outage each check opens a new connection. "work" is what the service asks of Redis, such as writing. Successful work ends any
    outage. A successful probe ends an outage in which Redis could not be reached, but not one in which Redis refused to work.
    """

    def __init__(self, registry: CollectorRegistry, server: str) -> None:
        self._up = Gauge("redis_up", "Whether Redis answers and does what the service asks of it", registry=registry)
        self._failures = Counter("redis_failures", "Attempts to use Redis that failed", ["cause"], registry=registry)
        for words in (*_CODES.values(), *(words for _, words in _SIGNS)):
            self._count(words, 0)
        self.server = server  # the server's address, for the log
        self.successes = 0  # how often "work" has succeeded
        self.failures = 0  # how often any activity has failed
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
        self.failures += 1
        self._count(words, 1)
        if seen is not None and seen != self.successes:
            return words
        if not self.reason:
            self._since = now
            self._up.set(0)
        self.reason = words
        refused = isinstance(error, (exceptions.ResponseError, TooFewReplicasError))
        self._refused = self._refused or (activity == "work" and refused)
        if words not in self._logged and now >= self._quiet_until.get(words, 0.0):
            self._logged.add(words)
            self._quiet_until[words] = now + _LOG_INTERVAL
            details = {"redis": self.server, "error": _text(error) or type(error).__name__}
            _logger.error("Redis fails: %s", words, extra=details)
        return words

    def _count(self, words: str, failures: int) -> None:
        # A code that a server has invented may follow the colon. The label ends before it, so that no server creates new series.
        self._failures.labels(words.partition(":")[0]).inc(failures)

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
            _logger.warning("Redis works again", extra={"redis": self.server, "seconds": seconds})

    async def watch(self, work: Awaitable[Any]) -> Any:
        """Await `work` and return its result. Raises UnavailableError if Redis fails.

        Errors that the handler expects or has caused are raised unchanged.
        """
        seen = self.successes
        try:
            result = await work
        except REDIS_ERRORS as error:
            if _is_of_handler(error):
                raise
            if str(error) == _POOL_IS_EMPTY:  # Handlers use all connections. This alone says nothing about Redis.
                raise UnavailableError("Redis: " + self.reason if self.reason else "no connection to Redis is free") from error
            raise UnavailableError("Redis: " + self.failed("work", error, seen)) from error
        self.worked("work")
        return result
