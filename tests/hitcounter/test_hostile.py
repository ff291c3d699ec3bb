"""Attack the counter with hostile requests, which reach the code for bodies, `Accept` and `Idempotency-Key`."""

from pathlib import Path

from nanoservice.testing.valkey import Valkey
from tests.support import needs_linux
from tests.support.attack import PATIENT, survive, telling
from tests.support.process import Spawn


@needs_linux("the test reads /proc")
async def test_two_thousand_hostile_requests_leave_nothing_behind(spawn: Spawn, valkey: Valkey, tmp_path: Path) -> None:
    errors = tmp_path / "errors"
    environ = valkey.environ(REQUEST_TIMEOUT="10", **PATIENT)
    await survive(spawn(environ, command=telling("hitcounter", errors)), errors, 2_000, connections=5)  # 4 lanes, 1 probe
