"""That `make update` takes what is newer, and from nowhere but where it is named."""

import os
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A repository with a workflow that uses an action, and the action's own with a newer version, whose tag is an object."""
    action, copy = tmp_path / "actions" / "some", tmp_path / "copy"
    for folder in (action, copy):
        folder.mkdir(parents=True)
        git(folder, "init", "--quiet")
    for tag, options in (("v1.9.0", []), ("v1.10.0", ["--annotate", "--message=a"]), ("v2", [])):
        git(action, "commit", "--quiet", "--allow-empty", f"--message={tag}")
        git(action, "tag", *options, tag)
    (copy / ".github" / "workflows").mkdir(parents=True)
    (copy / ".github" / "workflows" / "a.yml").write_text(f"uses: actions/some@{'0' * 40}  # v1.9.0\n")
    git(copy, "add", ".")
    return copy


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    return subprocess.run(command, check=True, text=True, capture_output=True).stdout.strip()


def test_action_gets_the_commit_of_its_newest_version(copy: Path) -> None:
    environ = os.environ | {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.{copy.parent}/.insteadOf",
        "GIT_CONFIG_VALUE_0": "https://github.com/",
    }
    subprocess.run([ROOT / ".github" / "update.sh", "actions"], cwd=copy, env=environ, check=True, timeout=60)
    commit = git(copy.parent / "actions" / "some", "rev-parse", "v1.10.0^{commit}")
    assert (copy / ".github" / "workflows" / "a.yml").read_text() == f"uses: actions/some@{commit}  # v1.10.0\n"
    assert [file.name for file in (copy / ".github" / "workflows").iterdir()] == ["a.yml"]
