"""The connection to Redis: how it is opened, what an error of it means, and whether it works."""

import logging
import ssl
import time
from collections.abc import Awaitable
from typing import Any, cast

from aiohttp import web
from prometheus_client import CollectorRegistry, Gauge
from redis import exceptions
from redis.asyncio import BlockingConnectionPool, Connection, Redis, SSLConnection, UnixDomainSocketConnection
from redis.asyncio.client import Pipeline
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.credentials import CredentialProvider

from nanoservice.answer import UnavailableError
from nanoservice.config import Config

_CONNECTIONS = 16  # of `Store.client`, at most

# Everything that a broken, busy or unreachable Redis raises.
Errors = (exceptions.RedisError, OSError, TimeoutError)

# Of these, what tells nothing of Redis: a handler may expect it, or is at fault.
_HANDLERS = (exceptions.DataError, exceptions.NoScriptError, exceptions.WatchError)

_QUIET = 60.0  # seconds for which the log is not told the same again

_logger = logging.getLogger(__name__)


class _PasswordFileError(exceptions.AuthenticationError):
    """The file with the password is of no use; the text is ours."""


class _Credentials(CredentialProvider):
    """User and password as they are when a connection is opened: the file is read each time."""

    def __init__(self, config: Config) -> None:
        self._config = config

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        config = self._config
        if config.redis_password_file:
            try:
                password = config.redis_password_file.read_text("utf-8").rstrip("\r\n")
            except OSError as error:
                raise _PasswordFileError(f"REDIS_PASSWORD_FILE: {error.strerror}") from error
            except UnicodeDecodeError:
                raise _PasswordFileError("REDIS_PASSWORD_FILE is not UTF-8") from None  # the error has what it read
        else:
            password = config.redis_password.reveal() if config.redis_password else ""
        return (config.redis_username, password) if config.redis_username else (password,)

    async def get_credentials_async(self) -> tuple[str] | tuple[str, str]:
        return self.get_credentials()  # a small file of this machine


class _Discreet(AbstractConnection):
    """A connection whose handshake fails without the server's words: servers quote what they do not know, such as AUTH."""

    async def on_connect_check_health(self, check_health: bool = True) -> None:
        try:
            await super().on_connect_check_health(check_health)
        except exceptions.RedisError as error:
            if not isinstance(error, _PasswordFileError):
                error.args = ()
            raise


def cause(error: BaseException) -> str:
    """Return in a few words why Redis could not serve, with no address in it: it is shown to clients too."""
    text = str(error)
    for sign, words in _SIGNS:
        if sign in text if isinstance(sign, str) else isinstance(error, sign):
            return words
    code = text.partition(" ")[0]
    return "an unexpected error: " + (code if code.isupper() else type(error).__name__)


# The first that fits: a part of the server's message, or the type of the error.
_SIGNS: tuple[tuple[str | type[BaseException] | tuple[type[BaseException], ...], str], ...] = (
    ("ACL failure", "its user may not do this (NOPERM)"),  # inside the script
    ("MISCONF", "it refuses writes: it cannot persist them (MISCONF)"),
    ("certificate", "its TLS certificate is not trusted, or ours was refused"),
    ("SSL", "no TLS connection can be made"),
    (exceptions.ReadOnlyError, "it is a read-only replica (READONLY)"),
    (exceptions.OutOfMemoryError, "it is out of memory (OOM)"),
    (exceptions.BusyLoadingError, "it is loading its data"),
    (exceptions.NoPermissionError, "its user may not do this (NOPERM)"),
    ((exceptions.AuthenticationError, exceptions.AuthenticationWrongNumberOfArgsError), "wrong user or password"),
    ("NOAUTH", "it wants a password"),
    ((exceptions.TimeoutError, TimeoutError), "it does not answer in time"),
    ((exceptions.ConnectionError, OSError), "it cannot be reached"),
)


class Health:
    """Whether Redis works for us: tells the log each cause once an outage, and the metric `redis_up`.

    Two things are watched, since one can fail without the other: "probe" (it answers, over a new connection while anything
    fails) and "work" (it does what the service asks, such as writing). Work that succeeds shows that it answers too; a probe
    that does shows that work which could not reach Redis can now, and nothing of work that Redis refused.
    """

    def __init__(self, registry: CollectorRegistry, config: Config) -> None:
        self._up = Gauge("redis_up", "Whether Redis answers and does what the service asks of it", registry=registry)
        self._server = f"{config.redis_host}:{config.redis_port}" if config.redis_host else "embedded"
        self.successes = 0  # of work
        self._refused = False
        self._logged: set[str] = set()  # in this outage
        self._quiet_until: dict[str, float] = {}
        self._since = 0.0
        self.reason = ""  # why it does not work; empty while it does

    def failed(self, what: str, error: BaseException, seen: int | None = None) -> str:
        """Note that `what` failed; return the cause.

        `seen`: the `successes` when it was tried. If there were others since, the failure is yesterday's news.
        """
        words, now = cause(error), time.monotonic()
        if seen is not None and seen != self.successes:
            return words
        if not self.reason:
            self._since = now
            self._up.set(0)
        self.reason = words
        self._refused = self._refused or (what == "work" and isinstance(error, exceptions.ResponseError))
        if words not in self._logged and now >= self._quiet_until.get(words, 0.0):
            self._logged.add(words)
            self._quiet_until[words] = now + _QUIET
            text = str(error).partition(", with args")[0]  # of a command that is unknown: they may be secret
            _logger.error("Redis fails: %s", words, extra={"redis": self._server, "error": text or type(error).__name__})
        return words

    def worked(self, what: str) -> None:
        """Note that `what` worked."""
        self.successes += what == "work"
        if self._refused and what != "work":
            return
        self._up.set(1)
        self._refused = False
        self.reason = ""
        if self._logged:
            self._logged.clear()
            seconds = round(time.monotonic() - self._since, 1)
            _logger.warning("Redis works again", extra={"redis": self._server, "seconds": seconds})

    async def watch(self, work: Awaitable[Any]) -> Any:
        """Return what `work` returns; raises UnavailableError if Redis cannot do it."""
        seen = self.successes
        try:
            answer = await work
        except _HANDLERS:
            raise
        except Errors as error:
            raise UnavailableError("Redis: " + self.failed("work", error, seen)) from error
        self.worked("work")
        return answer


class _Client(Redis):
    """A client whose commands and pipelines are watched."""

    health: Health

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        return await self.health.watch(super().execute_command(*args, **options))  # type: ignore[no-untyped-call] # typed in part

    def pipeline(self, transaction: bool = True, shard_hint: str | None = None) -> "_Pipeline":
        pipeline = _Pipeline(self.connection_pool, self.response_callbacks, transaction, shard_hint)
        pipeline.health = self.health
        return pipeline


class _Pipeline(Pipeline):
    health: Health

    async def immediate_execute_command(self, *args: Any, **options: Any) -> Any:
        return await self.health.watch(super().immediate_execute_command(*args, **options))  # type: ignore[no-untyped-call] # the same

    async def execute(self, raise_on_error: bool = True) -> list[Any]:
        done = super().execute(raise_on_error)
        return await (self.health.watch(done) if self.command_stack else done)


class Store:
    """The Redis that the settings name, or the embedded one at the Unix socket `socket`.

    `client` is for the commands and pipelines of any handler: a Redis that fails is a 503 by itself, since they raise
    UnavailableError. `connection()` is for who keeps one connection to itself.
    """

    def __init__(self, config: Config, registry: CollectorRegistry, socket: str | None = None) -> None:
        self.health = Health(registry, config)
        kind, self._options = _options(config, socket)
        self._kind: type[AbstractConnection] = type("Connection", (_Discreet, kind), {})
        # A handler that finds all connections in use waits its turn, for as long as it would wait for an answer.
        pool = BlockingConnectionPool(
            max_connections=_CONNECTIONS, timeout=config.redis_timeout, connection_class=self._kind, **self._options
        )
        self.client = cast("_Client", _Client.from_pool(pool))  # which closes the pool with itself
        self.client.health = self.health

    def connection(self) -> AbstractConnection:
        """Return a new connection, not open yet. Its reads have no limit: who holds it sets one around each exchange."""
        return self._kind(**self._options | {"socket_timeout": None})


STORE = web.AppKey("store", Store)


def _options(config: Config, socket: str | None) -> tuple[type[AbstractConnection], dict[str, Any]]:
    """Return the kind of a connection and its options.

    The driver's retry is off: it would send again what it cannot know to be uncounted. RESP2 and no `CLIENT SETINFO`
    keep the handshake, and so the rights that the user needs, down to AUTH.
    """
    options: dict[str, Any] = {
        "protocol": 2,
        "driver_info": None,
        "retry": Retry(NoBackoff(), 0),
        "socket_connect_timeout": config.redis_timeout,
        "socket_timeout": config.redis_timeout,
    }
    if socket:
        return UnixDomainSocketConnection, options | {"path": socket}
    options |= {"host": config.redis_host, "port": config.redis_port}
    if config.redis_password or config.redis_password_file:
        options["credential_provider"] = _Credentials(config)
    if not config.redis_tls:
        return Connection, options
    return SSLConnection, options | {
        "ssl_ca_certs": config.redis_ca_file and str(config.redis_ca_file),
        "ssl_certfile": config.redis_cert_file and str(config.redis_cert_file),
        "ssl_keyfile": config.redis_key_file and str(config.redis_key_file),
        "ssl_check_hostname": True,
        "ssl_min_version": ssl.TLSVersion.TLSv1_2,
    }
