"""What can be said of the files that make the image without an engine."""

import subprocess
import sys
from pathlib import Path

from conftest import ROOT


def test_hadolint_finds_nothing() -> None:
    ended = subprocess.run([Path(sys.executable).parent / "hadolint", "Containerfile"], cwd=ROOT, text=True, capture_output=True)
    assert (ended.returncode, ended.stdout) == (0, "")


def test_no_engine_is_told_in_one_line(tmp_path: Path) -> None:
    for name in ("sh", "mktemp", "rm"):
        (tmp_path / name).symlink_to(f"/bin/{name}" if Path(f"/bin/{name}").exists() else f"/usr/bin/{name}")
    for target, engine in (("load", ""), ("engines", ""), ("check", ""), ("digests", "no-such-engine")):
        environ = {
            "PATH": str(tmp_path),
            "ENGINE": engine,
            "SERVICE": "hitcounter",
            "PLATFORMS": "linux/amd64",
            "WHEELS": "wheels",
        }
        ended = subprocess.run([ROOT / "image" / "build.sh", target, "name"], env=environ, text=True, capture_output=True)
        assert ended.returncode == 1
        assert ended.stderr.startswith("make: ")
        assert ended.stderr.count("\n") == 1


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
