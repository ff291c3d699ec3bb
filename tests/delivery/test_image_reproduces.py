"""The same inputs always give the same image, and other inputs give another image."""

import functools
import hashlib
import http.server
import os
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

from nanoservice.testing.waiting import SLACK
from tests.support import ROOT
from tests.support.images import PLATFORM, WHEELS, Layout, built, engine, engines, layout, sources

pytestmark = pytest.mark.image


@pytest.fixture
def context(tmp_path: Path) -> Path:
    """Copy the sources, and return the copy's folder."""
    return sources(tmp_path / "context")


def test_two_builds_without_a_cache_give_the_same_image_on_every_engine() -> None:
    assert len(engines()) > 1 or not os.environ.get("CI"), f"a comparison needs two engines, not only {engines()}"
    environ = {**os.environ, "PLATFORMS": "linux/amd64,linux/arm64", "SERVICE": "hitcounter", "WHEELS": str(WHEELS)}
    ended = subprocess.run(["sh", "scripts/image-check.sh"], cwd=ROOT, env=environ, text=True, capture_output=True)
    assert ended.returncode == 0, ended.stderr
    print(ended.stdout)
    assert len(re.findall(r"^linux/\w+ sha256:[0-9a-f]{64} \(.+\)$", ended.stdout, re.MULTILINE)) == 2 * len(engines())


def test_build_from_nothing_takes_a_minute_at_most() -> None:
    seconds = built()[1]
    print(f"{seconds:.1f} s from nothing")
    assert seconds < 60 * SLACK


def test_changed_source_gives_another_image_soon(context: Path, tmp_path: Path) -> None:
    file = context / "hitcounter" / "app.py"
    file.write_text(file.read_text() + f"# {time.time_ns()}\n")  # the engine's cache cannot contain this text
    began = time.monotonic()
    changed = layout(context, tmp_path / "layout")
    seconds = time.monotonic() - began
    print(f"{seconds:.1f} s after a change of the source")
    assert seconds < 8 * SLACK
    assert changed.digest != built()[0].digest
    assert shared(changed) == 3  # only one of the four layers on top of the base has changed


def shared(other: Layout) -> int:
    """Return how many layers on top of the base `other` has in common with the image that `built` returns."""
    mine, others = (one.config["rootfs"]["diff_ids"][-4:] for one in (built()[0], other))
    return len(set(mine) & set(others))


def test_changed_wheel_gives_another_image(context: Path, tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    shutil.copytree(WHEELS, wheels)
    wheel = next(wheels.glob("attrs-*.whl"))
    before = hashlib.sha256(wheel.read_bytes()).hexdigest()
    repacked = tmp_path / wheel.name
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(repacked, "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name) + (b"#" if name == "attr/_version_info.py" else b""))
    repacked.replace(wheel)
    lock = context / "requirements.txt"
    assert before in lock.read_text()
    lock.write_text(lock.read_text().replace(before, hashlib.sha256(wheel.read_bytes()).hexdigest()))
    changed = layout(context, tmp_path / "layout", wheels=wheels)
    assert changed.digest != built()[0].digest
    assert shared(changed) == 3


def given(argument: str) -> str:
    """Return the image that a build of the service uses for the build argument `argument`, such as BASE."""
    options = re.findall(rf"--build-arg[ =]{argument}=(\S+)", os.environ.get("BUILD_OPTIONS", ""))
    defaults = re.findall(rf"^ARG {argument}=(\S+)$", (ROOT / "Containerfile").read_text(), re.MULTILINE)
    return str([*defaults, *options][-1])


def another(argument: str, line: str, folder: Path) -> str:
    """Build a variant of the image that the build argument `argument` (such as BASE) names, with the instruction `line` added.

    `folder` is the context of this build. Return the options that make a build of the service use the new image.
    """
    name = f"localhost/image-tests-{argument.lower()}"
    (folder / "Containerfile").write_text(f"FROM {given(argument)}\n{line}\n")
    if "docker" in engine():
        # A builder in a container cannot use the engine's images, so give the new image to the builder as a folder.
        archive, files = folder / f"{argument}.tar", folder / f"{argument}.oci"
        to = ["buildx", "build", "--provenance=false", f"--platform={PLATFORM}", f"--output=type=oci,dest={archive}"]
    else:
        to = ["build", f"--tag={name}"]
    subprocess.run([engine(), *to, f"--file={folder}/Containerfile", str(folder)], check=True, capture_output=True)
    option = f"--build-arg {argument}={name}"
    if "docker" in engine():
        with tarfile.open(archive) as tar:
            tar.extractall(files, filter="data")
        option += f" --build-context {name}=oci-layout://{files}@{Layout(files).digest}"
    return option


def test_changed_base_gives_another_image(context: Path, tmp_path: Path) -> None:
    (tmp_path / "note").write_text("another base")
    changed = layout(context, tmp_path / "layout", options=another("BASE", "COPY note /note", tmp_path))
    assert changed.digest != built()[0].digest
    assert shared(changed) == 4


def test_commit_changes_nothing(context: Path, tmp_path: Path) -> None:
    git = ["git", "-C", str(context), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message=one more"]):
        subprocess.run([*git, *command], check=True)
    assert layout(context, tmp_path / "layout").digest == built()[0].digest


def test_times_of_files_change_nothing(context: Path, tmp_path: Path) -> None:
    # BuildKit does not read a file again if its path, size and time are those of an earlier build. So choose a time that no
    # earlier build has seen.
    seconds = time.time() - 1e9
    for path in context.rglob("*"):
        os.utime(path, (seconds, seconds))
    assert layout(context, tmp_path / "layout").digest == built()[0].digest


def test_umask_changes_nothing(context: Path, tmp_path: Path) -> None:
    for path in context.rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o600)
    assert layout(context, tmp_path / "layout").digest == built()[0].digest


def test_files_that_are_not_an_input_change_nothing(context: Path, tmp_path: Path) -> None:
    (context / "hitcounter" / "__pycache__").mkdir()
    for name in (
        "Makefile",
        ".env",
        "secret.pem",
        "hitcounter/.app.py.swp",
        "hitcounter/app.py~",
        "hitcounter/__pycache__/a.pyc",
    ):
        (context / name).write_text("anything")
    assert layout(context, tmp_path / "layout").digest == built()[0].digest


def test_clock_changes_nothing(context: Path, tmp_path: Path) -> None:
    """Two builds without a cache, at different times, give the same image: all times in the image are the base's, or fixed."""
    again = layout(context, tmp_path / "layout", options="--no-cache", SOURCE_DATE_EPOCH="1700000000")
    assert again.digest == built()[0].digest
    assert again.config["created"] == "1970-01-01T00:00:00Z"
    own = [step["created"] for step in again.config["history"] if step["created"].startswith("1970-")]
    assert len(own) >= 4


@pytest.mark.skipif(
    sys.platform != "linux", reason="elsewhere the engine runs in a virtual machine, which cannot reach this loopback"
)
def test_wheels_from_the_index_give_the_same_image(context: Path, tmp_path: Path) -> None:
    index = tmp_path / "index"
    for wheel in WHEELS.glob("*.whl"):
        name = wheel.name.split("-")[0].replace("_", "-").lower()
        (index / name).mkdir(parents=True, exist_ok=True)
        (index / name / wheel.name).symlink_to(wheel.resolve())
    asked: list[str] = []

    # http.server lists a folder as a page of links, which pip accepts as an index.
    class Index(http.server.SimpleHTTPRequestHandler):
        def log_message(self, _: str, *facts: Any) -> None:
            asked.append(str(facts[0]))

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Index, directory=str(index))) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            (tmp_path / "pip.conf").write_text(f"[global]\nindex-url = http://127.0.0.1:{server.server_port}/\n")
            options = f"--no-cache --network=host {another('PYTHON', 'COPY pip.conf /etc/pip.conf', tmp_path)}"
            fetched = layout(context, tmp_path / "layout", options=options, wheels=tmp_path / "none")
        finally:
            server.shutdown()
    assert [line for line in asked if "/aiohttp-" in line]
    assert fetched.digest == built()[0].digest


def test_both_architectures_come_in_one_layout(context: Path, tmp_path: Path) -> None:
    index = layout(context, tmp_path / "layout", PLATFORMS="linux/amd64,linux/arm64")
    manifests = index.manifests()
    assert set(manifests) == {"linux/amd64", "linux/arm64"}
    assert manifests[PLATFORM] == built()[0].digest
    told = subprocess.run(["make", "image-digest"], cwd=ROOT, check=True, text=True, capture_output=True).stdout
    assert dict(re.findall(r"^(linux/\w+) (sha256:[0-9a-f]{64})$", told, re.MULTILINE)) == manifests
