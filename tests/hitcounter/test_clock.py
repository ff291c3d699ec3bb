"""No Idempotency-Key counts twice within its promise while Redis's clock jumps back and forth.

The promise: a key is remembered until `KEEP` newer keys have arrived, or until Redis's clock has shown a day more than it showed
when the key arrived. A jump of the clock moves the end of the day, and nothing else.
"""

import itertools
import os
import random
from typing import Any

import pytest
from redis import Redis

from hitcounter.counter import SCRIPT, _keys
from nanoservice.testing.valkey import Valkey

KEYS = int(os.environ.get("CLOCK_KEYS", "25000"))  # `make test-clock` sends more
KEEP = KEYS // 5
DAY = 86400
_SLOW = 30  # the most seconds that a batch takes on a busy machine; its keys may have arrived this much earlier
_SHIFT = "{test}:shift"
# In the script, the clock shows `_SHIFT` seconds more than the server's clock.
_SHIFTED = f"""
local real, shift = redis, redis.call('GET', '{_SHIFT}')
local redis = setmetatable({{call = function(name, ...)
  local reply = real.call(name, ...)
  if name == 'TIME' then reply[1] = reply[1] + shift end
  return reply
end}}, {{__index = real}})
"""


class Clocked:
    """The script on a server whose clock can jump. Sends batches as one lane does."""

    def __init__(self, valkey: Valkey) -> None:
        self.client: Any = Redis(port=valkey.port, protocol=2)
        self.client.set(_SHIFT, 0)
        self._sha: Any = self.client.script_load(_SHIFTED + SCRIPT)
        self._writer = self._sequence = 0

    def jump(self, seconds: int) -> None:
        """Set the clock forward by `seconds`. Keys expire at absolute times, so their remaining lives change by as much."""
        self.client.incrby(_SHIFT, seconds)
        for key in self.client.keys("{hitcounter}:*"):
            if (life := self.client.pttl(key)) > 0:
                self.client.pexpire(key, life - seconds * 1000)  # Redis deletes the key if this is negative.

    def now(self) -> float:
        seconds, microseconds = self.client.time()
        return float(int(self.client.get(_SHIFT)) + seconds + microseconds / 1e6)

    def post(self, digests: list[str]) -> list[int]:
        """Send one batch with these digests, and return the number of posts in the answer to each."""
        while True:
            self._sequence += 1
            keys = _keys("hitcounter", str(self._writer))
            reply = self.client.execute_command("EVALSHA", self._sha, 5, *keys, self._sequence, 0, 0, KEEP, *digests)
            if reply[0] == b"counted":
                return list(reply[6::2])
            assert reply[0] == b"unknown"  # The writer's key has expired.
            self._writer, self._sequence = self._writer + 1, 0


@pytest.mark.parametrize("jumps", [(10, -10), (DAY, -DAY), (10, -10, DAY, -DAY, 3600, -3600, DAY // 2, -DAY // 2)])
def test_no_key_counts_twice_within_its_promise_while_the_clock_jumps(valkey: Valkey, jumps: tuple[int, ...]) -> None:
    dice = random.Random(1)
    clock = Clocked(valkey)
    clocks: list[float] = []  # what the clock showed at each batch
    first: list[tuple[int, int, int]] = []  # for each key: its answer, the batch that it came in, and its place among all keys
    arrived = repeated = forgotten = 0
    while len(first) < KEYS:
        new = range(len(first), min(len(first) + 500, KEYS))
        old = [dice.randrange(max(0, new.stop - KEEP), new.start) for _ in range(500 if first else 0)]
        known = arrived - KEEP  # Before this batch, Redis remembered the keys from this place on.
        answers = clock.post([str(key) for key in (*new, *old)])
        batch = len(clocks)
        clocks.append(clock.now())
        for answer in answers[: len(new)]:
            arrived += 1
            first.append((answer, batch, arrived))
        highest = [*itertools.accumulate(reversed(clocks), max)][::-1]  # the most that the clock has shown since each batch
        for key, answer in zip(old, answers[len(new) :], strict=True):
            counted, came, place = first[key]
            if place > known and highest[came] < clocks[came] - _SLOW + DAY:
                assert answer == counted, f"key {key} counted twice; it came at {clocks[came]:.1f}, and it is {clocks[batch]:.1f}"
                repeated += 1
            elif answer != counted:  # The key was forgotten, so it has arrived again.
                arrived += 1
                first[key] = answer, batch, arrived
                forgotten += 1
        if dice.random() < 0.2:
            clock.jump(dice.choice(jumps))
    print(f"{KEYS} keys, {KEEP} remembered; {repeated} repeats within the promise, {forgotten} counted again after it")
    assert repeated > KEYS / 10
    clock.client.close()
