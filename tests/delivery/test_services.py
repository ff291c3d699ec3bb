"""The services are the folders that have a `__main__.py`, and every command and every list follows from these folders."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.services import names


def script(name: str, *arguments: str, cwd: Path = ROOT, **environ: str) -> "subprocess.CompletedProcess[str]":
    """Run a script of `cwd`/scripts with only PATH and `environ` as its environment."""
    command = ["sh", f"scripts/{name}", *arguments]
    return subprocess.run(
        command, cwd=cwd, env={"PATH": os.environ["PATH"], **environ}, text=True, capture_output=True, timeout=60
    )


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """Create a folder with the scripts and three services: `b` has the number 0, `a` the number 1, and `c` has no number."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    for name in "abc":
        (tmp_path / name).mkdir()
        (tmp_path / name / "__main__.py").touch()
    (tmp_path / "no_service").mkdir()
    (tmp_path / "manifests" / "minikube").mkdir(parents=True)
    ports = "".join(
        f"  - target: {{kind: Service, name: {name}}}\n    patch: |-\n"
        f"      - {{op: add, path: /spec/ports/0/nodePort, value: {port}}}\n"
        for name, port in (("b", 30080), ("a", 30081))
    )
    (tmp_path / "manifests" / "minikube" / "kustomization.yaml").write_text(f"patches:\n{ports}")
    return tmp_path


def test_services_are_listed_with_their_ports_in_a_fixed_order(three: Path) -> None:
    _, *rows = script("services.sh", cwd=three).stdout.splitlines()
    assert [row.split() for row in rows] == [
        ["b", "8080", "9090", "5678", "30080"],
        ["c", "8080", "9090", "5678", "30080"],
        ["a", "8081", "9091", "5679", "30081"],
    ]
    assert script("services.sh", "names", cwd=three).stdout.split() == ["b", "c", "a"]
    assert script("services.sh", "json", cwd=three).stdout == 'services=["b","c","a"]\n'


def test_tests_know_the_services_that_make_knows() -> None:
    assert sorted(names()) == sorted(path.parent.name for path in ROOT.glob("*/__main__.py"))


def test_script_runs_for_each_service_or_for_the_one_that_is_named(three: Path) -> None:
    (three / "scripts" / "tell.sh").write_text('echo "$SERVICE $IMAGE $LAYOUT"\n[ "$SERVICE" != c ]\n')
    one = script("each.sh", "tell.sh", cwd=three, SERVICE="a", IMAGE="x")
    assert (one.returncode, one.stdout) == (0, "a x a.oci\n")
    every = script("each.sh", "tell.sh", cwd=three)
    assert (every.returncode, every.stdout) == (1, "b b b.oci\nc c c.oci\n")  # a failure stops the rest


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"SERVICE": "d"}, "SERVICE=d: the services are b c a; to make another: make service NAME=..."),
        ({"IMAGE": "x"}, "IMAGE= and LAYOUT= name one image, so say of which service: SERVICE=..."),
        ({"LAYOUT": "x"}, "IMAGE= and LAYOUT= name one image, so say of which service: SERVICE=..."),
    ],
    ids=["unknown", "image", "layout"],
)
def test_choice_that_is_not_clear_is_refused(three: Path, environ: dict[str, str], words: str) -> None:
    (three / "scripts" / "tell.sh").write_text("echo told\n")
    ended = script("each.sh", "tell.sh", cwd=three, **environ)
    assert (ended.returncode, ended.stdout, ended.stderr) == (1, "", f"make: {words}\n")


def test_each_service_runs_on_its_own_ports_unless_told_otherwise(three: Path) -> None:
    python = three / "bin" / "python"
    python.parent.mkdir()
    python.write_text('#!/bin/sh\necho "$* $BIND_PORT $ADMIN_PORT"\n')
    python.chmod(0o755)
    for environ, said in (
        ({}, "-m b 8080 9090"),
        ({"SERVICE": "a"}, "-m a 8081 9091"),
        ({"SERVICE": "a", "BIND_PORT": "1"}, "-m a 1 9091"),
    ):
        assert script("run.sh", cwd=three, VENV=str(three), **environ).stdout == f"{said}\n"
    assert "SERVICE=d: the services are" in script("run.sh", cwd=three, VENV=str(three), SERVICE="d").stderr
