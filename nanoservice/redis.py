"""The connection to Redis: how it is opened, and how its errors are reported.

This module borrows names from redis-py, which documents commands but not these names. tests/nanoservice/test_borrowed.py
reports each one that an upgrade removes.

- `Redis.execute_command`, `Pipeline.immediate_execute_command`, `Pipeline.execute`: each command reaches the server through one
  of them. Without them a failing Redis is a 500 instead of a 503. An event or a hook around each command will replace them, once
  the driver's asyncio client has one.
- `Pipeline.execute_command`, `Redis.pubsub`, `Redis.monitor`: they begin a command of a pipeline, or one that blocks for ever.
  Without them a command that blocks a connection of the pool is reported as an outage of Redis.
- `Pipeline.command_stack`: it is empty if the pipeline sends nothing. Such a pipeline must not count as successful work.
- `Pipeline.__init__`, `Redis.pipeline`, `Redis.response_callbacks`: they make a pipeline that reports to `health`.
- `AbstractConnection.on_connect_check_health`: it makes the handshake. Without it the log shows the server's message about AUTH,
  which may quote the password.
- `AbstractConnection.connect`, `AbstractConnection.disconnect`, `AbstractConnection.send_command`,
  `AbstractConnection.send_packed_command`, `AbstractConnection.read_response`: they send a command and read its reply over a
  connection that the service (`Store.connection`) or the probe has for itself. Without them each such connection needs a client
  with a pool of one connection. Such a client will replace them.
- `Redis._send_command_parse_response`, `Pipeline._send_command_parse_response`, `Pipeline._execute_pipeline`,
  `Pipeline._execute_transaction`: they run commands over a given connection, so that WAIT can follow over the same one. Without
  them `REDIS_REPLICAS` needs a client of one connection.
- `Connection.host`, `Connection.port`: a connection to the primary sets both each time it is opened. Without them a failover
  needs new connections and a new pool.
- `AbstractConnection.is_connected`, `AbstractConnection.can_read`, `AbstractConnection._writer`: they show whether an idle
  connection can still be used. Without them the first request after an idle connection has died is answered with 503.
  `_writer` also has the server's certificate. Without it nothing measures when the certificate expires.
- `Connection._connect`, `Connection._connection_arguments`: they open a TCP connection. Without them a host whose first address
  leads nowhere cannot be reached. An option of the driver for "Happy Eyeballs" (RFC 8305) will replace them.
- `SSLConnection._connect`, `SSLConnection._connection_arguments`, `SSLConnection.ssl_context`: they open a TLS connection, and
  hold the certificates, which the driver reads only once. Without them rotated certificates need a restart, and no TLS
  connection to a host name with a final dot can be made.
"""

import asyncio
import math
import socket
import ssl
from typing import Any, cast

from aiohappyeyeballs import start_connection
from aiohttp import web
from prometheus_client import CollectorRegistry, Gauge
from redis import exceptions
from redis.asyncio import BlockingConnectionPool, Connection, Redis, SSLConnection, UnixDomainSocketConnection
from redis.asyncio.client import Pipeline
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.credentials import CredentialProvider

from nanoservice import blocking
from nanoservice.config import Config
from nanoservice.errors import SecretFileError
from nanoservice.health import Health, not_of_a_handler
from nanoservice.replication import Replication
from nanoservice.sentinel import Sentinels

_MAX_POOL_CONNECTIONS = 16


class _PasswordFileError(exceptions.AuthenticationError):
    """The password file cannot be used. The text of this error is the chassis's own, so it may be logged."""


class _Credentials(CredentialProvider):
    """Returns the user and the password for each new connection. A password file is read each time."""

    def __init__(self, config: Config) -> None:
        self._config = config

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        config = self._config
        try:
            text = config.redis_password.reveal() if config.redis_password else ""
        except SecretFileError as error:
            raise _PasswordFileError(f"REDIS_PASSWORD_FILE: {error}") from error
        return (config.redis_username, text) if config.redis_username else (text,)

    async def get_credentials_async(self) -> tuple[str] | tuple[str, str]:
        return self.get_credentials()  # Reading a small local file does not block for long.


class _DiscreetConnection(AbstractConnection):
    """A connection that removes the server's text from the errors of a handshake.

    The log shows the text of errors, and the text of these errors may contain the password: a server that does not know the
    command AUTH quotes the command's arguments in its error.

    If the connection has died while it was idle, `connect` opens it again.
    """

    async def connect(self) -> None:
        # Bytes that arrive while no reply is due would be taken for the next reply. Such a connection is opened again, too.
        if self.is_connected and (self._writer.is_closing() or await self.can_read()):  # type: ignore[union-attr] # connected
            await self.disconnect(nowait=True)
        if self.is_connected:
            return
        with not_of_a_handler():
            try:
                await super().connect()  # type: ignore[no-untyped-call] # typed in part
                # A server that refuses a client, for example because of maxclients, says so before the client has asked anything.
                if await self.can_read():
                    await self.read_response()
            except BaseException:  # A pool would use a connection whose handshake was cancelled as if it were ready.
                await self.disconnect(nowait=True)
                raise

    async def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        # If the transport has just closed, uvloop raises RuntimeError, and asyncio's event loop OSError or, since Python 3.12,
        # AttributeError.
        if self.is_connected and self._writer.is_closing():  # type: ignore[union-attr] # connected
            raise exceptions.ConnectionError("the connection was lost")
        try:
            await super().send_packed_command(command, check_health)
        except RuntimeError as error:
            raise exceptions.ConnectionError("the connection was lost") from error

    async def on_connect_check_health(self, check_health: bool = True) -> None:
        try:
            await super().on_connect_check_health(check_health)
        except exceptions.RedisError as error:
            if not isinstance(error, _PasswordFileError):
                error.args = ()
            raise


class _TcpConnection(Connection):
    """A TCP connection to the address that answers first. If an address is slow to answer, the next one is tried too."""

    async def _connect(self) -> None:
        super()._connection_arguments()  # If a certificate cannot be read, this fails before there is a socket to close.
        timeout: float = self.socket_connect_timeout  # type: ignore[assignment] # `_options` sets it
        async with asyncio.timeout(timeout):
            addresses = await asyncio.get_running_loop().getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
            # The attempts for all addresses begin within the first half of the time, and within half a second.
            delay = min(0.5, timeout / 2) / len(addresses)
            self._socket = await start_connection(addresses, happy_eyeballs_delay=delay)
            await super()._connect()  # type: ignore[no-untyped-call] # typed in part

    def _connection_arguments(self) -> dict[str, Any]:
        return {**super()._connection_arguments(), "host": None, "port": None, "sock": self._socket}


class _TlsConnection(_TcpConnection, SSLConnection):
    """A TLS connection that reads the certificates each time it is opened, because they may have been rotated.

    It sets `expiry` to the time at which the server's certificate expires.
    """

    expiry: Gauge

    async def _connect(self) -> None:
        self.ssl_context.context = None
        await super()._connect()
        certificate = self._writer.get_extra_info("peercert")  # type: ignore[union-attr] # connected
        self.expiry.set(ssl.cert_time_to_seconds(certificate["notAfter"]))

    def _connection_arguments(self) -> dict[str, Any]:
        # A final dot in a host name is meant for the resolver. The name in a certificate has no final dot.
        return {**super()._connection_arguments(), "server_hostname": self.host.rstrip(".")}


class _PrimaryConnection(_DiscreetConnection, Connection):
    """A connection to the primary, which the Sentinels name each time the connection is opened.

    After a failure, each open connection is opened again before its next use, because another server may be the primary now.
    """

    sentinels: Sentinels
    replication: Replication
    health: Health
    _address: tuple[str, int]
    _failures: int  # the value of `health.failures` when the connection was opened

    async def connect(self) -> None:
        if self.is_connected:
            usable = self._address == self.sentinels.primary and self._failures == self.health.failures
            if not usable or self._writer.is_closing() or await self.can_read():  # type: ignore[union-attr] # connected
                await self.disconnect(nowait=True)
        if not self.is_connected:
            self._address = self.host, self.port = await self.sentinels.find()
            self._failures = self.health.failures
        await super().connect()

    async def on_connect_check_health(self, check_health: bool = True) -> None:
        await super().on_connect_check_health(check_health)
        # The Sentinels may not know yet that this server is not the primary any more.
        await self.send_command("ROLE")
        role = await self.read_response()
        self.sentinels.confirm(self._address, role)
        await self.replication.begin(self._address, role, self.sentinels.replicas)
        self.health.server = "{}:{}".format(*self._address)


class _WatchedClient(Redis):
    """A client that reports the outcome of its commands and pipelines to `health`.

    A command or a pipeline succeeds only when enough replicas have what it wrote. A command that blocks for more than
    `most_seconds` is refused.
    """

    health: Health
    replication: Replication
    most_seconds: float

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        blocking.check(args, self.most_seconds)
        return await self.health.watch(super().execute_command(*args, **options))  # type: ignore[no-untyped-call] # typed in part

    def pipeline(self, transaction: bool = True, shard_hint: str | None = None) -> "_WatchedPipeline":
        pipeline = _WatchedPipeline(self.connection_pool, self.response_callbacks, transaction, shard_hint)
        pipeline.health = self.health
        pipeline.replication = self.replication
        pipeline.most_seconds = self.most_seconds
        return pipeline

    def pubsub(self, **kwargs: Any) -> Any:
        blocking.check(("SUBSCRIBE",), self.most_seconds)

    def monitor(self) -> Any:
        blocking.check(("MONITOR",), self.most_seconds)

    async def _send_command_parse_response(self, conn: Any, command_name: Any, *args: Any, **options: Any) -> Any:
        reply = await super()._send_command_parse_response(conn, command_name, *args, **options)  # type: ignore[no-untyped-call]
        await _replicate(self.replication, conn)
        return reply


class _WatchedPipeline(Pipeline):
    health: Health
    replication: Replication
    most_seconds: float

    def execute_command(self, *args: Any, **kwargs: Any) -> Any:
        blocking.check(args, self.most_seconds)
        return super().execute_command(*args, **kwargs)

    async def _send_command_parse_response(self, conn: Any, command_name: Any, *args: Any, **options: Any) -> Any:
        reply = await super()._send_command_parse_response(conn, command_name, *args, **options)  # type: ignore[no-untyped-call]
        await _replicate(self.replication, conn)
        return reply

    async def _execute_transaction(self, connection: Any, commands: Any, raise_on_error: Any) -> Any:
        replies = await super()._execute_transaction(connection, commands, raise_on_error)
        await _replicate(self.replication, connection)
        return replies

    async def _execute_pipeline(self, connection: Any, commands: Any, raise_on_error: bool) -> Any:
        replies = await super()._execute_pipeline(connection, commands, raise_on_error)
        await _replicate(self.replication, connection)
        return replies

    async def immediate_execute_command(self, *args: Any, **options: Any) -> Any:
        return await self.health.watch(super().immediate_execute_command(*args, **options))  # type: ignore[no-untyped-call]

    async def execute(self, raise_on_error: bool = True) -> list[Any]:
        done = super().execute(raise_on_error)
        return await (self.health.watch(done) if self.command_stack else done)


async def _replicate(replication: Replication, connection: AbstractConnection) -> None:
    """Wait until enough replicas have what was written over `connection`. Raises TooFewReplicasError if this takes too long."""
    if wait := replication.wait:
        await connection.send_command(*wait)
        with not_of_a_handler():
            await replication.confirm(connection)


class Store:
    """The Redis that the settings or the Sentinels name, or the embedded Valkey at the Unix socket `socket`.

    Handlers run commands and pipelines through `client`. If Redis fails, these raise UnavailableError, which is answered with
    503. `connection()` is for code that needs a connection of its own, for a command that blocks, for example; such code uses
    `replication` itself.

    A Sentinel answers PING, and so does each node of a Redis Cluster. To make `/readyz` answer 503 with them, set `check` to a
    command that reads a key of the service.
    """

    def __init__(self, config: Config, registry: CollectorRegistry, socket: str | None = None) -> None:
        addresses = config.redis_sentinels or ([(config.redis_host, config.redis_port)] if config.redis_host else [])
        self.health = Health(registry, ",".join(f"{host}:{port}" for host, port in addresses) or "embedded")
        kind, self._options = _options(config, socket)
        shared: dict[str, Any] = {}
        if config.redis_tls:
            text = "When the certificate of Redis expires, as the newest connection has seen"
            shared["expiry"] = Gauge("redis_certificate_expiry_timestamp_seconds", text, registry=registry)
            shared["expiry"].set(math.nan)  # No connection has seen a certificate yet.
        self._kind: type[AbstractConnection] = type("Connection", (_DiscreetConnection, kind), shared)
        other = self._kind

        def to(host: str, port: int) -> AbstractConnection:
            """Return a connection, which is not open yet, to a Sentinel or to any server."""
            return other(**self._options | {"host": host, "port": port, "socket_timeout": None})

        timeout, with_sentinels = config.redis_timeout, bool(config.redis_sentinels)
        self.replication = Replication(config.redis_replicas, timeout, registry, to if with_sentinels else None)
        if with_sentinels:
            sentinels = Sentinels(config.redis_sentinels, to, timeout / 2, registry)
            shared = {**shared, "sentinels": sentinels, "replication": self.replication, "health": self.health}
            self._kind = type("Connection", (_PrimaryConnection, kind), shared)
        # If all connections are in use, a handler waits for a free one. It waits no longer than for an answer of Redis.
        pool = BlockingConnectionPool(
            max_connections=_MAX_POOL_CONNECTIONS, timeout=config.redis_timeout, connection_class=self._kind, **self._options
        )
        self.client = cast("_WatchedClient", _WatchedClient.from_pool(pool))  # Closing the client closes the pool.
        self.client.health, self.client.replication = self.health, self.replication
        self.client.most_seconds = timeout / 2  # The reply needs time, too.
        self.check: tuple[str, ...] = ()

    def connection(self) -> AbstractConnection:
        """Return a new connection, not open yet. Its reads have no time limit: the caller sets one around each exchange."""
        return self._kind(**self._options | {"socket_timeout": None})


STORE = web.AppKey("store", Store)


def _options(config: Config, socket: str | None) -> tuple[type[AbstractConnection], dict[str, Any]]:
    """Return the class of a connection and its options.

    The driver's retry is off, because it would repeat commands that may have been counted. With RESP2 and without
    `CLIENT SETINFO`, the handshake is only AUTH, so the user in Redis needs no further rights.
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
    if config.redis_password:
        options["credential_provider"] = _Credentials(config)
    if not config.redis_tls:
        return _TcpConnection, options
    return _TlsConnection, options | {
        "ssl_ca_certs": config.redis_ca_file and str(config.redis_ca_file),
        "ssl_certfile": config.redis_cert_file and str(config.redis_cert_file),
        "ssl_keyfile": config.redis_key_file and str(config.redis_key_file),
        "ssl_check_hostname": True,
        "ssl_min_version": ssl.TLSVersion.TLSv1_2,
    }
