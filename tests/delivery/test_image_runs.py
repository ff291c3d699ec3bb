"""The image runs in a restricted container. The image of the target `dev` and the image of a second service run too."""

import contextlib
import json
import re
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanoservice.testing.waiting import SLACK, wait_for
from tests.support import ROOT
from tests.support.images import built, image, loaded, run, sources, tree

pytestmark = pytest.mark.image

RESTRICTED = [
    "--read-only", "--cap-drop=all", "--security-opt=no-new-privileges", "--user=65532", "--memory=128m", "--cpus=0.5",
]  # fmt: skip


@contextlib.contextmanager
def container(network: str, *options: str, name: str = "") -> Iterator[str]:
    """Run a container on the network, and yield the container's id. Without `name`, the container runs the production image."""
    identity = run(
        "run", "--detach", "--network", network, "--publish=127.0.0.1::8080", "--env=REDIS_HOST=store", *options, name or image()
    )
    try:
        yield identity
    finally:
        run("rm", "--force", "--volumes", identity)


def get(identity: str, path: str = "/") -> str:
    """Return the body of the answer to a GET, or an empty string if the GET fails.

    The time limit is long, because a request that the client abandons may still be counted.
    """
    address = run("port", identity, "8080/tcp").splitlines()[0]
    try:
        with urllib.request.urlopen(f"http://{address}{path}", timeout=30) as answer:
            return str(answer.read().decode())
    except OSError:
        return ""


def test_restricted_container_is_soon_ready_counts_and_stops(network: str) -> None:
    with container(network, *RESTRICTED) as identity:
        address = run("port", identity, "8080/tcp").splitlines()[0]
        began = time.monotonic()

        def ready() -> bool:
            with contextlib.suppress(OSError):
                return bool(urllib.request.urlopen(f"http://{address}/readyz", timeout=1).status == 200)
            return False

        wait_for(ready, 30, "the service is ready")
        took = time.monotonic() - began
        print(f"ready {took:.2f} s after the engine reported that the container runs")
        assert took < 1.5 * SLACK
        first, second = (int(re.findall(r"seen (\d+) times", get(identity))[0]) for _ in range(2))
        assert second == first + 1
        run("stop", "--time=20", identity)
        state = json.loads(run("inspect", identity))[0]["State"]
        assert (state["ExitCode"], state["OOMKilled"]) == (0, False)
        assert "draining" in run("logs", identity)


def test_image_runs_as_any_user(network: str) -> None:
    # OpenShift runs each pod as a user of its own choice, with the group 0.
    options = [option for option in RESTRICTED if not option.startswith("--user")]
    with container(network, *options, "--user=1000700000:0") as identity:
        wait_for(lambda: "seen" in get(identity), 30)
        script = "import os; it = os.stat('/proc/1'); print(it.st_uid, it.st_gid)"
        assert run("exec", identity, "/usr/bin/python3.13", "-c", script).split() == ["1000700000", "0"]


def test_nothing_is_written(network: str) -> None:
    with container(network) as identity:
        wait_for(lambda: "seen" in get(identity), 30)
        run("stop", identity)
        assert run("diff", identity) == ""


def test_image_has_byte_code_of_exactly_the_modules_that_are_loaded(network: str) -> None:
    with container(network, "--env=PYTHONVERBOSE=1") as identity:
        wait_for(lambda: "seen" in get(identity), 30)
        get(identity, "/openapi.json")
        run("stop", identity)
        said = run("logs", identity, check=False)
    assert not re.findall(r"# code object from (/\S+\.py)$", said, re.MULTILINE), "compiled at the start"
    loaded = set(re.findall(r"# (/usr/lib/python3\.13/\S+\.pyc) matches", said))
    script = "import pathlib; print(*pathlib.Path('/usr/lib/python3.13').rglob('*.pyc'))"
    there = set(run("run", "--rm", "--entrypoint=/usr/bin/python3.13", image(), "-B", "-c", script).split())
    assert there == loaded


def test_import_costs_little() -> None:
    script = "import sys, time; sys.path[0] = '/app'; import hitcounter.app, uvloop; print(time.process_time())"
    seconds = float(run("run", "--rm", "--entrypoint=/usr/bin/python3.13", image(), "-c", script))
    print(f"{seconds:.2f} CPU-seconds to import the service")
    assert seconds < 0.5 * SLACK


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ([], "hitcounter: REDIS_HOST is missing: set it to the Redis to use"),
        (["--env=REDIS_HOST=store", "--env=LANES=many"], "hitcounter: LANES must be a whole number from 1 to 64"),
    ],
)
def test_bad_settings_are_reported_and_the_status_is_78(network: str, settings: list[str], said: str) -> None:
    assert run("run", "--rm", *RESTRICTED, *settings, image(), check=False).split("\n", 1) == ["78", f"{said}\n"]


def test_help_lists_the_settings(network: str) -> None:
    assert "| `REDIS_HOST` |" in run("run", "--rm", image(), "--help")


def test_no_module_is_loaded_from_the_working_directory(network: str, tmp_path: Path) -> None:
    (tmp_path / "aiohttp.py").write_text("raise SystemExit('taken from the working directory')")
    tmp_path.chmod(0o755)
    assert "REDIS_HOST" in run("run", "--rm", f"--volume={tmp_path}:/work:ro", "--workdir=/work", image(), "--help")


def test_second_service_is_made_by_one_argument(network: str, tmp_path: Path) -> None:
    context = sources(tmp_path)
    with (context / ".dockerignore").open("a") as ignore:
        ignore.write("!greeter\n")
    (context / "greeter").mkdir()
    (context / "greeter" / "__init__.py").touch()
    service = (ROOT / "tests" / "nanoservice" / "second_service.py").read_text()
    (context / "greeter" / "app.py").write_text(service)
    (context / "greeter" / "__main__.py").write_text(
        (tree() / "hitcounter" / "__main__.py").read_text().replace("hitcounter", "greeter")
    )
    name = loaded("greeter-test", context, SERVICE="greeter")
    with container(network, *RESTRICTED, name=name) as identity:
        wait_for(lambda: "ann, number 1" in get(identity, "/greet/ann"), 30)
    assert json.loads(run("inspect", name))[0]["Config"]["Labels"]["org.opencontainers.image.title"] == "greeter"


def test_dev_image_restarts_at_a_change_and_keeps_its_counts(network: str) -> None:
    name = loaded("hitcounter-test:dev", tree(), options="--target=dev")
    with container(network, "--cap-drop=all", "--env=DRAIN_SECONDS=5", name=name) as identity:
        wait_for(lambda: "seen" in get(identity), 30)
        before, counted = int(re.findall(r"seen (\d+) times", get(identity))[0]), 0
        app = tree() / "hitcounter" / "app.py"
        text = app.read_text()
        changed = tree() / "changed" / "hitcounter" / "app.py"
        changed.parent.mkdir(parents=True)
        answer = ""
        for word in ("Salut", "Salve"):  # the two texts have the same size, and may be written within one second
            changed.write_text(text.replace("Hello from Redis", f"{word} from Redis"))
            # Write the file as live sync does: run tar in the container, as the container's user.
            packed = subprocess.run(["tar", "cC", tree() / "changed", "hitcounter"], check=True, capture_output=True).stdout
            run("exec", "--interactive", identity, "tar", "xmf", "-", "-C", "/app", "--no-same-owner", input=packed, text=False)
            began = time.monotonic()
            while not answer.startswith(word):
                assert time.monotonic() < began + 30
                answer = get(identity)
                counted += "seen" in answer
            took = time.monotonic() - began
            print(f"saved file to changed answer: {took:.2f} s")
            assert took < 1 * SLACK
        assert int(re.findall(r"seen (\d+) times", answer)[0]) == before + counted
        began = time.monotonic()
        run("stop", "--time=20", identity)
        assert time.monotonic() - began < 3 * SLACK
        assert json.loads(run("inspect", identity))[0]["State"]["ExitCode"] == 0


def test_image_that_runs_and_is_pushed_is_the_one_whose_digest_is_printed(network: str) -> None:
    identity = json.loads(run("inspect", image()))[0]["Id"]
    if identity == built()[0].config_digest:
        pytest.skip("this engine identifies an image by its configuration")
    assert identity == built()[0].digest
