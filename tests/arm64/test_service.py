"""The first service starts from its image for arm64, and stops after SIGTERM."""

import pytest

from tests.support.emulated import built, run
from tests.support.process import Process
from tests.support.wire import ask, request

# hitcounter: begin
from tests.hitcounter.test_contract import *  # noqa: F403 # isort: skip
# hitcounter: end

pytestmark = pytest.mark.arm64


@pytest.fixture(scope="module")
def arguments() -> list[str]:
    """Return the arguments of the image's entry point."""
    return list(built().config["config"]["Entrypoint"][1:])


def test_python_and_packages_are_for_arm64() -> None:
    with run("-c", "import platform, uvloop; print(platform.machine(), uvloop.loop.__file__)") as python:
        machine, module = python.communicate(timeout=100)[0].split()
    assert machine == "aarch64"
    assert "-aarch64-" in module
    assert module.startswith("/usr/local/lib/")


async def test_service_is_ready(emulated: Process) -> None:
    assert (await ask(emulated.port, request("GET", "/readyz"))).status == 200


def test_service_drains_after_sigterm(emulated: Process) -> None:
    assert emulated.end() == 0
    assert emulated.logged("draining")
    assert emulated.logged("stopped")
