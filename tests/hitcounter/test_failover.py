"""A failover loses no answered number and gives none twice, if each answer waits for a replica.

If answers wait for no replica, counts are lost, and the service notices this.
"""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import cast

import pytest

from nanoservice.sentinel import PRIMARY_NAME
from nanoservice.testing.replicated import Replicated, Server
from nanoservice.testing.waiting import SLACK
from tests.hitcounter.chaos import MEDIAN_SECONDS, Chaos, Fault
from tests.support import needs_linux
from tests.support.process import Spawn

# The network between the servers aborts connections while it writes to them, which can crash uvloop. The services under test are
# processes of their own, and run on the event loop that `EVENT_LOOP` names.
pytestmark = [
    pytest.mark.asyncio(loop_factories=["asyncio"]),
    needs_linux("other systems do not have all addresses of 127.0.0.0/8"),
]


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Replicated]:
    """Yield a primary with two replicas and three Sentinels."""
    async with Replicated(tmp_path / "store").running() as it:
        yield it


@pytest.mark.parametrize("fault", list(Fault))
async def test_failover_loses_no_answered_number_and_gives_none_twice(store: Replicated, spawn: Spawn, fault: Fault) -> None:
    chaos = Chaos(store, spawn, replicas=1)
    await chaos.run([fault])
    chaos.check()
    assert chaos.gaps[fault][0] < MEDIAN_SECONDS * SLACK
    assert min(chaos.failovers) >= 1
    primary = store.primary()
    assert primary
    # While the Sentinels disagree, a service may follow one of them back to the old primary. At the end it is at the new one.
    for service in chaos.services:
        *_, last = (line["redis"] for line in service.log if line["message"] == "Redis has failed over to another primary")
        assert last == f"{primary.network.host}:{primary.network.port}"
    assert chaos.rewinds == [0, 0]


async def test_planned_failover_fails_no_request(store: Replicated, spawn: Spawn) -> None:
    class Planned:
        name = "PLANNED"

        def begin(self, server: Server, store: Replicated) -> None:
            assert store.ask(0, "FAILOVER", PRIMARY_NAME, "COORDINATED") == "OK"

        def end(self, server: Server) -> None:
            pass

    # The hand-over takes about a second. On a busy machine it may take longer than the default of REQUEST_TIMEOUT, 2 s.
    chaos, fault = Chaos(store, spawn, replicas=1, REQUEST_TIMEOUT="10"), cast("Fault", Planned())
    chaos.gaps = {fault: []}
    for server in store.servers:
        server.network.delay = 0.001  # as between nodes of one data centre
    await chaos.run([fault] * 3)
    print("\nseconds without an answer:", *(f"{gap:.1f}" for gap in chaos.gaps[fault]))
    assert set(chaos.tally.statuses) == {200}
    chaos.tally.check(*chaos.totals())


async def test_without_replicas_to_wait_for_counts_are_lost_and_this_is_noticed(store: Replicated, spawn: Spawn) -> None:
    chaos = Chaos(store, spawn, replicas=0)
    # A service notices lost counts that it has answered itself, so let the replicas lack some answers of each service.
    for server in store.servers:
        server.network.delay = 0.2
    await chaos.run([Fault.KILLED])
    with pytest.raises(AssertionError):
        chaos.tally.check(*chaos.totals())
    assert max(chaos.rewinds) >= 1
    assert any("Redis has lost counts" in line["message"] for service in chaos.services for line in service.log)
