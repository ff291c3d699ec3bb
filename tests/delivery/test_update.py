"""`make update` takes newer versions from the named sources only and shows each change; Renovate finds each pinned image."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.git import ENVIRON, unusual

RENOVATE = json.loads((ROOT / ".github" / "renovate.json").read_text())


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Create a repository whose workflow uses an old version of an action, and return the repository's folder.

    The action has its own repository in the folder `actions`. The tag of the action's newest version is an annotated tag.
    """
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
    return subprocess.run(command, env=ENVIRON, check=True, text=True, capture_output=True).stdout.strip()


def test_action_gets_the_commit_of_its_newest_version(copy: Path) -> None:
    environ = unusual(**{f"url.{copy.parent}/.insteadOf": "https://github.com/"})
    subprocess.run(["sh", ROOT / "scripts" / "update-actions.sh"], cwd=copy, env=environ, check=True, timeout=60)
    commit = git(copy.parent / "actions" / "some", "rev-parse", "v1.10.0^{commit}")
    assert (copy / ".github" / "workflows" / "a.yml").read_text() == f"uses: actions/some@{commit}  # v1.10.0\n"
    assert [file.name for file in (copy / ".github" / "workflows").iterdir()] == ["a.yml"]


def test_versions_that_cannot_be_read_are_not_said_to_be_missing(copy: Path) -> None:
    environ = unusual(**{f"url.{copy.parent}/gone/.insteadOf": "https://github.com/"})
    command = ["sh", str(ROOT / "scripts" / "update-actions.sh")]
    ended = subprocess.run(command, cwd=copy, env=environ, text=True, capture_output=True, timeout=60)
    assert ended.returncode != 0
    assert "no version of actions/some can be read (see above)" in ended.stderr
    assert "fatal: " in ended.stderr


def test_changes_of_every_kind_of_pin_are_shown(copy: Path) -> None:
    pins = [
        "aiohttp==3.{}",
        "pip-tools==7.{}",
        "    image: docker.io/valkey/valkey:9-alpine@sha256:{:064}",
        "ARG BASE=gcr.io/a-b/c:d@sha256:{:064}",
        "      - uses: actions/check-out@{:040}  # v1",
    ]

    def write(number: int) -> None:
        lines = [*pins, "    --hash=sha256:{:064}", "# comment {}"]
        (copy / "pins").write_text("\n".join(line.format(number) for line in lines))
        (copy / "other").write_text(f"if a == {number}: pass")

    write(1)
    git(copy, "add", ".")
    assert changes(copy) == ["nothing is newer"]
    write(2)
    assert changes(copy) == ["+++ b/pins", *(f"-{pin.format(1)}" for pin in pins), *(f"+{pin.format(2)}" for pin in pins)]


def changes(copy: Path) -> list[str]:
    command = ["sh", str(ROOT / "scripts" / "update-changes.sh")]
    ended = subprocess.run(command, cwd=copy, env=unusual(), check=True, text=True, capture_output=True, timeout=60)
    return ended.stdout.splitlines()


def test_checkout_on_windows_has_the_same_bytes(tmp_path: Path) -> None:
    """git must not change line ends: these files go into containers and into the image, whose digest depends on every byte."""
    git(tmp_path, "init", "--quiet")
    for name in (".gitattributes", "Makefile", "manifests/redis/redis.sh", "hitcounter/app.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tmp_path / name)
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message=one")
    git(tmp_path, "clone", "--quiet", "--config=core.autocrlf=true", ".", "copy")
    for name in ("Makefile", "manifests/redis/redis.sh", "hitcounter/app.py"):
        assert (tmp_path / "copy" / name).read_bytes() == (ROOT / name).read_bytes()


def test_image_gets_the_digest_that_its_tag_has_now(copy: Path) -> None:
    old, new = (f"docker.io/some/image-1:1-a@sha256:{digit * 64}" for digit in "01")
    texts = {"Containerfile": "ARG IMAGE={}\n", "compose.yaml": "x: ${{IMAGE:-{}}}\n", "folder/a.yaml": "image: {}  # a\n"}
    (copy / "folder").mkdir()
    for name, text in texts.items():
        (copy / name).write_text(text.format(old))
    git(copy, "add", ".")
    oras = copy.parent / "oras"  # this fake oras knows only one image
    oras.write_text(f'#!/bin/sh\n[ "$*" = "resolve docker.io/some/image-1:1-a" ] && echo sha256:{"1" * 64}\n')
    oras.chmod(0o755)
    environ = unusual() | {"ORAS": str(oras)}
    subprocess.run(["sh", ROOT / "scripts" / "update-images.sh"], cwd=copy, env=environ, check=True, timeout=60)
    assert {name: (copy / name).read_text() for name in texts} == {name: text.format(new) for name, text in texts.items()}


@pytest.mark.parametrize("name", ["Makefile", "compose.yaml", "tests/support/images.py"])
def test_renovate_s_custom_managers_find_each_image(name: str) -> None:
    managers = [one for one in RENOVATE["customManagers"] if any(re.search(p[1:-1], name) for p in one["managerFilePatterns"])]
    regexes = [regex.replace("(?<", "(?P<") for manager in managers for regex in manager["matchStrings"]]
    text = (ROOT / name).read_text()
    found = [hit.group("depName", "currentValue", "currentDigest") for regex in regexes for hit in re.finditer(regex, text)]
    assert found == re.findall(r"([a-z][a-z.]*/[\w./-]+):([\w.-]+)@(sha256:[0-9a-f]{64})", text)
    assert len(found) == len(re.findall(r"@sha256:[0-9a-f]{64}", text)) > 0
    assert RENOVATE["ignorePaths"] == []  # by default, Renovate's preset ignores each folder named `tests`
