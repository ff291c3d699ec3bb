"""Redis as it is shipped, on a real Valkey: its script starts it, with its settings and its users; each may do what it must."""

import contextlib
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, BusyLoadingError, NoPermissionError
from redis.retry import Retry

from hitcounter.app import SERVICE
from hitcounter.counter import _keys
from nanoservice.embedded import executable
from nanoservice.testing.served import serving
from nanoservice.testing.valkey import Valkey, free_port
from nanoservice.testing.waiting import SLACK, wait_for
from tests.support import ROOT

SOURCES = ROOT / "manifests" / "redis"
USERS = (SOURCES / "users.acl").read_text()
RIGHTS = next(line.split()[2:] for line in USERS.splitlines() if line.startswith("user hitcounter "))
BARE: dict[str, Any] = {"protocol": 2, "driver_info": None, "retry": Retry(NoBackoff(), 0)}  # the driver sends what it is told to
HITS, POSTS, _, ANSWERS, ORDER = _keys("hitcounter", "")


class Shipped(Valkey):
    """The container's files in the folder `root`, and Valkey as the script starts it there."""

    def __init__(self, root: Path) -> None:
        super().__init__(root / "data")
        self.root = root
        for folder in ("etc/redis", "run/secrets/redis", "run/valkey", "data", "tmp", "bin"):
            (root / folder).mkdir(parents=True)
        for name in ("redis.sh", "users.acl", "valkey.conf"):
            text = (SOURCES / name).read_text()
            (root / "etc/redis" / name).write_text(re.sub(r"(?<![\w/])/(etc|run|data|tmp)\b", rf"{root}\g<0>", text))
        for name in ("valkey-server", "valkey-check-rdb"):  # one program, which looks at its name
            (root / "bin" / name).symlink_to(executable())
        with open(root / "etc/redis/users.acl", "a") as file:
            file.write("user all resetchannels ~* &* +@all\n")  # who may do what the others may not
        for name in ("probe", "operator", "hitcounter", "all"):
            self.set_passwords(name, f"{name}'s\n")

    def set_passwords(self, name: str, lines: str) -> None:
        (self.root / "run/secrets/redis" / name).write_text(lines)

    def script(self, *arguments: str, input: bytes = b"") -> "subprocess.CompletedProcess[bytes]":
        """Run a command of the script to its end."""
        return subprocess.run([*self.command, *arguments], env=self.path, input=input, capture_output=True, timeout=30)

    @property
    def command(self) -> list[str]:
        return ["sh", str(self.root / "etc/redis/redis.sh")]

    @property
    def path(self) -> dict[str, str]:
        return {"PATH": f"{self.root / 'bin'}:/usr/local/bin:/usr/bin:/bin"}

    def start(self, *options: str) -> None:
        self.begin(*options)
        self.wait()

    def begin(self, *options: str) -> None:
        """Start it, and do not wait for it."""
        command = [*self.command, "start", "--port", str(self.port), "--bind", "127.0.0.1", *options]
        self.process = subprocess.Popen(command, env=self.path, stdout=subprocess.DEVNULL)

    def wait(self) -> None:
        """Wait until it serves."""
        process = self.process
        assert process

        def answers() -> bool:
            assert process.poll() is None, "it ended: see what it wrote"
            with contextlib.suppress(BusyLoadingError):  # it asks for a password before it has loaded its data
                return self.answers() and bool(self.ask("all", "PING"))
            return False

        wait_for(answers, 10 * SLACK, "Valkey answers")

    def ask(self, user: str, *command: Any, password: str = "") -> Any:
        """Return the answer to a command of `user`."""
        with self.client(username=user, password=password or f"{user}'s", **BARE) as client:
            return client.execute_command(*command)


@contextlib.contextmanager
def shipped() -> Iterator[Shipped]:
    # A short path: a test's own may be longer than the 108 bytes that a Unix socket's can have.
    with tempfile.TemporaryDirectory(prefix="redis-") as folder:
        store = Shipped(Path(folder))
        try:
            yield store
        finally:
            store.end(signal.SIGKILL)


@pytest.fixture
def stopped() -> Iterator[Shipped]:
    """One that is not started yet."""
    with shipped() as store:
        yield store


@pytest.fixture(scope="module")
def started() -> Iterator[Shipped]:
    """One for all the tests that leave it as it was."""
    with shipped() as store:
        store.start()
        yield store


@pytest.fixture
def store(started: Shipped) -> Shipped:
    started.ask("all", "FLUSHALL")
    started.ask("all", "SCRIPT", "FLUSH")
    started.ask("all", "ACL", "SETUSER", "hitcounter", "resetkeys", *RIGHTS)
    return started


# --- the script ---


def test_settings_are_those_that_are_shipped(store: Shipped) -> None:
    found = store.ask("all", "CONFIG", "GET", "append*", "maxmemory*", "save", "protected-mode", "unixsocket")
    found = dict(zip(found[::2], found[1::2], strict=True))
    assert (found["appendonly"], found["appendfsync"], found["save"]) == ("yes", "always", "")
    assert (found["maxmemory"], found["maxmemory-policy"]) == (str(64 << 20), "noeviction")
    assert found["unixsocket"] == str(store.root / "run/valkey/socket")


def test_nobody_gets_in_without_a_password(store: Shipped) -> None:
    for name in ("default", "probe", "operator", "hitcounter"):
        with store.client(**BARE) as client:
            for password in ("", "wrong", "all's"):
                with pytest.raises(AuthenticationError):
                    client.execute_command("AUTH", name, password)
            with pytest.raises(AuthenticationError):
                client.ping()
    assert store.ask("probe", "PING") is True


def test_missing_password_is_told(stopped: Shipped) -> None:
    stopped.set_passwords("operator", "")
    ended = stopped.script("start")
    assert (ended.returncode, ended.stdout) == (1, b"")
    assert ended.stderr == b"redis.sh: the secret redis-users has no password for operator; run: make secret\n"


def test_each_line_of_passwords_is_valid(stopped: Shipped) -> None:
    stopped.set_passwords("hitcounter", "new\nold\n")
    stopped.start()
    for password in ("new", "old"):
        assert stopped.ask("hitcounter", "PING", password=password) is True


def test_password_without_a_newline_is_valid(stopped: Shipped) -> None:
    # As most tools write a secret.
    stopped.set_passwords("hitcounter", "only")
    stopped.start()
    assert stopped.ask("hitcounter", "PING", password="only") is True


def test_byte_order_mark_and_carriage_returns_are_not_of_the_passwords(stopped: Shipped) -> None:
    for name in ("hitcounter", "operator"):
        stopped.set_passwords(name, "\ufeffnew\r\nold\r\n\r\n")
    stopped.start()
    for password in ("new", "old"):
        assert stopped.ask("hitcounter", "PING", password=password) is True
    with stopped.client(**BARE) as client, pytest.raises(AuthenticationError):
        client.execute_command("AUTH", "hitcounter", "")
    # The script itself logs in by the same rule; here with what it gives the client.
    client_program = stopped.root / "bin/valkey-cli"
    client_program.write_text('#!/bin/sh\nprintf "<%s>" "$REDISCLI_AUTH"\n')
    client_program.chmod(0o755)
    assert b"<old>" in stopped.script("load-users").stderr


def test_empty_line_is_no_password(stopped: Shipped) -> None:
    stopped.set_passwords("hitcounter", "only\n\n")
    stopped.start()
    assert stopped.ask("hitcounter", "PING", password="only") is True
    with stopped.client(**BARE) as client, pytest.raises(AuthenticationError):
        client.execute_command("AUTH", "hitcounter", "")


def test_second_one_on_the_same_data_waits_until_the_first_has_ended(stopped: Shipped) -> None:
    """As after a pod that was deleted by force, whose process goes on."""
    stopped.start()
    users = stopped.root / "run/valkey/users.acl"
    stopped.ask("all", "SET", "a", "1")
    users.unlink()  # each start writes them, when it has the data for itself
    first, stopped.port = stopped.process, free_port()
    assert first
    try:
        stopped.begin()
        second = stopped.process
        assert second
        children = Path(f"/proc/{second.pid}/task/{second.pid}/children")

        def waits() -> bool:
            with contextlib.suppress(OSError):  # it has just ended
                return "sleep" in [Path(f"/proc/{child}/comm").read_text().strip() for child in children.read_text().split()]
            return False

        wait_for(waits, 10 * SLACK, "the second one waits")
        assert not users.exists()
    finally:
        first.kill()
        first.wait()
    stopped.wait()
    assert stopped.ask("all", "GET", "a") == "1"


def test_operator_loads_users_and_can_do_nothing_else(stopped: Shipped) -> None:
    stopped.start()
    users = stopped.root / "run/valkey/users.acl"
    users.write_text(users.read_text().replace("user probe on", "user probe off"))
    assert stopped.ask("operator", "ACL", "LOAD") == "OK"
    with pytest.raises(AuthenticationError):
        stopped.ask("probe", "PING")
    for command in (("PING",), ("GET", HITS), ("ACL", "SETUSER", "operator", "+@all"), ("ACL", "LIST"), ("FLUSHALL",)):
        with pytest.raises(NoPermissionError):
            stopped.ask("operator", *command)


def test_restored_snapshot_is_taken_at_the_next_start_and_the_old_data_is_kept(stopped: Shipped) -> None:
    stopped.start()
    stopped.ask("all", "SET", HITS, "7")
    stopped.ask("all", "SAVE")
    snapshot = (stopped.data / "dump.rdb").read_bytes()
    stopped.ask("all", "SET", HITS, "8")
    assert stopped.script("restore", input=snapshot).returncode == 0
    assert stopped.ask("all", "GET", HITS) == "8"
    for count in ("7", "9"):  # as restored, and as it went on: a second start restores nothing
        stopped.kill()
        stopped.start()
        assert stopped.ask("all", "GET", HITS) == count
        stopped.ask("all", "SET", HITS, "9")
    stopped.kill()
    (stopped.data / "appendonlydir").rename(stopped.data / "unwanted")
    (stopped.data / "before-restore").rename(stopped.data / "appendonlydir")
    stopped.start()
    assert stopped.ask("all", "GET", HITS) == "8"


def test_restore_whose_restart_was_cut_off_is_not_taken_later(stopped: Shipped) -> None:
    stopped.start()
    stopped.ask("all", "SAVE")
    assert stopped.script("restore", input=(stopped.data / "dump.rdb").read_bytes()).returncode == 0
    stopped.ask("all", "SET", HITS, "8")
    stopped.kill()
    then = time.time() - 16 * 60
    os.utime(stopped.data / "restored", (then, then))
    stopped.start()
    assert stopped.ask("all", "GET", HITS) == "8"
    assert not (stopped.data / "restored").exists()


def test_users_may_be_commented_and_the_last_line_have_no_end(stopped: Shipped) -> None:
    users = stopped.root / "etc/redis/users.acl"
    users.write_text("# Who may do what\n\n" + users.read_text().rstrip())
    stopped.start()
    assert stopped.ask("all", "PING") is True


def test_what_is_no_snapshot_is_refused_and_nothing_changes(stopped: Shipped) -> None:
    for junk in (b"", b"junk", b"REDIS0011"):
        ended = stopped.script("restore", input=junk)
        assert ended.returncode == 1
        assert b"redis.sh: this is not a snapshot of Redis; nothing has changed\n" in ended.stderr
    stopped.start()
    assert stopped.ask("all", "DBSIZE") == 0
    assert not (stopped.data / "before-restore").exists()


# --- the rights ---


async def refusal(store: Shipped, timeout: float) -> str:
    """Have the service do all that it does with Redis; return what the first answer that is not 200 tells, if there is one."""
    store.ask("all", "FLUSHALL")
    store.ask("all", "ZADD", ORDER, 1, "old")  # to be forgotten
    store.ask("all", "HSET", ANSWERS, "old", "x")
    password = store.root / "run/secrets/redis/hitcounter"
    environ = store.environ(REDIS_USERNAME="hitcounter", REDIS_PASSWORD_FILE=str(password), IDEMPOTENCY_KEYS="1")
    async with serving(SERVICE, {**environ, "REQUEST_TIMEOUT": str(timeout)}) as served:
        for method, path, headers in (
            ("GET", "/readyz", {}), ("GET", "/", {}), ("POST", "/", {}),
            *(("POST", "/", {"Idempotency-Key": key}) for key in ("a", "b", "b")),
        ):  # fmt: skip
            async with served.client.request(method, path, headers=headers) as answer:
                if answer.status != 200:
                    return str((await answer.json())["detail"])
        store.ask("all", "SCRIPT", "FLUSH")
        async with served.client.get("/") as answer:
            return "" if answer.status == 200 else str((await answer.json())["detail"])


async def test_service_can_do_all_with_the_rights_of_its_user(store: Shipped) -> None:
    assert await refusal(store, 10) == ""
    assert store.ask("all", "MGET", HITS, POSTS) == ["2", "3"]


@pytest.mark.parametrize("right", [right for right in RIGHTS if right.startswith(("+", "~"))])
async def test_service_can_spare_none_of_the_rights_of_its_user(
    store: Shipped, right: str, caplog: pytest.LogCaptureFixture
) -> None:
    store.ask("all", "ACL", "SETUSER", "hitcounter", "resetkeys", *(other for other in RIGHTS if other != right))
    told = "Redis fails: its user may not do this (NOPERM)"
    for timeout in (0.5, 5):  # a machine that is held up gets a second look
        assert await refusal(store, timeout)
        if told in caplog.messages:
            break
    assert told in caplog.messages


@pytest.mark.parametrize("user", ["hitcounter", "probe", "operator"])
def test_users_may_not_do_what_is_not_theirs(store: Shipped, user: str) -> None:
    commands: list[tuple[Any, ...]] = [
        ("KEYS", "*"), ("CONFIG", "GET", "maxmemory"), ("CLIENT", "LIST"), ("GET", "{other}:hits"), ("DEL", HITS), ("MONITOR",),
        ("SCRIPT", "FLUSH"), ("EVAL", "return 1", 0), ("PUBLISH", "channel", "x"), ("ACL", "SETUSER", "other", "+@all"),
        ("SHUTDOWN", "NOSAVE"), ("REPLICAOF", "NO", "ONE"), ("FLUSHALL",),
    ]  # fmt: skip
    with store.client(username="all", password="all's", **BARE) as bystander:
        bystander.ping()
        commands.append(("CLIENT", "KILL", "ID", bystander.client_id()))
        for command in commands:
            with pytest.raises(NoPermissionError):
                store.ask(user, *command)
        for command in commands:
            # The same, by who may: that ends Valkey, the connection, or needs a setting that is off.
            if command[0] not in ("SHUTDOWN", "MONITOR", "REPLICAOF", "ACL"):
                store.ask("all", *command)
