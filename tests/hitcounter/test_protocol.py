"""Test a model of the protocol between lanes and the script, with the worst possible network and Redis.

The lanes of the model use `WriterState`, which decides in production too. The script is `count.lua` on a real Valkey.
The network between lanes and script loses, delays, repeats and reorders messages. In a failover, Redis loses all writes that its
replica does not have.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from hashlib import sha1
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from redis import Redis
from redis.exceptions import NoScriptError, ResponseError

from hitcounter.counter import SCRIPT, Verdict, WriterState, _keys
from nanoservice.health import TooFewReplicasError
from nanoservice.testing.valkey import Valkey

LANES = 3
KEYS = [b"a", b"b", b"c"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Yield a client of a Valkey that does not fsync, because no test of this file crashes Valkey."""
    server = Valkey(tmp_path_factory.mktemp("valkey"), "--appendfsync", "no")
    server.start()
    client = Redis(port=server.port, protocol=2)
    yield client
    client.close()
    server.kill()


def call(store: Any, keys: tuple[str, ...], *arguments: Any, script: str = SCRIPT) -> list[Any]:
    """Call the script as a lane calls it, and return the reply."""
    digest = sha1(script.encode(), usedforsecurity=False).hexdigest()
    try:
        reply: list[Any] = store.evalsha(digest, len(keys), *keys, *arguments)
    except NoScriptError:
        store.script_load(script)
        reply = store.evalsha(digest, len(keys), *keys, *arguments)
    return reply


def number_of_changes(store: Any) -> int:
    """Return the number of changes that Redis has made. An EXPIRE is a change, too."""
    return int(store.info("persistence")["rdb_changes_since_last_save"])


# --- random sequences of all events ---


@dataclass(eq=False)
class Batch:
    """Hits and posts that a lane has to count, and what happened to the batch."""

    hits: int
    posts: int
    keys: list[bytes]
    counted: list[tuple[int, int]] = field(default_factory=list)  # the totals after each time that the batch was counted
    reply: list[Any] | None = None  # the reply from which the requests of the batch were answered


@dataclass(eq=False)
class Message:
    """One transmission of a batch; the transmission may arrive several times."""

    batch: Batch
    writer: str
    sequence: int


@dataclass(eq=False)
class Lane:
    """A lane in the model: whether it has a batch, has sent it over an open connection, and has a reply."""

    writer: WriterState
    batch: Batch | None = None
    sent: Message | None = None
    reply: list[Any] | ResponseError | None = None
    needs: int = 0  # the last write of this reply's connection; WAIT waits until a replica has it

    def settled(self) -> None:
        self.batch = self.sent = self.reply = None


lanes = st.integers(0, LANES - 1)
recent = st.integers(0, 30)  # the age of a message: 0 is the newest


@dataclass
class Snapshot:
    """The data of Redis after a write, and what the model knows about it."""

    values: dict[bytes, bytes]
    counted: dict[Batch, list[tuple[int, int]]]
    answers: dict[bytes, tuple[int, int]]
    totals: tuple[int, int]


class Protocol(RuleBasedStateMachine):
    """A model with lanes, a network and Redis. With `failover`, Redis has a replica; with `wait`, lanes wait for the replica."""

    def __init__(self, store: Any, *, failover: bool = False, wait: bool = False, script: str = SCRIPT) -> None:
        super().__init__()
        self.store = store
        self.failover, self.wait, self.script = failover, wait, script
        self.name = "model"
        store.flushall()
        self.written = 0  # the number of the last write
        self.lanes = [Lane(WriterState()) for _ in range(LANES)]
        self.batches: list[Batch] = []
        self.messages: list[Message] = []  # all messages that may still arrive, or arrive again
        self.answers: dict[bytes, tuple[int, int]] = {}  # the answer to each Idempotency-Key
        self.totals = 0, 0  # the hits and posts in Redis
        self.tail = [self.snapshot()]  # first the data of the replica, then the data after each write that it does not have

    def snapshot(self) -> Snapshot:
        values = {key: self.store.dump(key) for key in self.store.keys()} if self.failover else {}
        return Snapshot(values, {one: list(one.counted) for one in self.batches}, dict(self.answers), self.totals)

    def record_write(self) -> None:
        self.written += 1
        self.tail.append(self.snapshot())

    def read_totals(self) -> tuple[int, int]:
        hits, posts = self.store.mget(_keys(self.name, "")[:2])
        return int(hits or 0), int(posts or 0)

    def send(self, lane: Lane) -> None:
        assert lane.batch
        lane.sent, lane.reply = Message(lane.batch, lane.writer.name, lane.writer.sequence), None
        self.messages.append(lane.sent)

    # --- a lane ---

    @rule(number=lanes, hits=st.integers(1, 3), posts=st.integers(0, 2), keys=st.lists(st.sampled_from(KEYS), max_size=3))
    def send_or_send_again(self, number: int, hits: int, posts: int, keys: list[bytes]) -> None:
        """A lane sends its batch. A lane without a batch begins one first; a lane that waits for a reply stops waiting first."""
        lane = self.lanes[number]
        if lane.sent:
            lane.writer.failed(TimeoutError(), sent=True)
        elif not lane.batch:
            lane.batch = Batch(hits, posts, keys)
            self.batches.append(lane.batch)
            lane.writer.begin()
        self.send(lane)

    # Faults share one rule, so that most examples consist of batches that are sent, delivered and answered.
    @precondition(lambda self: self.messages)
    @rule(fault=st.sampled_from(["fail", "give_up", "crash", "restart", "forget", "fail_over"]), number=lanes, ago=recent)
    def fault(self, fault: str, number: int, ago: int) -> None:
        """Something breaks."""
        if fault in ("fail", "give_up", "crash"):
            getattr(self, fault)(number)
        elif fault == "forget":
            self.forget(ago)
        elif fault == "restart" or not self.failover:
            self.restart()
        else:
            self.fail_over()

    def fail(self, number: int) -> None:
        """A lane loses its connection, or fails to connect."""
        lane = self.lanes[number]
        if lane.batch:
            lane.writer.failed(ConnectionError(), sent=lane.sent is not None)
            lane.sent = lane.reply = None

    def give_up(self, number: int) -> None:
        """The deadline of a lane's batch passes."""
        self.fail(number)
        self.lanes[number].settled()

    def crash(self, number: int) -> None:
        """The process of a lane crashes, and a new process replaces it."""
        self.lanes[number] = Lane(WriterState())

    @precondition(lambda self: any(lane.reply is not None for lane in self.lanes))
    @rule(number=lanes)
    def receive(self, number: int) -> None:
        """A lane receives the reply to its message."""
        ready = [lane for lane in self.lanes if lane.reply is not None]
        lane = ready[number % len(ready)]
        if isinstance(lane.reply, ResponseError):
            lane.writer.failed(lane.reply, sent=True)
            lane.sent = lane.reply = None
        elif lane.reply is not None:
            assert lane.batch
            if self.wait and lane.reply[0] == b"counted":
                lane.writer.doubt()
                if lane.needs > self.written - len(self.tail) + 1:
                    lane.writer.failed(TooFewReplicasError(), sent=True)
                    lane.sent = lane.reply = None
                    return
            verdict = lane.writer.replied(lane.reply)
            if verdict is Verdict.AGAIN:
                self.send(lane)
                return
            if verdict is Verdict.COUNTED:
                lane.batch.reply = lane.reply
            lane.settled()

    # --- Redis ---

    @precondition(lambda self: self.messages)
    @rule(ago=recent, lack=st.sampled_from(["", "", "", "", "memory", "incrby", "expire"]))
    def deliver(self, ago: int, lack: str) -> None:
        """A message reaches Redis, perhaps not for the first time. The lane gets the reply if it still waits for one.

        `lack` is what Redis lacks meanwhile: memory, or the lane's right to a command. Without the right, the script fails
        half-way.
        """
        message = self.messages[-1 - ago % len(self.messages)]
        batch, before, changes = message.batch, self.totals, number_of_changes(self.store)
        reply: list[Any] | ResponseError
        if lack == "memory":
            self.store.config_set("maxmemory", 1)
        elif lack:
            self.store.execute_command("ACL", "SETUSER", "default", f"-{lack}")
        try:
            keys = _keys(self.name, message.writer)
            arguments = message.sequence, batch.hits, batch.posts, 1000, *batch.keys
            reply = call(self.store, keys, *arguments, script=self.script)
        except ResponseError as error:
            assert lack
            reply = error
        if lack == "memory":
            self.store.config_set("maxmemory", 0)
        elif lack:
            self.store.execute_command("ACL", "SETUSER", "default", f"+{lack}")
        after = self.totals = self.read_totals()
        if before != after and isinstance(reply, ResponseError):
            # The script has counted the batch and then failed, so no reply will have the batch's numbers.
            assert lack == "expire"
            hits, posts = before[0] + batch.hits, before[1] + batch.posts
            for number, key in enumerate((key for key in dict.fromkeys(batch.keys) if key not in self.answers), posts + 1):
                self.answers[key] = hits, number
            batch.counted.append((hits, posts))
        elif before != after:
            assert isinstance(reply, list)
            status, sequence, hits, posts, all_posts, *answers = reply
            assert (status, sequence, all_posts) == (b"counted", message.sequence, after[1])
            batch.counted.append((hits, posts))
            new = set(batch.keys) - self.answers.keys()
            assert (hits, posts) == (before[0] + batch.hits, before[1] + batch.posts)
            assert after == (hits, posts + len(new))
            for key, *answer in zip(batch.keys, answers[::2], answers[1::2], strict=True):
                assert self.answers.setdefault(key, (answer[0], answer[1])) == tuple(answer)
        wrote = number_of_changes(self.store) != changes
        if wrote:
            self.record_write()
        for lane in self.lanes:
            if lane.sent is message and lane.reply is None:
                lane.reply, lane.needs = reply, self.written if wrote else 0

    @precondition(lambda self: len(self.tail) > 1)
    @rule(writes=st.integers(1, 4))
    def replicate(self, writes: int) -> None:
        """The replica gets some writes."""
        self.tail = self.tail[min(writes, len(self.tail) - 1) :]

    def fail_over(self) -> None:
        """The replica takes the place of the primary: the writes that it does not have, and all connections, are lost."""
        self.written -= len(self.tail) - 1
        self.tail = self.tail[:1]
        [kept] = self.tail
        self.store.flushall()
        for key, value in kept.values.items():
            self.store.restore(key, 0, value)
        for batch in self.batches:
            batch.counted = list(kept.counted.get(batch, []))
        self.answers, self.totals = dict(kept.answers), kept.totals
        self.messages = []  # What is under way to the old primary does not reach the new one.
        self.restart()

    def restart(self) -> None:
        """Redis restarts: the script and every connection are lost."""
        self.store.script_flush()
        for number in range(LANES):
            self.fail(number)

    def forget(self, ago: int) -> None:
        """Redis forgets a writer.

        Redis does this a day after the last batch of the writer. By then the first batch of this writer is no longer on its way;
        otherwise that batch could be counted again, as `count.lua` says.
        """
        writer = self.messages[-1 - ago % len(self.messages)].writer
        if not any(lane.batch and lane.writer.name == writer and lane.writer.sequence == 1 for lane in self.lanes):
            self.messages = [message for message in self.messages if (message.writer, message.sequence) != (writer, 1)]
            key = _keys(self.name, writer)[2]
            self.store.delete(key)
            for snapshot in self.tail:  # The key has the same age in the replica.
                snapshot.values.pop(key.encode(), None)

    # --- invariants ---

    @invariant()
    def each_batch_is_counted_once_at_most(self) -> None:
        assert all(len(batch.counted) <= 1 for batch in self.batches)

    @invariant()
    def each_answered_batch_is_counted_once_with_the_numbers_answered(self) -> None:
        for batch in self.batches:
            if batch.reply:
                assert batch.counted == [tuple(batch.reply[2:4])]
                answers = zip(batch.reply[5::2], batch.reply[6::2], strict=True)
                assert list(answers) == [self.answers[key] for key in batch.keys]

    @invariant()
    def each_number_is_given_to_one_request_and_is_not_ahead_of_the_store(self) -> None:
        hits: list[int] = []
        posts = [number for _, number in self.answers.values()]
        for batch in self.batches:
            if batch.reply:
                hits += range(batch.reply[2] - batch.hits + 1, batch.reply[2] + 1)
                posts += range(batch.reply[3] - batch.posts + 1, batch.reply[3] + 1)
        assert len(set(hits)) == len(hits)
        assert len(set(posts)) == len(posts)
        total_hits, total_posts = self.totals
        assert max(hits, default=0) <= total_hits
        assert max(posts, default=0) <= total_posts


def run(store: Any, **options: Any) -> None:
    """Fail if the model finds an order of events that violates an invariant."""
    run_state_machine_as_test(
        lambda: Protocol(store, **options),  # type: ignore[arg-type] # the function accepts any factory
        settings=settings(
            max_examples=100,
            stateful_step_count=30,
            deadline=None,
            derandomize=True,
            database=None,
            report_multiple_bugs=False,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.parametrize("failover", [False, True], ids=["one server", "failover"])
def test_no_order_of_events_counts_a_batch_twice_or_answers_one_that_is_not_counted(store: Any, failover: bool) -> None:
    run(store, failover=failover, wait=failover)


# --- all states that a few batches of one lane can reach ---


@dataclass(frozen=True)
class Sent:
    """One transmission of a batch, and how often it arrived."""

    batch: int
    writer: int
    sequence: int
    arrived: int = 0


@dataclass(frozen=True)
class State:
    """The state of the lane, the network and Redis; numbers represent the names of the lane."""

    begun: int = 0  # how many batches the lane has begun
    busy: bool = False  # whether the lane still tries to count the last batch
    tries: int = 0  # how often the lane has sent its last batch under its present name
    writer: int = 0
    sequence: int = 0
    in_doubt: bool = False
    waits_for: int | None = None  # index in `sent` of the message whose reply the lane waits for
    reply: tuple[Any, ...] | None = None
    sent: tuple[Sent, ...] = ()
    hits: int = 0  # the hits in Redis
    known: tuple[bytes | None, ...] = (None,) * 5  # what Redis remembers of each writer
    counted: tuple[int, ...] = (0, 0, 0)  # how often each batch was counted
    forgot: bool = False
    replica: tuple[Any, ...] = (0, (None,) * 5, (0, 0, 0))  # `hits`, `known` and `counted` of the replica
    replicated: bool = True  # whether the replica has what the connection of `reply` has written
    answered: tuple[int, ...] = ()  # the batches that were answered
    failed_over: bool = False


class Exhaustive:
    """Visits every state that any sequence of events can reach.

    The lane sends `batches` batches, each up to `tries` times under one name. Each message arrives up to `arrivals` times. With
    `failover`, the primary is lost at most once, and the lane waits for the replica if `wait` is true.
    """

    def __init__(
        self, store: Any, batches: int, tries: int, arrivals: int, *,
        failover: bool = False, wait: bool = True, script: str = SCRIPT,
    ) -> None:  # fmt: skip
        self.store = store
        self.failover, self.wait, self.text = failover, wait, script
        self.sizes = [1, 2, 4][:batches]  # the hits of each batch; the total shows which batches were counted
        self.tries = tries
        self.arrivals = arrivals
        self.memory: dict[Any, tuple[tuple[Any, ...], int, bytes | None, bool]] = {}
        self.ends: set[tuple[int, ...]] = set()

    def script(self, state: State, message: Sent) -> tuple[tuple[Any, ...], int, bytes | None, bool]:
        """Return the script's reply, the hits and the writer's record that Redis has then, and whether the script has written."""
        known = state.known[message.writer]
        situation = state.hits, known, message.sequence, message.batch
        if situation not in self.memory:
            keys = _keys("exhaustive", "w")
            self.store.delete(*keys)
            self.store.set(keys[0], state.hits)
            if known is not None:
                self.store.set(keys[2], known)
            changes = number_of_changes(self.store)
            reply = call(self.store, keys, message.sequence, self.sizes[message.batch], 0, 10, script=self.text)
            wrote = number_of_changes(self.store) != changes
            self.memory[situation] = tuple(reply), int(self.store.get(keys[0])), self.store.get(keys[2]), wrote
        return self.memory[situation]

    def decided(self, state: State, writer: WriterState, **changes: Any) -> State:
        """Return the state after a decision of the lane's writer; a new name gets the next number."""
        number = state.writer + (writer.name != "now")
        return replace(state, writer=number, sequence=writer.sequence, in_doubt=writer.in_doubt, **changes)

    def send(self, state: State) -> State:
        message = Sent(state.begun - 1, state.writer, state.sequence)
        return replace(state, sent=(*state.sent, message), waits_for=len(state.sent), reply=None, tries=state.tries + 1)

    def steps(self, state: State) -> Iterator[State]:
        """Yield every state that can follow `state`."""
        writer = WriterState()
        writer.name, writer.sequence, writer.in_doubt = "now", state.sequence, state.in_doubt
        if not state.busy and state.begun < len(self.sizes):
            writer.begin()
            yield self.send(self.decided(state, writer, begun=state.begun + 1, busy=True, tries=0))
        if state.busy and state.reply is None:
            writer.failed(TimeoutError(), sent=True)
            if state.tries < self.tries:
                yield self.send(self.decided(state, writer))
            yield self.decided(state, writer, busy=False, waits_for=None)
        if state.reply is not None:
            lacking = False
            if self.failover and self.wait and state.reply[0] == b"counted":
                writer.doubt()
                lacking = not state.replicated
            verdict = None if lacking else writer.replied(list(state.reply))
            if lacking:
                writer.failed(TooFewReplicasError(), sent=True)
                yield self.decided(state, writer, waits_for=None, reply=None)
            elif verdict is Verdict.AGAIN:
                yield self.send(self.decided(state, writer, tries=0))
            else:
                answered = state.answered
                if verdict is Verdict.COUNTED:
                    assert state.counted[state.begun - 1] == 1
                    answered += (state.begun - 1,)
                yield self.decided(state, writer, busy=False, waits_for=None, reply=None, answered=answered)
        for index, message in enumerate(state.sent):
            if message.arrived < self.arrivals:
                yield self.deliver(state, index, message)
        if (
            not state.forgot
            and state.sequence > 1
            and not any(
                message.sequence == 1 and message.writer == state.writer and message.arrived < self.arrivals
                for message in state.sent
            )
        ):
            known, kept = (
                tuple(None if number == state.writer else last for number, last in enumerate(each))
                for each in (state.known, state.replica[1])  # The key has the same age in the replica.
            )
            replica = state.replica[0], kept, state.replica[2]
            yield replace(state, known=known, replica=replica, forgot=True)
        if self.failover and not state.failed_over:
            primary = state.hits, state.known, state.counted
            if state.replica != primary:
                yield replace(state, replica=primary, replicated=True)
            hits, known, counted = state.replica
            assert all(counted[batch] == 1 for batch in state.answered), "an answered batch is lost"
            state = replace(state, hits=hits, known=known, counted=counted, waits_for=None, reply=None)
            # What is under way to the old primary does not reach the new one.
            sent = tuple(replace(message, arrived=self.arrivals) for message in state.sent)
            yield replace(state, sent=sent, replicated=True, failed_over=True)

    def deliver(self, state: State, index: int, message: Sent) -> State:
        reply, hits, knows, wrote = self.script(state, message)
        counted = list(state.counted)
        if hits != state.hits:
            assert hits == reply[2] == state.hits + self.sizes[message.batch]
            counted[message.batch] += 1
            assert counted[message.batch] == 1, "counted twice"
        sent = list(state.sent)
        sent[index] = replace(message, arrived=message.arrived + 1)
        known = list(state.known)
        known[message.writer] = knows
        state = replace(state, sent=tuple(sent), hits=hits, known=tuple(known), counted=tuple(counted))
        if state.waits_for == index and state.reply is None:
            state = replace(state, reply=reply, replicated=state.failed_over or not wrote)
        return state

    def explore(self) -> int:
        """Visit every state, and return the number of states."""
        seen, left = {State()}, [State()]
        while left:
            state = left.pop()
            self.ends.add(state.counted)
            for following in self.steps(state):
                if following not in seen:
                    seen.add(following)
                    left.append(following)
        return len(seen)


@pytest.mark.parametrize(("batches", "tries", "arrivals"), [(2, 3, 2), (2, 2, 3), (3, 1, 2)])
def test_no_interleaving_of_a_few_batches_counts_one_twice_or_answers_one_that_is_not_counted(
    store: Any, batches: int, tries: int, arrivals: int
) -> None:
    exhaustive = Exhaustive(store, batches, tries, arrivals)
    assert exhaustive.explore() > 1000  # `explore` returns the number of states
    assert {counted[:batches] for counted in exhaustive.ends} == set(itertools.product((0, 1), repeat=batches))


@pytest.mark.parametrize(("batches", "tries", "arrivals"), [(2, 2, 2), (3, 1, 1), (1, 3, 2)])
def test_no_interleaving_with_a_failover_loses_an_answered_batch(store: Any, batches: int, tries: int, arrivals: int) -> None:
    assert Exhaustive(store, batches, tries, arrivals, failover=True).explore() > 100


def test_batch_that_is_answered_before_a_replica_has_it_is_lost_in_a_failover(store: Any) -> None:
    with pytest.raises(AssertionError, match="an answered batch is lost"):
        Exhaustive(store, 1, 1, 1, failover=True, wait=False).explore()


def test_repeated_batch_that_writes_nothing_is_lost_in_a_failover(store: Any) -> None:
    write = "    redis.call('EXPIRE', KEYS[3], DAY)\n    return last[2]"
    assert write in SCRIPT
    with pytest.raises(AssertionError, match="an answered batch is lost"):
        Exhaustive(store, 1, 2, 1, failover=True, script=SCRIPT.replace(write, "    return last[2]")).explore()
