"""Test connections to Redis: users, passwords, password files, TLS, and the log and the answers when a connection fails."""

import asyncio
import math
import re
import sys
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trustme
from prometheus_client import CollectorRegistry
from redis import exceptions
from redis.asyncio.connection import DefaultParser

from nanoservice import health as module
from nanoservice.config import Config
from nanoservice.errors import UnavailableError
from nanoservice.health import Health, cause
from nanoservice.redis import Store
from nanoservice.replication import Replication
from nanoservice.sentinel import Sentinels
from nanoservice.testing.served import Served, serving
from nanoservice.testing.valkey import Valkey
from nanoservice.testing.waiting import SLACK, eventually
from tests.nanoservice.sample import SERVICE
from tests.support.names import black_hole, resolve
from tests.support.process import metric
from tests.support.tls import TlsFront


@pytest.fixture
def secured(valkey: Valkey) -> Valkey:
    """Return a Valkey with the users `svc` (password `first`) and `admin`; its default user is off."""
    valkey.run("ACL", "SETUSER", "svc", "on", ">first", "~*", "+@all")
    with valkey.client() as client:
        client.execute_command("ACL", "SETUSER", "admin", "on", ">admin", "~*", "+@all")
        client.execute_command("ACL", "SETUSER", "default", "off")
    return valkey


def as_admin(valkey: Valkey, *command: str) -> None:
    with valkey.client(username="admin", password="admin") as client:
        client.execute_command(*command)


async def status(served: Served) -> int:
    async with served.client.get("/") as answer:
        return answer.status


async def test_user_and_password_are_used_and_nothing_is_logged(secured: Valkey, caplog: pytest.LogCaptureFixture) -> None:
    async with serving(SERVICE, secured.environ(REDIS_USERNAME="svc", REDIS_PASSWORD="first")) as served:
        assert await status(served) == 200
    assert not [record for record in caplog.records if record.levelname not in ("DEBUG", "INFO")]


async def test_password_without_a_user_name_is_used_for_the_default_user(valkey: Valkey) -> None:
    valkey.run("CONFIG", "SET", "requirepass", "first")
    async with serving(SERVICE, valkey.environ(REDIS_PASSWORD="first")) as served:
        assert await status(served) == 200


async def test_wrong_password_is_503_until_it_is_right(secured: Valkey, caplog: pytest.LogCaptureFixture) -> None:
    async with serving(SERVICE, secured.environ(REDIS_USERNAME="svc", REDIS_PASSWORD="second")) as served:
        for _ in range(3):
            async with served.client.get("/") as answer:
                assert answer.status == 503
                assert answer.headers["Retry-After"] == "1"
                assert (await answer.json())["detail"] == "Redis: wrong user or password"
        assert len([line for line in caplog.messages if "wrong user or password" in line]) == 1
        assert "second" not in logged(caplog)
        as_admin(secured, "ACL", "SETUSER", "svc", ">second")
        await eventually(lambda: _is(served, 200), 6)


def logged(caplog: pytest.LogCaptureFixture) -> str:
    """Return everything that was logged, including the fields of `extra=`."""
    return str([vars(record) for record in caplog.records])


async def test_password_that_redis_quotes_is_not_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    valkey = Valkey(tmp_path, "--rename-command", "AUTH", "")
    valkey.start()
    try:
        async with serving(SERVICE, valkey.environ(REDIS_USERNAME="svc", REDIS_PASSWORD="s3cret")) as served:
            for path in ("/", "/readyz"):
                async with served.client.get(path) as answer:
                    assert answer.status == 503
                    assert "s3cret" not in await answer.text()
    finally:
        valkey.kill()
    assert "Redis fails" in caplog.text
    assert "s3cret" not in logged(caplog)


async def test_readiness_fails_when_the_password_is_changed_although_the_probes_connection_is_open(secured: Valkey) -> None:
    environ = secured.environ(REDIS_USERNAME="svc", REDIS_PASSWORD="first")
    async with serving(SERVICE, environ) as served:
        async with served.client.get("/readyz") as answer:  # the probe opens its connection
            assert answer.status == 200
        as_admin(secured, "ACL", "SETUSER", "svc", "resetpass", ">second")
        assert await status(served) == 503

        async def not_ready() -> bool:
            async with served.client.get("/readyz") as answer:
                return answer.status == 503

        await eventually(not_ready, 6)
        assert await metric(served, "redis_up") == 0


async def _is(served: Served, expected: int) -> bool:
    return await status(served) == expected


async def test_password_file_is_read_again_at_each_connection(secured: Valkey, tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("first\n")
    environ = secured.environ(REDIS_USERNAME="svc", REDIS_PASSWORD_FILE=str(file))
    async with serving(SERVICE, environ) as served:
        assert await status(served) == 200
        as_admin(secured, "ACL", "SETUSER", "svc", "resetpass", ">second")
        assert await status(served) == 200  # the open connection still works
        file.write_text("second")
        as_admin(secured, "CLIENT", "KILL", "USER", "svc")
        assert await status(served) == 200


async def test_password_file_that_went_away_is_503_until_it_is_back(secured: Valkey, tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("first")
    environ = secured.environ(REDIS_USERNAME="svc", REDIS_PASSWORD_FILE=str(file))
    async with serving(SERVICE, environ) as served:
        file.unlink()
        assert await status(served) == 503
        file.write_text("first")
        await eventually(lambda: _is(served, 200), 6)


@pytest.mark.parametrize(
    ("content", "error"),
    [(b"s3cret\xff", "is not UTF-8"), (b"\xef\xbb\xbf\r\n", "has no password in it")],
)
async def test_password_file_that_becomes_unusable_is_503_and_not_quoted(
    secured: Valkey, tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes, error: str
) -> None:
    file = tmp_path / "password"
    file.write_text("first")
    environ = secured.environ(REDIS_USERNAME="svc", REDIS_PASSWORD_FILE=str(file))
    async with serving(SERVICE, environ) as served:
        file.write_bytes(content)
        assert await status(served) == 503
        assert [record for record in caplog.records if str(vars(record).get("error")).endswith(f"{file} {error}")]
        assert not [record for record in caplog.records if record.exc_info]
        assert "s3cret" not in logged(caplog)
        file.write_text("first")
        await eventually(lambda: _is(served, 200), 6)


# --- names with several addresses ---


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse an attempt to connect instead of dropping it")
@pytest.mark.parametrize(
    "addresses", [("127.0.0.2", "127.0.0.1"), ("127.0.0.1", "127.0.0.2"), ("127.0.0.2",) * 4 + ("127.0.0.1",)]
)
async def test_address_that_leads_nowhere_does_not_hide_the_next_address(
    valkey: Valkey, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, addresses: tuple[str, ...]
) -> None:
    resolve(monkeypatch, "redis.example.org", *addresses)
    with black_hole("127.0.0.2", valkey.port):
        async with serving(SERVICE, valkey.environ(REDIS_HOST="redis.example.org")) as served:
            async with served.client.get("/readyz") as answer:
                assert answer.status == 200
            assert await status(served) == 200
            valkey.run("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            assert await status(served) == 200
    assert not [record for record in caplog.records if record.levelname not in ("DEBUG", "INFO")]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse an attempt to connect instead of dropping it")
async def test_host_of_which_every_address_leads_nowhere_is_503_in_time(valkey: Valkey, monkeypatch: pytest.MonkeyPatch) -> None:
    resolve(monkeypatch, "redis.example.org", "127.0.0.2", "127.0.0.3")
    with black_hole("127.0.0.2", valkey.port), black_hole("127.0.0.3", valkey.port):
        async with serving(SERVICE, valkey.environ(REDIS_HOST="redis.example.org", REDIS_TIMEOUT="0.3")) as served:
            for path in ("/", "/readyz"):
                began = time.monotonic()
                async with served.client.get(path) as answer:
                    assert (answer.status, (await answer.json())["detail"]) == (503, "Redis: it does not answer in time")
                assert time.monotonic() - began < 0.3 * SLACK


# --- commands of handlers ---


@pytest.fixture
async def store(valkey: Valkey) -> AsyncIterator[Store]:
    it = Store(Config.read(valkey.environ()), CollectorRegistry())
    yield it
    await it.client.aclose()


async def test_command_and_pipeline_say_that_redis_is_unavailable(store: Store, valkey: Valkey) -> None:
    client: Any = store.client
    assert await client.incr("n") == 1
    assert await client.pipeline().incr("n").incr("n").execute() == [2, 3]
    valkey.kill()
    for work in (client.incr("n"), client.pipeline().incr("n").execute(), client.pipeline().watch("n")):
        with pytest.raises(UnavailableError, match="Redis: it cannot be reached"):
            await work
    assert store.health.reason
    assert await client.pipeline().execute() == []
    assert store.health.reason  # an empty pipeline does not end the outage
    valkey.start()
    await client.pipeline().incr("n").execute()
    assert not store.health.reason


async def test_errors_that_a_handler_expects_or_causes_are_not_blamed_on_redis(
    store: Store, valkey: Valkey, caplog: pytest.LogCaptureFixture
) -> None:
    client: Any = store.client
    script = client.register_script("return 7")
    for _ in range(2):
        assert await script() == 7  # the driver loads the script when Redis lacks it
        valkey.run("SCRIPT", "FLUSH")
    with pytest.raises(exceptions.DataError):
        await client.set("n", None)
    async with client.pipeline() as pipeline:
        await pipeline.watch("n")
        valkey.run("SET", "n", "1")
        pipeline.multi()
        pipeline.set("n", "2")
        with pytest.raises(exceptions.WatchError):
            await pipeline.execute()
    assert "Redis fails" not in caplog.text


async def test_arguments_of_an_unknown_command_are_not_logged(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    client: Any = store.client
    with pytest.raises(UnavailableError, match="it does not know a command"):
        await client.execute_command("NOSUCH", "s3cret")
    with pytest.raises(UnavailableError, match="it does not know a command"):
        await client.pipeline(transaction=False).execute_command("NOSUCH", "s3cret").execute()
    assert re.search(r"ERR unknown command .NOSUCH.", logged(caplog))
    assert "s3cret" not in logged(caplog)


async def test_command_that_redis_refuses_for_its_own_sake_is_the_handlers_error(
    store: Store, valkey: Valkey, caplog: pytest.LogCaptureFixture
) -> None:
    client: Any = store.client
    valkey.run("RPUSH", "list", "x")
    valkey.run("SET", "text", "x")
    valkey.run("XGROUP", "CREATE", "stream", "group", "$", "MKSTREAM")
    commands: dict[str, tuple[str, ...]] = {
        "WRONGTYPE": ("INCR", "list"),
        "not an integer": ("INCR", "text"),
        "syntax error": ("SET", "text", "x", "NO"),
        "wrong number of arguments": ("GET",),
        "BUSYGROUP": ("XGROUP", "CREATE", "stream", "group", "$"),
        "no such key": ("EVAL", "return redis.call('RENAME', 'a', 'b')", "0"),
    }
    for words, command in commands.items():
        for pipeline in (None, client.pipeline(), client.pipeline(transaction=False)):
            with pytest.raises(exceptions.ResponseError, match=words):
                await (pipeline.execute_command(*command).execute() if pipeline else client.execute_command(*command))
    assert not store.health.reason
    assert not caplog.messages


@pytest.mark.parametrize("replies", [b"-ERR no server is free\r\n", b""], ids=["to nothing", "to AUTH"])
async def test_connection_that_is_refused_for_an_unknown_reason_is_not_the_handlers_error(replies: bytes) -> None:
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(replies or (await reader.read(65536) and b"-ERR s3cret\r\n"))
        await reader.read(65536)
        writer.close()

    async with await asyncio.start_server(refuse, "127.0.0.1", 0) as server:
        environ = {"REDIS_HOST": "127.0.0.1", "REDIS_PORT": str(server.sockets[0].getsockname()[1]), "REDIS_PASSWORD": "s3cret"}
        it: Any = Store(Config.read(environ), CollectorRegistry())
        try:
            with pytest.raises(UnavailableError, match=r"Redis: an unexpected error$"):
                await it.client.incr("n")
        finally:
            await it.client.aclose()


async def test_connection_whose_handshake_is_cancelled_is_closed(valkey: Valkey, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = asyncio.Event()

    async def ask_all(self: Sentinels) -> tuple[str, int]:
        return "127.0.0.1", valkey.port

    async def begin(self: Replication, *arguments: Any) -> None:
        begun.set()
        await asyncio.sleep(3600)

    monkeypatch.setattr(Sentinels, "_ask_all", ask_all)
    monkeypatch.setattr(Replication, "begin", begin)
    it: Any = Store(Config.read({"REDIS_SENTINELS": "127.0.0.1:1"}), CollectorRegistry())
    try:
        task = asyncio.create_task(it.client.get("n"))
        await asyncio.wait_for(begun.wait(), 5 * SLACK)
        task.cancel()
        await asyncio.wait([task])
        await eventually(lambda: len(valkey.run("CLIENT", "LIST").splitlines()) == 1, 5 * SLACK)  # only the one that asks
    finally:
        await it.client.aclose()


async def test_wait_that_redis_refuses_is_not_the_handlers_error(valkey: Valkey, caplog: pytest.LogCaptureFixture) -> None:
    it: Any = Store(Config.read(valkey.environ(REDIS_REPLICAS="1")), CollectorRegistry())
    valkey.run("REPLICAOF", "127.0.0.1", "1")
    try:
        with pytest.raises(UnavailableError, match=r"Redis: an unexpected error$"):
            await it.client.get("n")
    finally:
        await it.client.aclose()
    assert "WAIT cannot be used with replica instances" in logged(caplog)


@pytest.mark.parametrize(
    "command",
    [
        *(f"{name} list 0.6" for name in ("BLPOP", "BRPOP", "BRPOPLPUSH list", "BZPOPMIN", "bzpopmax")),
        "BLPOP list 0",
        "BLMOVE list list LEFT LEFT 3",
        "BLMPOP 3 1 list LEFT",
        "BZMPOP 3 1 list MIN",
        "XREAD COUNT 1 BLOCK 600 STREAMS stream $",
        "XREADGROUP GROUP group me block 0 STREAMS stream >",
        "WAIT 1 600",
        "WAITAOF 0 1 0",
        "SUBSCRIBE channel",
        "PSUBSCRIBE *",
    ],
)
async def test_command_that_blocks_for_too_long_is_refused_at_once(
    store: Store, command: str, caplog: pytest.LogCaptureFixture
) -> None:
    client: Any = store.client
    name, *words = command.split()
    for send in (client.execute_command, client.pipeline().execute_command):
        with pytest.raises(ValueError, match=f"{name.upper()} would block a connection that requests share"):
            await send(name, *words)
    assert not caplog.messages


async def test_command_that_blocks_for_a_short_time_or_not_at_all_is_sent(
    store: Store, valkey: Valkey, caplog: pytest.LogCaptureFixture
) -> None:
    client: Any = store.client
    valkey.run("XGROUP", "CREATE", "stream", "block", "$", "MKSTREAM")
    assert await client.blpop(["list"], timeout=0.5) is None
    assert await client.xread({"stream": "$"}, block=500) in ([], {}, None)
    assert await client.xread({"stream": "$", "block": "$"}) in ([], {}, None)
    assert await client.xreadgroup("block", "me", {"stream": ">"}, block=10) in ([], {}, None)
    assert await client.wait(1, 10) == 0
    for subscribe in (client.pubsub, client.monitor):
        with pytest.raises(ValueError, match="would block"):
            subscribe()
    assert not caplog.messages


async def test_command_blocks_for_any_time_over_a_connection_of_its_own(store: Store, valkey: Valkey) -> None:
    connection = store.connection()
    await connection.connect()
    await connection.send_command("BLPOP", "list", 0)
    await asyncio.sleep(1.5)  # longer than REDIS_TIMEOUT
    valkey.run("RPUSH", "list", "item")
    assert await connection.read_response() == [b"list", b"item"]
    await connection.disconnect(nowait=True)


async def test_handlers_that_use_all_connections_are_not_reported_as_an_outage_of_redis(
    valkey: Valkey, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(Config.read(valkey.environ(REDIS_TIMEOUT="2")), CollectorRegistry())
    pool = store.client.connection_pool
    connections = [await pool.get_connection() for _ in range(16)]
    try:
        with pytest.raises(UnavailableError, match="no connection to Redis is free"):
            await store.client.incr("n")
        assert not store.health.reason
        assert not caplog.messages
        await pool.release(connections.pop())
        assert await store.client.incr("n") == 1
    finally:
        for connection in connections:
            await pool.release(connection)
        await store.client.aclose()


async def test_server_that_refuses_a_client_before_its_first_command_is_named(
    valkey: Valkey, caplog: pytest.LogCaptureFixture
) -> None:
    valkey.run("CONFIG", "SET", "maxclients", "1")
    with valkey.client() as client:
        client.ping()
        async with serving(SERVICE, valkey.environ()) as served:
            for path in ("/", "/readyz"):
                async with served.client.get(path) as answer:
                    assert (await answer.json())["detail"] == "Redis: it has too many clients (maxclients)"
    assert caplog.messages == ["Redis fails: it has too many clients (maxclients)"]


@pytest.mark.parametrize("banner", [b"SSH-2.0-OpenSSH_9.2\r\n", b"220 mail ESMTP\r\n", b"HTTP/1.1 400 Bad Request\r\n\r\n"])
async def test_server_of_another_protocol_that_speaks_first_is_named(
    valkey: Valkey, caplog: pytest.LogCaptureFixture, banner: bytes
) -> None:
    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(banner)
        await reader.read(65536)
        writer.close()

    async with await asyncio.start_server(speak, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with serving(SERVICE, valkey.environ(REDIS_PORT=str(port))) as served:
            for path in ("/", "/readyz"):
                async with served.client.get(path) as answer:
                    assert (await answer.json())["detail"] == "Redis: its replies do not follow the protocol of Redis"
    assert caplog.messages == ["Redis fails: its replies do not follow the protocol of Redis"]


async def test_handlers_that_find_no_free_connection_while_redis_hangs_name_the_outage(valkey: Valkey) -> None:
    store = Store(Config.read(valkey.environ(REDIS_TIMEOUT="0.2")), CollectorRegistry())
    valkey.freeze()
    with pytest.raises(UnavailableError, match="Redis: it does not answer in time"):
        await store.client.incr("n")
    results = await asyncio.gather(*(store.client.incr("n") for _ in range(50)), return_exceptions=True)
    assert {str(result) for result in results} == {"Redis: it does not answer in time"}
    valkey.thaw()
    await store.client.aclose()


def test_failures_are_counted_by_cause_and_no_server_can_invent_one() -> None:
    registry = CollectorRegistry()
    health = Health(registry, "redis:6379")

    def failures(words: str) -> float | None:
        return registry.get_sample_value("redis_failures_total", {"cause": words})

    assert failures("it is out of memory (OOM)") == 0  # so the first failure is an increase
    health.failed("work", exceptions.ResponseError("OOM command not allowed when used memory > 'maxmemory'."))
    assert failures("it is out of memory (OOM)") == 1
    for number in range(100):
        health.failed("work", exceptions.ResponseError(f"INVENTED{chr(65 + number % 26)} a server's own words {number}"))
    assert failures("an unexpected error") == 100


def test_same_cause_is_logged_once_a_minute(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    now = 1000.0
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now))
    health = Health(CollectorRegistry(), "redis:6379")

    def lines() -> int:
        return len(caplog.records)

    for _ in range(100):
        health.failed("work", OSError())
        health.worked("work")
    assert lines() == 2
    health.failed("work", exceptions.ReadOnlyError())
    health.worked("work")
    assert lines() == 4  # a different cause is logged at once
    health.failed("work", OSError())  # this outage begins less than a minute after the same cause was logged
    now += 61
    assert lines() == 4
    for _ in range(100):
        health.failed("work", OSError())
    assert lines() == 5  # the cause was last logged over a minute ago, so it is logged again
    health.worked("work")
    assert [record.getMessage() for record in caplog.records][-2:] == ["Redis fails: it cannot be reached", "Redis works again"]


@pytest.fixture
async def tls(valkey: Valkey, tmp_path: Path) -> AsyncIterator[TlsFront]:
    """Yield a TLS server that requires a client certificate and passes the bytes on to Valkey. The test starts the server."""
    front = TlsFront(valkey, tmp_path)
    yield front
    front.server.close()
    await front.server.wait_closed()


async def test_tls_with_a_client_certificate(tls: TlsFront) -> None:
    await tls.start()
    async with serving(SERVICE, tls.environ()) as served:
        assert await status(served) == 200
    assert tls.clients


async def test_rotated_tls_certificates_need_no_restart(tls: TlsFront) -> None:
    soon = datetime.now(UTC).replace(microsecond=0) + timedelta(days=1)
    await tls.start(expires=soon)
    async with serving(SERVICE, tls.environ()) as served:
        assert math.isnan(await metric(served, "redis_certificate_expiry_timestamp_seconds"))
        assert await status(served) == 200
        assert await metric(served, "redis_certificate_expiry_timestamp_seconds") == soon.timestamp()
        tls.server.close()
        tls.rotate()
        await tls.start(expires=soon + timedelta(days=90))
        tls.valkey.run("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        await eventually(lambda: _is(served, 200), 2 * SLACK)
        async with served.client.get("/readyz") as answer:
            assert answer.status == 200
        assert await metric(served, "redis_certificate_expiry_timestamp_seconds") == (soon + timedelta(days=90)).timestamp()


async def test_final_dot_of_a_host_is_used_to_resolve_it_and_not_to_check_its_certificate(
    tls: TlsFront, monkeypatch: pytest.MonkeyPatch
) -> None:
    await tls.start("redis.example.org")
    resolve(monkeypatch, "redis.example.org.", "127.0.0.1")  # The name without the dot does not resolve.
    async with serving(SERVICE, tls.environ(REDIS_HOST="redis.example.org.")) as served:
        assert await status(served) == 200
    assert tls.clients


async def test_tls_of_an_unknown_authority_is_refused(tls: TlsFront, tmp_path: Path) -> None:
    await tls.start()
    other = tmp_path / "other.pem"
    trustme.CA().cert_pem.write_to_path(str(other))
    async with serving(SERVICE, tls.environ(REDIS_CA_FILE=str(other))) as served:
        async with served.client.get("/") as answer:
            assert answer.status == 503
            assert "certificate is not trusted" in (await answer.json())["detail"]


async def test_tls_for_another_name_is_refused(tls: TlsFront) -> None:
    await tls.start("another.example.org")
    async with serving(SERVICE, tls.environ()) as served:
        assert await status(served) == 503


async def test_tls_without_the_client_certificate_is_refused(tls: TlsFront) -> None:
    await tls.start()
    async with serving(SERVICE, tls.environ(REDIS_CERT_FILE="", REDIS_KEY_FILE="")) as served:
        assert await status(served) == 503
    assert not tls.clients


def server(reply: str) -> Exception:
    """Return the error that the driver makes of a server's reply."""
    error: Exception = DefaultParser.parse_error(reply)  # type: ignore[no-untyped-call] # redis-py has types only in part
    return error


def in_script(reply: str) -> Exception:
    """Return the error that the driver makes if a command in a script gets `reply`, with the message of Redis 6.2."""
    return server(f"ERR Error running script (call to f_0): @user_script:77: @user_script: 77: {reply}")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (server("READONLY You can't write against a read only replica."), "it is a read-only replica"),
        (in_script("-READONLY You can't write against a read only replica."), "it is a read-only replica"),
        (server("OOM command not allowed when used memory > 'maxmemory'."), "out of memory"),
        (in_script("-OOM command not allowed when used memory > 'maxmemory'."), "out of memory"),
        (server("MISCONF Valkey is configured to save RDB snapshots"), "refuses writes"),
        (in_script("-MISCONF Redis is configured to save RDB snapshots"), "refuses writes"),
        (server("LOADING Redis is loading the dataset in memory"), "loading"),
        (server("NOPERM this user has no permissions to run the 'evalsha' command"), "NOPERM"),
        (
            server(
                "ERR ACL failure in script: User svc has no permissions to run the 'set' command script: 0, on @user_script:7."
            ),
            "NOPERM",
        ),
        (in_script("The user executing the script can't run this command or subcommand"), "NOPERM"),
        (
            server("ERR The user executing the script can't run this command or subcommand script: 0, on @user_script:7."),
            "NOPERM",
        ),
        (server("DENIED Running in protected mode because no password is set."), "protected mode"),
        (server("NOAUTH Authentication required."), "requires a password"),
        (server("WRONGPASS invalid username-password pair or user is disabled."), "wrong user or password"),
        (server("NOREPLICAS Not enough good replicas to write."), "too few replicas"),
        (in_script("-NOREPLICAS Not enough good replicas to write."), "too few replicas"),
        (server("EXECABORT Transaction discarded because of: OOM command not allowed when used memory"), "out of memory"),
        (server("MOVED 866 10.1.2.3:6379"), "Redis Cluster"),
        (server("ERR unknown command 'EVALSHA', with args beginning with: '10.1.2.3' 'OOM'"), "it is a Sentinel"),
        (server("ERR max number of clients reached"), "too many clients"),
        (exceptions.InvalidResponse("Protocol error, got 'H' as reply type byte: 10.1.2.3"), "do not follow the protocol"),
        (exceptions.TimeoutError("x"), "in time"),
        (TimeoutError(), "in time"),
        (exceptions.ConnectionError("Error 111 connecting to 10.1.2.3:6379."), "cannot be reached"),
        (server("WRONGTYPE Operation against 10.1.2.3"), "an unexpected error: WRONGTYPE"),
        (in_script("WRONGTYPE Operation against a key holding the wrong kind of value"), "an unexpected error: WRONGTYPE"),
        (server("ERR secret-thing of 10.1.2.3"), "an unexpected error"),
        (exceptions.ResponseError("secret-thing of 10.1.2.3"), "an unexpected error"),
    ],
)
def test_cause_is_a_phrase_without_an_address(error: Exception, words: str) -> None:
    assert words in cause(error)
    assert "Error" not in cause(error)  # the cause names no Python class
    assert "10.1.2.3" not in cause(error)
    assert "secret" not in cause(error)
