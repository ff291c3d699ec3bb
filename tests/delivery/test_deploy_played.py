"""What `make deploy` and `make secret` do where kubectl and the engine say what a cluster seldom does: both are played."""

import os
import subprocess
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

# A cluster as deploy.sh sees it: its version, its default storage class, its context.
_KUBECTL = """#!/bin/sh
case "$*" in
  *version*) {version} ;;
  *storageclass*) echo "{default}" ;;
  *current-context*) echo elsewhere ;;
  *nodes*) ;;
  *) echo "deploy.sh has changed: kubectl $*" >&2; exit 3 ;;
esac
"""
_VERSION = """printf '{{"serverVersion": {{\\n "major": "1",\\n "minor": "{minor}",\\n "gitVersion": "v1"}}}}\\n'"""


def check(folder: Path, *, minor: int | None = 30, default: str = "true", registry: str = "r.example") -> tuple[int, str]:
    """Return the exit status and the words of `deploy.sh check` on such a cluster."""
    kubectl = folder / "kubectl"
    version = "exit 1" if minor is None else _VERSION.format(minor=minor)
    kubectl.write_text(_KUBECTL.format(version=version, default=default))
    kubectl.chmod(0o755)
    environ = os.environ | {"KUBECTL": str(kubectl), "NAMESPACE": "n", "REGISTRY": registry, "IMAGE": "hitcounter", "VALKEY": ""}
    done = subprocess.run([ROOT / "manifests" / "deploy.sh", "check"], env=environ, capture_output=True, text=True, timeout=30)
    return done.returncode, done.stderr


def test_cluster_that_will_do_is_taken_without_a_word(tmp_path: Path) -> None:
    assert check(tmp_path) == (0, "")


@pytest.mark.parametrize(
    ("cluster", "words"),
    [
        ({"minor": None}, "no cluster answers; start one (minikube start)"),
        ({"minor": 29}, "the cluster is Kubernetes 1.29; 1.30 is the oldest"),
        ({"default": ""}, "no default storage class"),
        ({"registry": ""}, "gets the image from a registry; name yours: REGISTRY="),
    ],
    ids=["no cluster", "too old", "no storage class", "no registry"],
)
def test_cluster_that_will_not_do_is_refused_in_one_line(
    tmp_path: Path, cluster: dict[str, int | str | None], words: str
) -> None:
    status, said = check(tmp_path, **cluster)  # type: ignore[arg-type] # one of its own
    assert status == 1
    assert words in said
    assert said.startswith("make: ")
    assert said.count("\n") == 1


def test_kubectl_that_is_missing_is_named() -> None:
    environ = os.environ | {"KUBECTL": "no-such-kubectl", "NAMESPACE": "n", "REGISTRY": "", "IMAGE": "hitcounter", "VALKEY": ""}
    done = subprocess.run([ROOT / "manifests" / "deploy.sh", "check"], env=environ, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr.startswith("make: kubectl is needed")) == (1, True)


def played(folder: Path, name: str, script: str) -> str:
    """Return the path of a program that is this script, and keeps what it was told in a file beside it."""
    program = folder / name
    program.write_text(f'#!/bin/sh\necho "$*" >>"$0.told"\n{script}\n')
    program.chmod(0o755)
    return str(program)


def ran(script: str, *arguments: str, **environ: str) -> "subprocess.CompletedProcess[str]":
    environ = {**os.environ, "NAMESPACE": "n", "REGISTRY": "r.example", "IMAGE": "hitcounter", "VALKEY": "", **environ}
    return subprocess.run([ROOT / "manifests" / script, *arguments], env=environ, capture_output=True, text=True, timeout=30)


def test_tag_that_looks_like_a_number_is_taken_for_a_name(tmp_path: Path) -> None:
    """It is the beginning of a digest: one in some hundreds is all digits, or as `12345678e123`."""
    kubectl = played(
        tmp_path, "kubectl", 'for word; do case $word in --kustomize=*) cp "${word#*=}"/*.yaml "$0.yaml" ;; esac; done'
    )
    engine = played(tmp_path, "docker", "case $* in *inspect*) echo sha256:123456789012abcdef ;; esac")
    ended = ran("deploy.sh", "deploy", KUBECTL=kubectl, ENGINE=engine, VALKEY="r.example/valkey:9")
    assert ended.returncode == 0, ended.stderr
    assert yaml.safe_load((tmp_path / "kubectl.yaml").read_text())["images"] == [
        {"name": "hitcounter", "newName": "r.example/hitcounter", "newTag": "123456789012"},
        {"name": "docker.io/valkey/valkey", "newName": "r.example/valkey", "newTag": "9"},
    ]


@pytest.mark.parametrize(("status", "written"), [(0, True), (1, False)], ids=["there is none", "it cannot be read"])
def test_passwords_are_made_only_where_there_are_none(tmp_path: Path, status: int, written: bool) -> None:
    kubectl = played(tmp_path, "kubectl", f"case $* in *'get secret'*) exit {status} ;; esac")
    assert ran("secret.sh", "make", KUBECTL=kubectl).returncode == status
    assert ("create secret" in (tmp_path / "kubectl.told").read_text()) == written
