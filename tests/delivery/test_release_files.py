"""The scripts of a release write the files and their checksums, and find each file that is not as it was written."""

import hashlib
import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.services import names

# Shell scripts stand in for oras, helm and kubectl.
ORAS = HELM = "#!/bin/sh\n"
KUBECTL = "#!/bin/sh\necho '# rendered'\n"


def script(name: str, folder: Path, **environ: str) -> "subprocess.CompletedProcess[str]":
    environ = {**os.environ, "DIST": str(folder / "dist"), "LAYOUT": str(folder / "layout"), "SERVICE": names()[0], **environ}
    tools = {name.upper(): str(folder / name) for name in ("oras", "helm", "kubectl")}
    environ |= tools | {"REGISTRIES": "r.example", "TAG": ""}
    return subprocess.run(["sh", f"scripts/{name}.sh"], cwd=ROOT, env=environ, text=True, capture_output=True, timeout=60)


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """Write the files of a release of the first service, and return their folder."""
    for name, text in (("oras", ORAS), ("helm", HELM), ("kubectl", KUBECTL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "layout").mkdir()
    (tmp_path / "layout" / "index.json").write_text(json.dumps({"digest": f"sha256:{'0' * 64}"}))
    (tmp_path / "dist").mkdir()
    (tmp_path / "dist" / f"{names()[0]}.spdx.json").write_text("{}")
    ended = script("release-files", tmp_path)
    assert ended.returncode == 0, ended.stderr
    return tmp_path / "dist" / "release"


def test_checksums_are_those_of_all_files(release: Path) -> None:
    files = sorted(file for file in release.iterdir() if file.name != "SHA256SUMS")
    lines = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}" for file in files]
    assert sorted((release / "SHA256SUMS").read_text().splitlines()) == sorted(lines)
    assert {"production.yaml", f"{names()[0]}.spdx.json"} <= {file.name for file in files}


@pytest.mark.parametrize("change", ["nothing", "another content", "another file", "a file less"])
def test_files_that_are_not_as_they_were_written_are_found(release: Path, change: str) -> None:
    sums = hashlib.sha256((release / "SHA256SUMS").read_bytes()).hexdigest()
    assert script("release-sums", release.parents[1]).stdout == f"sums={sums}\n"
    if change == "another content":
        (release / "production.yaml").write_text("another")
    elif change == "another file":
        (release / "another.yaml").touch()
    elif change == "a file less":
        (release / "production.yaml").unlink()
    ended = script("release-files-compare", release.parents[1], SUMS=sums)
    assert ended.returncode == (change != "nothing")
    assert ("the files differ from their checksums" in ended.stderr) == (change != "nothing")


def test_files_that_are_not_of_a_release_are_not_removed(release: Path) -> None:
    (release / "left.yaml").touch()  # this may be a file of an earlier version
    assert script("release-files", release.parents[1]).returncode == 0
    assert not (release / "left.yaml").exists()
    (release / "letter").touch()
    ended = script("release-files", release.parents[1])
    assert f"{release} has other files than those of a release" in ended.stderr
    assert (release / "letter").exists()
