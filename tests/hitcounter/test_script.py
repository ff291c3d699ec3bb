"""Test `count.lua` on a real Valkey: each case in its first comment, its keys, and its permissions."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
from redis import Redis
from redis.exceptions import ResponseError

from hitcounter.app import SERVICE
from hitcounter.counter import SCRIPT, _keys
from nanoservice.testing.served import serving
from nanoservice.testing.valkey import Valkey

DAY = 86400
COMMANDS = "get set expire incrby time hget hset hdel zadd zcard zrange zrem zscore".split()  # the commands of the script
RIGHTS = ["~{hitcounter}:*", "resetchannels", "-@all", "+evalsha", "+script|load", "+ping", *(f"+{name}" for name in COMMANDS)]

HITS, POSTS, WRITER, ANSWERS, ORDER = _keys("hitcounter", "w")


class Script:
    """Calls the script, and shows what it changed. Omits the sequence number and the total of all posts from replies."""

    all_posts = 0  # the total of all posts in the last reply

    def __init__(self, valkey: Valkey, **options: Any) -> None:
        self.client: Any = Redis(port=valkey.port, protocol=2, **options)
        self.sha: Any = self.client.script_load(SCRIPT)

    def __call__(
        self, sequence: int, hits: int = 0, posts: int = 0, *digests: str, writer: str = "w", keep: int = 100
    ) -> list[Any]:
        arguments = [sequence, hits, posts, keep, *digests]
        keys = _keys("hitcounter", writer)
        status, answered, *numbers = self.client.execute_command("EVALSHA", self.sha, 5, *keys, *arguments)
        assert answered == sequence
        if numbers:
            self.all_posts = numbers.pop(2)
        return [status, *numbers]

    def all(self) -> dict[bytes, bytes]:
        """Return everything that Redis holds."""
        return {key: self.client.dump(key) for key in sorted(self.client.keys())}

    def totals(self) -> tuple[int, int]:
        return int(self.client.get(HITS) or 0), int(self.client.get(POSTS) or 0)

    def age(self, seconds: int) -> None:
        """Make all remembered keys older by `seconds`."""
        for digest, score in self.client.zrange(ORDER, 0, -1, withscores=True):
            self.client.zadd(ORDER, {digest: score - seconds * 1000000})


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    server = Valkey(tmp_path_factory.mktemp("valkey"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def valkey(server: Valkey) -> Valkey:
    """Return an empty server. All tests of this file share one server, because the tests are many and short."""
    server.run("FLUSHALL")
    server.run("ACL", "DELUSER", "svc")
    return server


@pytest.fixture
def script(valkey: Valkey) -> Iterator[Script]:
    it = Script(valkey)
    yield it
    it.client.close()


def counted(hits: int, posts: int, *more: int) -> list[Any]:
    return [b"counted", hits, posts, *more]


def msgpack(*parts: int | str) -> bytes:
    """Return an array of small numbers and short texts in the format in which the script stores it."""
    return bytes([0x90 + len(parts)]) + b"".join(
        bytes([part]) if isinstance(part, int) else bytes([0xA0 + len(part)]) + part.encode() for part in parts
    )


# --- the cases a to d in the first comment of count.lua ---


def test_a_batch_sent_again_gets_its_first_reply_and_counts_nothing(script: Script) -> None:
    script(1, 1, 1)
    first = script(2, 3, 2, "a", "b")
    script(1, 10, 10, "c", writer="another")
    before = script.all()
    assert script(2, 3, 2, "a", "b") == first == counted(4, 3, 4, 4, 4, 5)
    assert script.all() == before


@pytest.mark.parametrize("late", [1, 2, 4])
def test_b_late_duplicate_of_an_older_batch_counts_nothing(script: Script, late: int) -> None:
    for sequence in range(1, 6):
        script(sequence, 3, 1)
    before = script.all()
    assert script(late, 3, 1, "a") == [b"late"]
    assert script.all() == before


@pytest.mark.parametrize("sequence", [2, 3, 1000])
def test_c_batch_of_an_unknown_writer_counts_nothing_unless_it_is_the_first(script: Script, sequence: int) -> None:
    script(1, 3, 1, "a", writer="another")
    before = script.all()
    assert script(sequence, 3, 1, "a", "b") == [b"unknown"]
    assert before.items() == script.all().items() - {(WRITER.encode(), script.client.dump(WRITER))}


def test_c_batch_whose_writer_was_forgotten_counts_nothing(script: Script) -> None:
    script(1, 3, 1)
    script(2, 3, 1)
    script.client.delete(WRITER)
    for sequence in (1000, 2, 3):
        assert script(sequence, 3, 1) == [b"unknown"]
    assert script.totals() == (6, 2)


def test_c_unknown_writer_never_counts_again_whatever_batches_of_it_still_arrive(script: Script) -> None:
    assert script(2, 3, 1) == [b"unknown"]
    for late in (1, 2, 3, 1):
        assert script(late, 3, 1) == [b"unknown"]
    assert script.totals() == (0, 0)
    assert DAY - 60 <= script.client.ttl(WRITER) <= DAY


def test_d_first_batch_of_a_writer_is_counted(script: Script) -> None:
    assert script(1, 3, 1) == counted(3, 1)
    assert script(1, 2, 0, writer="another") == counted(5, 1)


def test_d_residue_is_a_first_batch_that_comes_after_its_writer_was_forgotten(script: Script) -> None:
    script(1, 3, 1)
    script.client.delete(WRITER)  # Redis does this after a day without a batch
    assert script(1, 3, 1) == counted(6, 2)


def test_batches_of_one_writer_may_skip_numbers_that_were_given_up(script: Script) -> None:
    assert script(1, 1) == counted(1, 0)
    assert script(5, 1) == counted(2, 0)
    assert script(4, 1) == [b"late"]


# --- what the script keeps in Redis ---


def test_writer_is_remembered_for_a_day_from_each_batch(script: Script) -> None:
    for sequence in (1, 2):
        script(sequence, 1)
        assert DAY - 60 <= script.client.ttl(WRITER) <= DAY
        script.client.expire(WRITER, 100)


def test_answers_to_keys_are_remembered_for_a_day_from_the_last(script: Script) -> None:
    for sequence in (1, 2):
        script(sequence, 1, 0, f"key{sequence}")
        for key in (ANSWERS, ORDER):
            assert DAY - 60 <= script.client.ttl(key) <= DAY
            script.client.expire(key, 100)


def test_answers_to_keys_are_remembered_for_a_day_even_after_the_clock_was_set_back(script: Script) -> None:
    script(1, 0, 0, "a")
    script.age(-DAY)  # as if the clock had been set back by a day after the first key
    script(2, 0, 0, "b")
    for key in (ANSWERS, ORDER):
        assert 2 * DAY - 60 <= script.client.ttl(key) <= 2 * DAY


def test_newest_key_is_remembered_for_a_whole_day_after_the_clock_was_set_back_by_half_a_second(script: Script) -> None:
    script(1, 0, 0, "a")
    script.client.zadd(ORDER, {"a": int(script.client.zscore(ORDER, "a")) + 600000})
    script(2, 0, 0, "b")
    for key in (ANSWERS, ORDER):
        assert script.client.pttl(key) > DAY * 1000


def test_totals_never_expire(script: Script) -> None:
    script(1, 1, 1, "a")
    assert script.client.ttl(HITS) == script.client.ttl(POSTS) == -1


def test_hits_without_a_key_change_only_the_totals_and_the_writer(script: Script) -> None:
    script(1, 1, 1)
    assert set(script.all()) == {key.encode() for key in (HITS, POSTS, WRITER)}


def test_key_counts_once_in_a_batch_and_over_batches_and_writers(script: Script) -> None:
    assert script(1, 0, 2, "a", "b", "a") == counted(0, 2, 0, 3, 0, 4, 0, 3)
    assert script(2, 1, 0, "b", "c") == counted(1, 4, 0, 4, 1, 5)
    assert script(1, 5, 5, "c", "a", writer="another") == counted(6, 10, 1, 5, 0, 3)
    assert script.totals() == (6, 10)


def test_reply_has_the_total_of_all_posts_including_posts_with_a_key(script: Script) -> None:
    script(1, 0, 2, "a", "b", "a")
    assert script.all_posts == 4
    script(2, 0, 1, "a")
    assert script.all_posts == 5
    script(2, 0, 1, "a")
    assert script.all_posts == 5


@pytest.mark.parametrize("content", [msgpack(7, 8, 2), msgpack("x"), msgpack(1), b"x", b""])
def test_stored_answer_of_another_version_fails_only_its_own_post_and_stays(script: Script, content: bytes) -> None:
    script(1, 1, 1, "a", "b")
    script.client.hset(ANSWERS, "a", content)
    assert script(2, 1, 1, "b", "a", "c") == counted(2, 4, 1, 3, -1, -1, 2, 5)
    assert script.client.hget(ANSWERS, "a") == content


def test_stored_answer_without_a_version_is_read(script: Script) -> None:
    script(1, 0, 0, "a", "b")
    assert script.client.hget(ANSWERS, "a") == msgpack(0, 1, 1)
    script.client.hset(ANSWERS, "a", msgpack(0, 1))
    assert script(2, 0, 0, "a") == counted(0, 2, 0, 1)


def test_oldest_keys_are_forgotten_first_and_at_most_keep_are_remembered(script: Script) -> None:
    for sequence in range(1, 9):
        script(sequence, 0, 0, f"key{sequence}", keep=5)
        assert script.client.zcard(ORDER) == script.client.hlen(ANSWERS) == min(sequence, 5)
    assert script(9, 0, 0, *(f"key{number}" for number in range(4, 9)), keep=5) == counted(0, 8, 0, 4, 0, 5, 0, 6, 0, 7, 0, 8)
    assert script(10, 0, 0, "key3", keep=5) == counted(0, 8, 0, 9)


@pytest.mark.parametrize("back", [10, DAY, -10])
def test_order_of_the_keys_does_not_change_when_the_clock_is_set(script: Script, back: int) -> None:
    for sequence in range(1, 6):
        script(sequence, 0, 0, f"key{sequence}", keep=5)
    script.age(-back)  # as if the clock had been set back by `back` seconds
    for sequence in range(6, 9):
        assert script(sequence, 0, 0, "new", keep=5)[-1] == 6
    assert script(9, 0, 0, "newer", "newest", keep=5) == counted(0, 6, 0, 7, 0, 8)
    assert script.client.zrange(ORDER, 0, -1) == [b"key4", b"key5", b"new", b"newer", b"newest"]


def test_oldest_of_one_batch_are_forgotten_first(script: Script) -> None:
    script(1, 0, 0, *"abcdefg", keep=3)
    assert script.client.zrange(ORDER, 0, -1) == [b"e", b"f", b"g"]
    assert sorted(script.client.hkeys(ANSWERS)) == [b"e", b"f", b"g"]


def test_smaller_keep_is_reached_a_thousand_keys_at_a_time(script: Script) -> None:
    for sequence in range(1, 4):
        script(sequence, 0, 0, *(f"key{sequence}-{number}" for number in range(1000)), keep=10000)
    remembered = []
    for sequence in range(4, 8):
        script(sequence, 0, 0, f"key{sequence}", keep=100)
        remembered.append((script.client.zcard(ORDER), script.client.hlen(ANSWERS)))
    assert remembered == [(2001, 2001), (1002, 1002), (100, 100), (100, 100)]


def test_key_older_than_a_day_counts_again(script: Script) -> None:
    script(1, 0, 0, "a", "b")
    script.age(DAY - 60)
    assert script(2, 0, 0, "a") == counted(0, 2, 0, 1)
    script.age(61)
    assert script(3, 0, 0, "a") == counted(0, 2, 0, 3)
    assert script.client.zrange(ORDER, 0, -1) == script.client.hkeys(ANSWERS) == [b"a"]
    assert script(4, 0, 0, "a") == counted(0, 3, 0, 3)


def test_key_older_than_a_day_is_not_honoured_when_too_many_are_to_forget_at_once(script: Script) -> None:
    for sequence in range(1, 4):
        script(sequence, 0, 0, *(f"key{sequence}-{number}" for number in range(1000)), keep=10000)
    script.age(DAY + 1)
    assert script(4, 0, 0, "key3-999", keep=10000) == counted(0, 3000, 0, 3001)
    assert script.client.zcard(ORDER) == script.client.hlen(ANSWERS) == 2000
    assert script(5, 0, 0, "key3-999", keep=10000) == counted(0, 3001, 0, 3001)


def test_a_thousand_keys_in_one_batch_are_counted(script: Script) -> None:
    digests = [f"key{number}" for number in range(1000)]
    reply = script(1, 0, 0, *digests, keep=100000)
    assert reply[4::2] == list(range(1, 1001))
    script.age(DAY + 1)
    assert script(2, 0, 0, *digests, keep=100000)[4::2] == list(range(1001, 2001))


def test_large_totals_are_counted_exactly(script: Script) -> None:
    script.client.mset({HITS: 10**15 - 10, POSTS: 10**14})
    assert script(1, 2, 2, "a") == counted(10**15 - 8, 10**14 + 2, 10**15 - 8, 10**14 + 3)
    assert script(1, 2, 2, "a") == counted(10**15 - 8, 10**14 + 2, 10**15 - 8, 10**14 + 3)
    assert script.totals() == (10**15 - 8, 10**14 + 3)


# --- keys with unexpected content ---


def _spoil(client: Any, key: str, content: str) -> None:
    client.delete(key)
    if content == "another type":
        (client.set if key in (ANSWERS, ORDER) else client.rpush)(key, "x")
    elif key == ANSWERS:
        client.hset(key, "a", content)
    else:
        client.set(key, content)


@pytest.mark.parametrize(
    ("key", "content"),
    [
        *((key, "another type") for key in (HITS, POSTS, WRITER, ANSWERS, ORDER)),
        *((key, content) for key in (HITS, POSTS) for content in ("x", "1.5", "1e3", "0x10", " 1", "9223372036854775807")),
        (WRITER, "x"),
    ],
)
def test_key_that_holds_something_else_is_an_error_and_nothing_changes(script: Script, key: str, content: str) -> None:
    script(1, 1, 1, "a")
    _spoil(script.client, key, content)
    before = script.all()
    for _ in range(2):
        with pytest.raises(ResponseError):
            script(2, 1, 1, "b", "a")
        assert script.all() == before


# --- the permissions that the script needs ---


def exercise(script: Script) -> None:
    """Make the script run each of its commands."""
    script(1, 1, 1, "a", "b")
    script.client.ping()
    script(2, 1, 1, "a", keep=1)
    script(3, 1, 1, "a", "c", keep=1)


def make_user(valkey: Valkey, without: str = "") -> dict[str, str]:
    """Create a user with the permissions that the script needs, except `without`; return its credentials."""
    rights = [right for right in RIGHTS if right != without]
    assert len(rights) == len(RIGHTS) - bool(without)
    valkey.run("ACL", "SETUSER", "svc", "reset", "on", ">password", *rights)
    return {"username": "svc", "password": "password"}


def refused() -> "pytest.RaisesExc[ResponseError]":
    """Expect that Redis refuses a command, or a command of the script, for lack of a permission."""
    # The pattern has two messages; Redis 7.0 and older send the second.
    return pytest.raises(ResponseError, match=r"(?i)permission|The user executing the script can't run this command")


def make_old(valkey: Valkey) -> None:
    """Store an Idempotency-Key in Redis; the key is old enough to be forgotten."""
    valkey.run("ZADD", ORDER, 1, "old")
    valkey.run("HSET", ANSWERS, "old", "x")


def test_user_with_the_least_rights_can_run_the_whole_script(valkey: Valkey) -> None:
    make_old(valkey)
    script = Script(valkey, **make_user(valkey))
    exercise(script)
    assert script.totals() == (3, 7)
    script.client.close()


async def test_service_works_as_the_user_with_the_least_rights(valkey: Valkey) -> None:
    make_old(valkey)
    make_user(valkey)
    async with serving(SERVICE, valkey.environ(REDIS_USERNAME="svc", REDIS_PASSWORD="password", IDEMPOTENCY_KEYS="1")) as served:
        for method, path, headers in (
            ("GET", "/readyz", {}), ("GET", "/", {}), ("POST", "/", {}),
            *(("POST", "/", {"Idempotency-Key": key}) for key in ("a", "b", "b")),
        ):  # fmt: skip
            async with served.client.request(method, path, headers=headers) as answer:
                assert answer.status == 200
        assert valkey.run("MGET", HITS, POSTS) == ["1", "3"]
        valkey.run("SCRIPT", "FLUSH")
        async with served.client.get("/") as answer:
            assert answer.status == 200


@pytest.mark.parametrize("right", [right for right in RIGHTS if right.startswith(("+", "~"))])
def test_each_of_the_rights_is_needed(valkey: Valkey, right: str) -> None:
    make_old(valkey)
    user = make_user(valkey, without=right)
    with refused():
        exercise(Script(valkey, **user))


@pytest.mark.parametrize("command", COMMANDS)
def test_batch_that_fails_for_lack_of_a_right_counts_at_most_once_however_often_it_is_sent(valkey: Valkey, command: str) -> None:
    make_old(valkey)
    script = Script(valkey)
    script(1, 1, 1, "a")
    limited = Script(valkey, **make_user(valkey, without=f"+{command}"))

    def send(by: Script) -> list[Any]:
        return by(1, 1, 1, "a", "b", writer="another", keep=1)

    with refused():
        send(limited)
    for _ in range(3):
        with contextlib.suppress(ResponseError):
            assert send(limited)[0] != b"counted"
    before = script.totals()
    assert before in ((1, 2), (2, 3), (2, 4))
    # The script would never forget a digest that is only in the hash.
    assert set(script.client.hkeys(ANSWERS)) <= set(script.client.zrange(ORDER, 0, -1))
    reply = send(script)
    assert script.totals() == ((2, 4) if reply[0] == b"counted" else before)
    script.client.close()
    limited.client.close()


def test_command_outside_the_rights_is_refused(valkey: Valkey) -> None:
    user = make_user(valkey)
    client: Any = Redis(port=valkey.port, protocol=2, username=user["username"], password=user["password"])
    for command in (
        ("FLUSHALL",), ("KEYS", "*"), ("DEL", HITS), ("CONFIG", "GET", "*"), ("SCRIPT", "FLUSH"), ("EVAL", "return 1", 0),
        ("CLIENT", "KILL", "ID", "1"), ("GET", "another"), ("PUBLISH", "channel", "x"), ("SUBSCRIBE", "channel"),
    ):  # fmt: skip
        with refused():
            client.execute_command(*command)
    client.close()
