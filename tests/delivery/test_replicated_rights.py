"""The users of components/redis-replicated have enough rights for replication and failovers, with real servers and Sentinels."""

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import redis

from nanoservice.embedded import executable
from nanoservice.testing.valkey import Valkey, free_port
from nanoservice.testing.waiting import SLACK, wait_for
from tests.support import ROOT

COMPONENT = ROOT / "manifests" / "components" / "redis-replicated"
ALL = "user all on >all ~* &* +@all\n"  # the tests' own user
SERVERS = 3


def users(name: str) -> str:
    """Return the users of the component's file `name`, as an ACL file in which each user's password is the user's name."""
    lines = [line.split() for line in (COMPONENT / name).read_text().splitlines()]
    named = {words[1]: words[2:] for words in lines if words and words[0] == "user" and words[1] in ("replica", "sentinel")}
    return "user default off\n" + ALL + "".join(f"user {user} on >{user} {' '.join(rights)}\n" for user, rights in named.items())


class Store:
    """A primary, two replicas and three Sentinels, which connect to each other as the component's users."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.servers: list[Valkey] = []
        for number in range(SERVERS):
            data = folder / f"server-{number}"
            data.mkdir()
            (data / "users.acl").write_text(users("replicated.acl"))
            options = ["--aclfile", str(data / "users.acl"), "--primaryuser", "replica", "--primaryauth", "replica"]
            options += ["--repl-diskless-sync-delay", "0"]
            if self.servers:
                options += ["--replicaof", "127.0.0.1", str(self.servers[0].port)]
            server = Valkey(data, *options)
            stack.callback(server.kill)
            server.start()
            self.servers.append(server)
        self.sentinels = [self._sentinel(folder / f"sentinel-{number}", stack) for number in range(SERVERS)]

    def _sentinel(self, data: Path, stack: ExitStack) -> int:
        data.mkdir()
        port = free_port()
        (data / "users.acl").write_text(users("sentinel.acl"))
        lines = [
            f"port {port}", "bind 127.0.0.1", f"dir {data}", f"aclfile {data / 'users.acl'}",
            f"sentinel monitor primary 127.0.0.1 {self.servers[0].port} 2", "sentinel down-after-milliseconds primary 1000",
            "sentinel failover-timeout primary 3000", "sentinel parallel-syncs primary 2",
            "sentinel auth-user primary sentinel", "sentinel auth-pass primary sentinel",
            "sentinel sentinel-user sentinel", "sentinel sentinel-pass sentinel",
        ]  # fmt: skip
        (data / "sentinel.conf").write_text("\n".join(lines) + "\n")
        process = subprocess.Popen([executable(), str(data / "sentinel.conf"), "--sentinel"], stdout=subprocess.DEVNULL)
        stack.callback(process.wait)
        stack.callback(process.kill)
        return port

    def ask(self, port: int, *command: str) -> Any:
        """Send a command with all rights. Return the reply, or None if the server refuses the command or is down."""
        try:
            with redis.Redis(port=port, username="all", password="all", socket_timeout=2, decode_responses=True) as client:
                return client.execute_command(*command)
        except redis.RedisError:
            return None

    def primary(self) -> int | None:
        """Return the port of the primary that all Sentinels name and that is a primary, when it has two replicas."""
        named = {tuple(self.ask(port, "SENTINEL GET-MASTER-ADDR-BY-NAME", "primary") or ()) for port in self.sentinels}
        if len(named) != 1 or not (address := named.pop()):
            return None
        role = self.ask(int(address[1]), "ROLE")
        return int(address[1]) if role and role[0] == "master" and len(role[2]) == SERVERS - 1 else None

    def whole(self) -> bool:
        """Return whether each Sentinel knows both replicas and both other Sentinels, and whether no failover is under way."""
        states = [self.ask(port, "SENTINEL MASTER", "primary") for port in self.sentinels]
        known = [state and (int(state["num-slaves"]), int(state["num-other-sentinels"]), state["flags"]) for state in states]
        return known == [(SERVERS - 1, SERVERS - 1, "master")] * SERVERS

    def refused(self) -> set[tuple[str, str]]:
        """Return the user and the command, key or channel of each refusal."""
        ports = [server.port for server in self.servers] + self.sentinels
        return {(entry["username"], entry["object"]) for port in ports for entry in self.ask(port, "ACL LOG") or []}


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    monkeypatch.delenv("REDIS_SERVER", raising=False)  # The rights are those of the manifests' Valkey.
    with ExitStack() as stack:
        yield Store(tmp_path, stack)


def test_rights_are_enough_for_planned_failovers_and_for_the_loss_of_the_primary(store: Store) -> None:
    first = wait_for(store.primary, 30 * SLACK)
    wait_for(store.whole, 30 * SLACK)

    def successor() -> int | None:
        # Ask again: a Sentinel refuses a failover until it knows the state of a replica, and gives one up that takes too long.
        if (port := store.primary()) == first:
            store.ask(store.sentinels[0], "SENTINEL FAILOVER", "primary", "COORDINATED")
        return None if port == first else port

    second = wait_for(successor, 60 * SLACK)
    wait_for(store.whole, 30 * SLACK)
    (server,) = (server for server in store.servers if server.port == second)
    server.kill()
    wait_for(lambda: any((store.ask(one.port, "ROLE") or [""])[0] == "master" for one in store.servers), 30 * SLACK)
    server.start()
    wait_for(lambda: store.primary() not in (None, second), 60 * SLACK)
    assert store.refused() == set()
