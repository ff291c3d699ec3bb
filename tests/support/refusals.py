"""Make Redis refuse to work while it still answers, in several ways."""

from collections.abc import Callable
from typing import Any

import pytest

from nanoservice.testing.valkey import Valkey
from nanoservice.testing.waiting import wait_for

Act = Callable[[Valkey], object]


def refusals(command: str) -> list[Any]:
    """Return parameters for a test, one for each kind of refusal.

    A parameter has a function that makes Redis refuse `command`, a function that ends the refusal, and the cause in the log.
    """
    return [
        pytest.param(
            lambda valkey: valkey.run("REPLICAOF", "127.0.0.1", "1"),
            lambda valkey: valkey.run("REPLICAOF", "NO", "ONE"),
            "read-only replica",
            id="read-only",
        ),
        pytest.param(
            lambda valkey: valkey.run("CONFIG", "SET", "maxmemory", "1"),
            lambda valkey: valkey.run("CONFIG", "SET", "maxmemory", "0"),
            "out of memory",
            id="out of memory",
        ),
        pytest.param(lambda valkey: _fail_to_save(valkey), lambda valkey: _save(valkey), "refuses writes", id="MISCONF"),
        pytest.param(
            lambda valkey: valkey.run("ACL", "SETUSER", "default", f"-{command}"),
            lambda valkey: valkey.run("ACL", "SETUSER", "default", f"+{command}"),
            "NOPERM",
            id="no permission",
        ),
        pytest.param(
            lambda valkey: valkey.run("CONFIG", "SET", "min-replicas-to-write", "1"),
            lambda valkey: valkey.run("CONFIG", "SET", "min-replicas-to-write", "0"),
            "too few replicas",
            id="too few replicas",
        ),
    ]


def _fail_to_save(valkey: Valkey) -> None:
    """Make a snapshot fail, by a folder that has the name of the snapshot's file. Valkey then refuses writes."""
    (valkey.data / "dump.rdb" / "x").mkdir(parents=True)
    valkey.run("CONFIG", "SET", "save", "1 1000000")
    valkey.run("CONFIG", "SET", "stop-writes-on-bgsave-error", "yes")
    valkey.run("BGSAVE")
    wait_for(lambda: _last_save(valkey) == "err", 10)


def _save(valkey: Valkey) -> None:
    (valkey.data / "dump.rdb" / "x").rmdir()
    (valkey.data / "dump.rdb").rmdir()
    valkey.run("BGSAVE")
    wait_for(lambda: _last_save(valkey) == "ok", 10)


def _last_save(valkey: Valkey) -> str:
    with valkey.client() as client:
        return str(client.info("persistence")["rdb_last_bgsave_status"])
