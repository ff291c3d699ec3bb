"""What `make deploy` says where it cannot: one line, before anything is built. What kubectl would say is played."""

import os
import subprocess
from pathlib import Path

import pytest
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
