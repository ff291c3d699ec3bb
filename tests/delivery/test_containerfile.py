"""Test the files from which the image is built, such as the Containerfile. These tests need no container engine."""

import importlib.util
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.services import names

_spec = importlib.util.spec_from_file_location("finish", ROOT / "image" / "finish.py")
assert _spec is not None
assert _spec.loader is not None
finish = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(finish)


@pytest.mark.parametrize("name", ["Containerfile", "devcontainer/Containerfile"])
def test_hadolint_finds_nothing(name: str) -> None:
    ended = subprocess.run([Path(sys.executable).parent / "hadolint", name], cwd=ROOT, text=True, capture_output=True)
    assert (ended.returncode, ended.stdout) == (0, "")


def test_code_that_only_tests_use_is_not_part_of_a_build() -> None:
    patterns = (ROOT / ".dockerignore").read_text().splitlines()
    later = patterns[patterns.index("nanoservice/testing") :]
    assert not [pattern for pattern in later if pattern.startswith("!nanoservice")]  # the last matching pattern decides
    assert (ROOT / "nanoservice" / "testing").is_dir()


def test_missing_engine_is_reported_in_one_line(tmp_path: Path) -> None:
    for name in ("sh", "mktemp", "rm"):
        (tmp_path / name).symlink_to(f"/bin/{name}" if Path(f"/bin/{name}").exists() else f"/usr/bin/{name}")
    for name, engine in (("image", ""), ("engines", ""), ("image-check", ""), ("image-digest", "no-such-engine")):
        environ = {
            "PATH": str(tmp_path),
            "ENGINE": engine,
            "SERVICE": "hitcounter",
            "PLATFORMS": "linux/amd64",
            "WHEELS": "wheels",
        }
        ended = subprocess.run(["sh", ROOT / "scripts" / f"{name}.sh"], env=environ, text=True, capture_output=True)
        assert ended.returncode == 1
        assert ended.stderr.startswith("make: ")
        assert ended.stderr.count("\n") == 1


def test_folder_that_is_not_a_layout_is_left_alone(tmp_path: Path) -> None:
    letter = tmp_path / "letter"
    letter.touch()
    engine = tmp_path / "docker"  # a script that does nothing stands in for the engine
    engine.write_text("#!/bin/sh\n")
    engine.chmod(0o755)
    command = ["make", "image-multiarch", f"SERVICE={names()[0]}", f"LAYOUT={tmp_path}", f"ENGINE={engine}"]
    ended = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert f"make: {tmp_path} is not an OCI layout" in ended.stderr
    assert letter.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="the libraries of this platform are not ELF files")
def test_stripping_changes_no_segment_that_is_loaded() -> None:
    libraries = sorted(Path(sys.prefix).rglob("*.so"))
    assert len(libraries) > 10
    for path in libraries:
        whole, stripped = path.read_bytes(), finish.stripped(path)
        table, size, count = *struct.unpack_from("<Q", whole, 32), *struct.unpack_from("<HH", whole, 54)
        for header in range(table, table + size * count, size):
            (kind,), (begin,) = struct.unpack_from("<I", whole, header), struct.unpack_from("<Q", whole, header + 8)
            (length,) = struct.unpack_from("<Q", whole, header + 32)
            # Kind 1 is PT_LOAD, a segment that is loaded. Skip the first 64 bytes, the ELF header: stripping clears the offset,
            # size and count of the section header table there.
            if kind == 1:
                assert whole[max(begin, 64) : begin + length] == stripped[max(begin, 64) : begin + length], path


def test_file_that_is_not_a_library_is_named_in_the_error(tmp_path: Path) -> None:
    path = tmp_path / "text.so"
    path.write_text("no library")
    with pytest.raises(ValueError, match=r"text\.so is not a 64-bit"):
        finish.stripped(path)


def test_every_base_is_named_by_its_digest() -> None:
    lines = (ROOT / "Containerfile").read_text().splitlines()
    bases = [line for line in lines if line.startswith("ARG") and ":" in line]
    assert len(bases) == 3
    assert all("@sha256:" in line for line in bases)
    stages = {line.split(" AS ")[1] for line in lines if " AS " in line}
    for line in lines:
        if line.startswith("FROM"):
            image = line.removeprefix("FROM ").removeprefix("--platform=$BUILDPLATFORM ").split()[0]
            assert image in {"scratch", "${PYTHON}", "${BASE}", "${DEBUG_BASE}"} | stages
