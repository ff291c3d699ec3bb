"""The files in manifests/redis work with a real Valkey: the script, the settings, and the users with their rights."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, BusyLoadingError, NoPermissionError
from redis.retry import Retry

from nanoservice.embedded import executable
from nanoservice.errors import ConfigError
from nanoservice.testing.served import serving
from nanoservice.testing.valkey import Valkey, free_port
from nanoservice.testing.waiting import SLACK, wait_for
from tests.support import ROOT, needs_linux
from tests.support.services import names, services

pytestmark = needs_linux("redis.sh runs only on Linux, in the image of Valkey")

SOURCES = ROOT / "manifests" / "redis"
USERS = (SOURCES / "users.acl").read_text()
# With these options the driver sends only the test's commands, so a user needs no rights for the driver's own commands.
BARE: dict[str, Any] = {
    "protocol": 2,
    "driver_info": None,
    "retry": Retry(NoBackoff(), 0),
}
NAME = names()[0]
HITS = f"{{{NAME}}}:hits"
RIGHTS = next(line.split()[2:] for line in USERS.splitlines() if line.startswith(f"user {NAME} "))


# The container has these two programs of Linux, and macOS has not. Then the tests use these in their place.
LINUX = {
    "sha256sum": "import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest(), ' -')",
    "flock": "import fcntl, sys; fcntl.flock(int(sys.argv[2]), fcntl.LOCK_EX | fcntl.LOCK_NB)",  # flock -n NUMBER
}


class Shipped(Valkey):
    """A Valkey that redis.sh starts. The folder `root` has the files of the container."""

    def __init__(self, root: Path) -> None:
        super().__init__(root / "data")
        self.root = root
        for folder in ("etc/redis", "run/secrets/redis", "run/valkey", "data", "tmp", "bin"):
            (root / folder).mkdir(parents=True)
        for name in ("redis.sh", "users.acl", "valkey.conf"):
            text = (SOURCES / name).read_text()
            (root / "etc/redis" / name).write_text(re.sub(r"(?<![\w/])/(etc|run|data|tmp)\b", rf"{root}\g<0>", text))
        for name in ("valkey-server", "valkey-check-rdb"):  # both are the same program, which behaves according to its name
            (root / "bin" / name).symlink_to(executable())
        for name in {name for name in LINUX if not shutil.which(name)}:
            (root / "bin" / name).write_text(f"#!{sys.executable}\n{LINUX[name]}\n")
            (root / "bin" / name).chmod(0o755)
        with open(root / "etc/redis/users.acl", "a") as file:
            file.write("user all resetchannels ~* &* +@all\n")  # this user may run every command
        for name in ("probe", "operator", *names(), "all"):
            self.set_passwords(name, f"{name}'s\n")

    def set_passwords(self, name: str, lines: str) -> None:
        (self.root / "run/secrets/redis" / name).write_text(lines)

    def script(self, *arguments: str, input: bytes = b"") -> "subprocess.CompletedProcess[bytes]":
        """Run a command of redis.sh, and return its result."""
        return subprocess.run([*self.command, *arguments], env=self.path, input=input, capture_output=True, timeout=30)

    @property
    def command(self) -> list[str]:
        return ["sh", str(self.root / "etc/redis/redis.sh")]

    @property
    def path(self) -> dict[str, str]:
        return {"PATH": f"{self.root / 'bin'}:{os.environ['PATH']}"}

    def start(self, *options: str) -> None:
        self.begin(*options)
        self.wait()

    def begin(self, *options: str) -> None:
        """Start Valkey with redis.sh, and return before Valkey accepts commands."""
        command = [*self.command, "start", "--port", str(self.port), "--bind", "127.0.0.1", *options]
        self.process = subprocess.Popen(command, env=self.path, stdout=subprocess.DEVNULL)

    def wait(self) -> None:
        """Wait until Valkey has loaded its data and answers commands."""
        process = self.process
        assert process

        def answers() -> bool:
            assert process.poll() is None, "Valkey exited: see its output"
            with contextlib.suppress(BusyLoadingError):  # Valkey already authenticates clients while it loads its data
                return self.answers() and bool(self.ask("all", "PING"))
            return False

        wait_for(answers, 10 * SLACK, "Valkey answers")

    def ask(self, user: str, *command: Any, password: str = "") -> Any:
        """Send a command to Valkey as `user`, and return Valkey's answer."""
        with self.client(username=user, password=password or f"{user}'s", **BARE) as client:
            return client.execute_command(*command)


@contextlib.contextmanager
def shipped() -> Iterator[Shipped]:
    # Use a short path: the path of a Unix socket has at most 108 bytes, and pytest's tmp_path may be longer.
    with tempfile.TemporaryDirectory(prefix="redis-") as folder:
        store = Shipped(Path(folder))
        try:
            yield store
        finally:
            store.end(signal.SIGKILL)


def empty(store: Shipped, user: str, rights: list[str]) -> None:
    """Delete all keys and scripts, and give `user` its rights again."""
    store.ask("all", "FLUSHALL")
    store.ask("all", "SCRIPT", "FLUSH")
    store.ask("all", "ACL", "SETUSER", user, "resetkeys", *rights)


@pytest.fixture
def stopped() -> Iterator[Shipped]:
    """Yield a Valkey that has not been started."""
    with shipped() as store:
        yield store


@pytest.fixture(scope="module")
def started() -> Iterator[Shipped]:
    """Start one Valkey for all the tests that neither restart Valkey nor change its files."""
    with shipped() as store:
        store.start()
        yield store


@pytest.fixture
def store(started: Shipped) -> Shipped:
    empty(started, NAME, RIGHTS)
    return started


# --- the script ---


def test_settings_are_those_that_are_shipped(store: Shipped) -> None:
    found = store.ask("all", "CONFIG", "GET", "append*", "maxmemory*", "save", "protected-mode", "unixsocket")
    found = dict(zip(found[::2], found[1::2], strict=True))
    assert (found["appendonly"], found["appendfsync"], found["save"]) == ("yes", "always", "")
    assert (found["maxmemory"], found["maxmemory-policy"]) == (str(64 << 20), "noeviction")
    assert found["unixsocket"] == str(store.root / "run/valkey/socket")


def test_no_user_connects_without_a_password(store: Shipped) -> None:
    for name in ("default", "probe", "operator", NAME):
        with store.client(**BARE) as client:
            for password in ("", "wrong", "all's"):
                with pytest.raises(AuthenticationError):
                    client.execute_command("AUTH", name, password)
            with pytest.raises(AuthenticationError):
                client.ping()
    assert store.ask("probe", "PING") is True


def test_missing_password_is_reported(stopped: Shipped) -> None:
    stopped.set_passwords("operator", "")
    ended = stopped.script("start")
    assert (ended.returncode, ended.stdout) == (1, b"")
    assert ended.stderr == b"redis.sh: the secret redis-users has no password for operator; run: make secret\n"


def test_each_line_of_passwords_is_valid(stopped: Shipped) -> None:
    stopped.set_passwords(NAME, "new\nold\n")
    stopped.start()
    for password in ("new", "old"):
        assert stopped.ask(NAME, "PING", password=password) is True


def test_password_without_a_newline_is_valid(stopped: Shipped) -> None:
    # Most tools write a password into a secret without a newline.
    stopped.set_passwords(NAME, "only")
    stopped.start()
    assert stopped.ask(NAME, "PING", password="only") is True


def test_byte_order_mark_and_carriage_returns_are_not_part_of_a_password(stopped: Shipped) -> None:
    for name in (NAME, "operator"):
        stopped.set_passwords(name, "\ufeffnew\r\nold\r\n\r\n")
    stopped.start()
    for password in ("new", "old"):
        assert stopped.ask(NAME, "PING", password=password) is True
    with stopped.client(**BARE) as client, pytest.raises(AuthenticationError):
        client.execute_command("AUTH", NAME, "")
    # redis.sh must also strip the operator's password, with which it logs in. The fake valkey-cli prints the password it gets.
    client_program = stopped.root / "bin/valkey-cli"
    client_program.write_text('#!/bin/sh\nprintf "<%s>" "$REDISCLI_AUTH"\n')
    client_program.chmod(0o755)
    assert b"<old>" in stopped.script("load-users").stderr


def test_empty_line_is_not_a_valid_password(stopped: Shipped) -> None:
    stopped.set_passwords(NAME, "only\n\n")
    stopped.start()
    assert stopped.ask(NAME, "PING", password="only") is True
    with stopped.client(**BARE) as client, pytest.raises(AuthenticationError):
        client.execute_command("AUTH", NAME, "")


@pytest.mark.parametrize(
    "content",
    [
        "first", "first\n", "first\r\n", "first\r\r\n", "\ufefffirst\r\n", "\ufeff\r\nfirst\r\n", "\n\nfirst\nold\n",
        " first \n", "caf\u00e9\n", "first\u2028\x0c\x85\n", "fi\rrst\n", "first\ufeff\n", "\n\ufefffirst\n",
    ],
)  # fmt: skip
async def test_service_and_valkey_read_the_same_password_from_a_file(stopped: Shipped, content: str) -> None:
    file = stopped.root / "run/secrets/redis" / NAME
    file.write_bytes(content.encode())
    stopped.start()
    async with serving(services()[NAME], stopped.environ(REDIS_USERNAME=NAME, REDIS_PASSWORD_FILE=str(file))) as served:
        async with served.client.get("/readyz") as answer:
            assert answer.status == 200


@pytest.mark.parametrize("content", ["", "\n", "\ufeff", "\r\n\r\n", "\ufeff\r\n"])
def test_file_without_a_password_is_refused_by_valkey_and_by_the_service(stopped: Shipped, content: str) -> None:
    file = stopped.root / "run/secrets/redis" / NAME
    file.write_bytes(content.encode())
    ended = stopped.script("start")
    assert (ended.returncode, ended.stdout) == (1, b"")
    assert ended.stderr.decode() == f"redis.sh: the secret redis-users has no password for {NAME}; run: make secret\n"
    with pytest.raises(ConfigError) as refused:
        services()[NAME].config.read(stopped.environ(REDIS_USERNAME=NAME, REDIS_PASSWORD_FILE=str(file)))
    assert refused.value.problems == ["REDIS_PASSWORD_FILE must be the path of a file in UTF-8 with a password in it"]


def test_second_valkey_on_the_same_data_waits_until_the_first_has_exited(stopped: Shipped) -> None:
    """If a pod is deleted by force, the pod's Valkey may still run when the next pod starts another Valkey."""
    stopped.start()
    users = stopped.root / "run/valkey/users.acl"
    stopped.ask("all", "SET", "a", "1")
    users.unlink()  # redis.sh writes this file again only when it has the lock of the data
    first, stopped.port = stopped.process, free_port()
    assert first
    try:
        stopped.begin()
        second = stopped.process
        assert second
        children = Path(f"/proc/{second.pid}/task/{second.pid}/children")

        def waits() -> bool:
            with contextlib.suppress(OSError):  # a child may exit before its file is read
                return "sleep" in [Path(f"/proc/{child}/comm").read_text().strip() for child in children.read_text().split()]
            return False

        wait_for(waits, 10 * SLACK, "the second Valkey waits")
        assert not users.exists()
    finally:
        first.kill()
        first.wait()
    stopped.wait()
    assert stopped.ask("all", "GET", "a") == "1"


@pytest.mark.parametrize("arguments", [[], ["no-such"]], ids=["no command", "unknown command"])
def test_unknown_command_is_answered_with_the_usage(arguments: list[str]) -> None:
    ended = subprocess.run(["sh", SOURCES / "redis.sh", *arguments], text=True, capture_output=True)
    assert (ended.returncode, ended.stdout) == (64, "")
    assert "Usage: sh /etc/redis/redis.sh COMMAND" in ended.stderr


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


def test_next_start_loads_the_restored_snapshot_and_keeps_the_old_data(stopped: Shipped) -> None:
    stopped.start()
    stopped.ask("all", "SET", HITS, "7")
    stopped.ask("all", "SAVE")
    snapshot = (stopped.data / "dump.rdb").read_bytes()
    stopped.ask("all", "SET", HITS, "8")
    assert stopped.script("restore", input=snapshot).returncode == 0
    assert stopped.ask("all", "GET", HITS) == "8"
    for count in ("7", "9"):  # the first start loads the restored 7; the second start loads the 9 that was set after it
        stopped.kill()
        stopped.start()
        assert stopped.ask("all", "GET", HITS) == count
        stopped.ask("all", "SET", HITS, "9")
    stopped.kill()
    (stopped.data / "appendonlydir").rename(stopped.data / "unwanted")
    (stopped.data / "before-restore").rename(stopped.data / "appendonlydir")
    stopped.start()
    assert stopped.ask("all", "GET", HITS) == "8"


def test_interrupted_restore_is_not_completed_by_a_later_start(stopped: Shipped) -> None:
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


def test_users_file_may_have_comments_and_no_newline_at_its_end(stopped: Shipped) -> None:
    users = stopped.root / "etc/redis/users.acl"
    users.write_text("# Who may do what\n\n" + users.read_text().rstrip())
    stopped.start()
    assert stopped.ask("all", "PING") is True


def test_input_that_is_not_a_snapshot_is_refused_and_nothing_changes(stopped: Shipped) -> None:
    for junk in (b"", b"junk", b"REDIS0011"):
        ended = stopped.script("restore", input=junk)
        assert ended.returncode == 1
        assert b"redis.sh: this is not a snapshot of Redis; nothing has changed\n" in ended.stderr
    stopped.start()
    assert stopped.ask("all", "DBSIZE") == 0
    assert not (stopped.data / "before-restore").exists()


# --- the rights ---


@pytest.mark.parametrize("user", [NAME, "probe", "operator"])
def test_users_may_not_do_more_than_they_need(store: Shipped, user: str) -> None:
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
            # The control: a user with all rights may run the same command. Leave out the commands that stop Valkey, close the
            # connection, or need a setting that is off.
            if command[0] not in ("SHUTDOWN", "MONITOR", "REPLICAOF", "ACL"):
                store.ask("all", *command)
