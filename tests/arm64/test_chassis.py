"""The chassis in the image for arm64 fulfils its contract, and answers the requests in flight after SIGTERM."""

import pytest

from nanoservice.testing.valkey import Valkey
from tests.nanoservice.test_contract import *  # noqa: F403
from tests.support.process import Process, check_requests_in_flight

pytestmark = pytest.mark.arm64


@pytest.fixture(scope="module")
def arguments() -> list[str]:
    """Return the arguments that run the sample with the image's chassis and packages. The image itself has no sample."""
    return ["-m", "tests.nanoservice.sample"]


async def test_requests_in_flight_are_answered_after_sigterm(emulated: Process, valkey: Valkey) -> None:
    await check_requests_in_flight(emulated, valkey, "sample_pending")
