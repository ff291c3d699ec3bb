"""Each script answers wrong arguments with its usage. scripts/README.md lists each script. Unknown builders are an error."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "scripts").glob("*.[ps][yh]"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.name))
def test_wrong_arguments_are_answered_with_the_usage(script: Path, tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable if script.suffix == ".py" else "sh", script, "no", "such"],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"]},
        text=True,
        capture_output=True,
    )
    assert (ended.returncode, ended.stdout) == (64, "")
    assert script.name in ended.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("script", "name"), [("secret.sh", "make"), ("bundle/install.sh", "install.sh")])
def test_variables_of_the_caller_do_not_turn_a_failure_into_a_success(script: str, name: str) -> None:
    environ = {"PATH": os.environ["PATH"], "failed": "0", "program": "other", "KUBECTL": "no-such-kubectl"}
    command = ["sh", str(ROOT / "scripts" / script), *(["verify"] if "/" in script else [])]
    ended = subprocess.run(command, cwd=ROOT, env=environ, text=True, capture_output=True)
    assert (ended.returncode, ended.stderr.partition(":")[0]) == (1, name)


def test_no_script_needs_an_execute_bit() -> None:
    """A ZIP file and a Windows share lose these bits. No script has one here, so every test shows that no caller needs it."""
    listed = subprocess.check_output(["git", "-c", f"safe.directory={ROOT}", "ls-files", "--stage"], cwd=ROOT, text=True)
    assert set(re.findall("^100755 .*\t(.*)$", listed, re.MULTILINE)) <= {".ci/run"}


def test_each_script_is_in_the_list() -> None:
    listed = re.findall(r"^\| `([\w.-]+)`", (ROOT / "scripts" / "README.md").read_text(), re.MULTILINE)
    assert sorted(listed) == [path.name for path in SCRIPTS]


@pytest.mark.parametrize(
    "says",
    ["exit 3", "echo 'Driver: docker'", "printf 'Driver: docker\\nBuildKit version: v1\\n'; exit 3"],
    ids=["nothing", "no version", "an error"],
)
@pytest.mark.parametrize("name", ["image-digest", "image-check"])
def test_builder_that_is_not_described_is_an_error(tmp_path: Path, name: str, says: str) -> None:
    """A digest can be compared with another digest only if the builders of both are known."""
    engine = tmp_path / "docker"
    layout = "for word; do case $word in *dest=*) tar -cf ${word#*dest=} -C $0.layout . ;; esac; done"
    engine.write_text(f'#!/bin/sh\ncase "$*" in *inspect*) {says} ;; *) {layout} ;; esac\n')
    engine.chmod(0o755)
    (tmp_path / "docker.layout").mkdir()
    (tmp_path / "docker.layout" / "index.json").write_text(f'{{"digest": "sha256:{"0" * 64}"}}')
    environ = {**os.environ, "ENGINE": str(engine), "SERVICE": "hitcounter", "PLATFORMS": "linux/amd64", "WHEELS": "none"}
    ended = subprocess.run(["sh", ROOT / "scripts" / f"{name}.sh"], cwd=ROOT, env=environ, text=True, capture_output=True)
    assert ended.returncode == 1
    assert "sha256:" not in ended.stdout
    assert re.search("(does not describe its builder|does not print the builder's version and driver)", ended.stderr)
