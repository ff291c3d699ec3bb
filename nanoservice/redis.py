"""The connection to Redis: how it is opened, what an error of it means, and whether it works."""

import logging
import ssl
import time
from typing import Any, cast

from aiohttp import web
from prometheus_client import CollectorRegistry, Gauge
from redis import exceptions
from redis.asyncio import BlockingConnectionPool, Connection, Redis, SSLConnection, UnixDomainSocketConnection
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.credentials import CredentialProvider

from nanoservice.config import Config

_CONNECTIONS = 16  # of `Store.client`, at most

# Everything that a broken, busy or unreachable Redis raises.
Errors = (exceptions.RedisError, OSError, TimeoutError)

_logger = logging.getLogger(__name__)


class _Credentials(CredentialProvider):
    """User and password as they are when a connection is opened: the file is read each time."""

    def __init__(self, config: Config) -> None:
        self._config = config

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        config = self._config
        if config.redis_password_file:
            try:
                password = config.redis_password_file.read_text().rstrip("\r\n")
            except OSError as error:
                raise exceptions.AuthenticationError(f"REDIS_PASSWORD_FILE: {error.strerror}") from error
        else:
            password = config.redis_password.reveal() if config.redis_password else ""
        return (config.redis_username, password) if config.redis_username else (password,)

    async def get_credentials_async(self) -> tuple[str] | tuple[str, str]:
        return self.get_credentials()  # a small file of this machine


def cause(error: BaseException) -> str:
    """Return in a few words why Redis could not serve, with no address in it: it is shown to clients too."""
    text = str(error)
    for sign, words in _SIGNS:
        if sign in text if isinstance(sign, str) else isinstance(error, sign):
            return words
    return "an unexpected error: " + (text.split(" ", 1)[0] or type(error).__name__)


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

    Two things are watched, since one can fail without the other: "probe" (it answers) and "work" (it does what the
    service asks, such as writing). Work that succeeds shows that it answers too.
    """

    def __init__(self, registry: CollectorRegistry, config: Config) -> None:
        self._up = Gauge("redis_up", "Whether Redis answers and does what the service asks of it", registry=registry)
        self._server = f"{config.redis_host}:{config.redis_port}" if config.redis_host else "embedded"
        self.successes = {"probe": 0, "work": 0}
        self._failing: set[str] = set()
        self._logged: set[str] = set()
        self._since = 0.0
        self.reason = ""  # why it does not work; empty while it does

    def failed(self, what: str, error: BaseException, seen: int | None = None) -> str:
        """Note that `what` failed; return the cause.

        `seen`: the `successes` when it was tried. If there were others since, the failure is yesterday's news.
        """
        words = cause(error)
        if seen is not None and seen != self.successes[what]:
            return words
        if not self._failing:
            self._since = time.monotonic()
            self._up.set(0)
        self._failing.add(what)
        self.reason = words
        if words not in self._logged:
            self._logged.add(words)
            _logger.error("Redis fails: %s", words, extra={"redis": self._server, "error": str(error) or type(error).__name__})
        return words

    def worked(self, what: str) -> None:
        """Note that `what` worked."""
        self.successes[what] += 1
        if not self._failing:
            self._up.set(1)
            return
        self._failing -= {what} if what == "probe" else {what, "probe"}
        if not self._failing:
            self._up.set(1)
            self._logged.clear()
            self.reason = ""
            _logger.warning(
                "Redis works again", extra={"redis": self._server, "seconds": round(time.monotonic() - self._since, 1)}
            )


class _Client(Redis):
    """A client that tells whether its commands work."""

    health: Health

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        seen = self.health.successes["work"]
        try:
            answer = await super().execute_command(*args, **options)  # type: ignore[no-untyped-call] # typed in part
        except Errors as error:
            self.health.failed("work", error, seen)
            raise
        self.health.worked("work")
        return answer


class Store:
    """The Redis that the settings name, or the embedded one at the Unix socket `socket`.

    `client` is for commands one by one, by any handler; `connection()` for who keeps one connection to itself.
    """

    def __init__(self, config: Config, registry: CollectorRegistry, socket: str | None = None) -> None:
        self.health = Health(registry, config)
        self._kind, self._options = _options(config, socket)
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
