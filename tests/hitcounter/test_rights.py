"""The user of the service in Redis has the rights that the service needs, and no others."""

from collections.abc import Iterator

import pytest

from hitcounter.app import SERVICE
from hitcounter.counter import _keys
from nanoservice.testing.served import serving
from tests.delivery.test_store import USERS, Shipped, empty, shipped
from tests.support import needs_linux

pytestmark = needs_linux("redis.sh runs only on Linux, in the image of Valkey")

HITS, POSTS, _, ANSWERS, ORDER = _keys("hitcounter", "")
RIGHTS = next(line.split()[2:] for line in USERS.splitlines() if line.startswith("user hitcounter "))


@pytest.fixture(scope="module")
def started() -> Iterator[Shipped]:
    """Start one Valkey for all tests of this module, as redis.sh starts it."""
    with shipped() as store:
        store.start()
        yield store


@pytest.fixture
def store(started: Shipped) -> Shipped:
    empty(started, "hitcounter", RIGHTS)
    return started


async def refusal(store: Shipped, timeout: float) -> str:
    """Make the service send every command that it can send to Redis.

    Return the `detail` of the first answer whose status is not 200, or an empty string if every status is 200.
    """
    store.ask("all", "FLUSHALL")
    store.ask("all", "ZADD", ORDER, 1, "old")  # IDEMPOTENCY_KEYS is 1, so the first new key replaces this key
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


async def test_rights_of_the_service_s_user_are_enough(store: Shipped) -> None:
    assert await refusal(store, 10) == ""
    assert store.ask("all", "MGET", HITS, POSTS) == ["2", "3"]


@pytest.mark.parametrize("right", [right for right in RIGHTS if right.startswith(("+", "~"))])
async def test_service_needs_each_right_of_its_user(store: Shipped, right: str, caplog: pytest.LogCaptureFixture) -> None:
    store.ask("all", "ACL", "SETUSER", "hitcounter", "resetkeys", *(other for other in RIGHTS if other != right))
    told = "Redis fails: its user may not do this (NOPERM)"
    for timeout in (0.5, 5):  # 0.5 s saves time, but may be too short on a busy machine
        assert await refusal(store, timeout)
        if told in caplog.messages:
            break
    assert told in caplog.messages
