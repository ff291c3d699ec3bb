"""The build of an image fails on wrong inputs and reports what is wrong."""

import re
import shutil
from pathlib import Path

import pytest

from tests.support.images import PLATFORM, WHEELS, BuildError, layout, sources

pytestmark = pytest.mark.image


@pytest.fixture
def context(tmp_path: Path) -> Path:
    """Copy the sources, and return the copy's folder."""
    return sources(tmp_path / "context")


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    """Copy the wheels, and return the copy's folder."""
    return Path(shutil.copytree(WHEELS, tmp_path / "wheels"))


def refusal(context: Path, wheels: Path = WHEELS, platform: str = PLATFORM) -> str:
    """Check that the build of an image fails, and return the output of this build."""
    with pytest.raises(BuildError) as refused:
        layout(context, context / "layout", options="--target=packages", wheels=wheels, PLATFORMS=platform)
    return str(refused.value)


def test_wheel_with_another_hash(context: Path) -> None:
    lock = context / "requirements.txt"
    pinned = re.search(r"^aiosignal==(.|\n)*?(?=^\S)", lock.read_text(), re.MULTILINE)
    assert pinned
    lock.write_text(lock.read_text().replace(pinned[0], re.sub("sha256:[0-9a-f]{8}", "sha256:00000000", pinned[0])))
    assert re.search(r"DO NOT MATCH THE HASHES(.|\n)*aiosignal==", refusal(context))


def test_source_distribution(context: Path, wheels: Path) -> None:
    for wheel in wheels.glob("aiosignal-*.whl"):
        wheel.rename(wheels / f"{wheel.name.split('-py3')[0]}.tar.gz")
    said = refusal(context, wheels)
    assert "No matching distribution found for aiosignal==" in said
    assert "make wheels" in said


def test_dependency_that_the_lock_does_not_name(context: Path) -> None:
    lock = context / "requirements.txt"
    lock.write_text(re.sub(r"^frozenlist==(.|\n)*?(?=^\S)", "", lock.read_text(), flags=re.MULTILINE))
    assert re.search(
        r"In --require-hashes mode, all requirements must have their versions pinned(.|\n)*frozenlist", refusal(context)
    )


def test_architecture_without_wheels(context: Path, wheels: Path) -> None:
    assert "there are no wheels for riscv64, only for amd64 and arm64" in refusal(context, platform="linux/riscv64")
    machine, other = ("aarch64", "linux/arm64") if PLATFORM == "linux/amd64" else ("x86_64", "linux/amd64")
    for wheel in wheels.glob(f"aiohttp-*{machine}.whl"):
        wheel.unlink()
    assert "No matching distribution found for aiohttp==" in refusal(context, wheels, other)
