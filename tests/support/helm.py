"""Run Helm, which Go builds from the module in scripts/tools/helm."""

import functools
import os
import subprocess

from tests.support import ROOT


@functools.cache
def program(name: str = "helm") -> str:
    """Return the path of Helm, or of another tool of the same module. HELM can name another Helm."""
    if name == "helm" and (given := os.environ.get("HELM")):
        return given
    command = ["go", "-C", str(ROOT / "scripts" / "tools" / "helm"), "tool", "-n", name]
    return subprocess.run(command, check=True, text=True, capture_output=True).stdout.strip()


def helm(*arguments: str, check: bool = True, seconds: float = 120) -> "subprocess.CompletedProcess[str]":
    """Run Helm. If it fails and `check` is set, raise an AssertionError with its output."""
    ended = subprocess.run([program(), *arguments], text=True, capture_output=True, timeout=seconds, cwd=ROOT)
    assert not check or ended.returncode == 0, f"helm {' '.join(arguments)}\n{ended.stdout}{ended.stderr}"
    return ended
