"""The commands of the workflows, and a way to run those that this machine can run."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from tests.support import ROOT

CI, RELEASE = (yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text()) for name in ("ci", "release"))

# The beginnings of commands that this machine cannot run, each with the reason.
NOT_HERE = {
    "make builder": "BuildKit's image is not reached; the engine's own makes the same image with another digest",
    "make tools": "fetches Skaffold from a site that is not reached",
    "make render-check": "needs Skaffold",
    "skaffold": "is on a site that is not reached; its file is checked against its schema",
    "curl": "asks minikube, which does not run here; make e2e asks the node's port of another cluster",
    "kubectl wait": "waits for what Skaffold took away",
    "make sign": "signs as the workflow, which is an identity that GitHub alone gives",
    "gh release create": "makes a release on GitHub",
}


@dataclass(frozen=True)
class Run:
    """A `run:` of a workflow and its environment variables."""

    job: str
    line: str
    environ: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        return f"{self.job}: {self.line}"

    @property
    def here(self) -> bool:
        """Whether this machine can run it."""
        return not self.line.startswith(tuple(NOT_HERE))

    @property
    def targets(self) -> list[str]:
        """The make targets that it calls; empty for another command."""
        words = self.line.partition(" >>")[0].split()
        return [word for word in words[1:] if "=" not in word] if words[0] == "make" else []


def runs(workflow: Any) -> Iterator[Run]:
    """Yield each `run:` in order, and each `runCmd:` of an action."""
    for name, job in workflow["jobs"].items():
        for step in job.get("steps", []):
            line = step.get("run", step.get("with", {}).get("runCmd"))
            if line:
                environ = {**workflow.get("env", {}), **job.get("env", {}), **step.get("env", {})}
                yield Run(name, line.strip(), tuple(environ.items()))


def execute(run: Run, expressions: dict[str, str], **environ: str) -> str:
    """Run the command as a runner does, with each `${{ }}` replaced from `expressions`; return its standard output."""

    def value(expression: "re.Match[str]") -> str:
        return expressions[expression[1]]

    # These would make it a part of the make that runs the tests.
    outer = {name: text for name, text in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    given = {name: re.sub(r"\$\{\{ (.+?) \}\}", value, text) for name, text in run.environ}
    ended = subprocess.run(
        ["bash", "-e", "-c", run.line],
        cwd=ROOT,
        env={**outer, "VENV": sys.prefix, **given, **environ},
        text=True,
        capture_output=True,
        timeout=900,
    )
    assert ended.returncode == 0, f"{run}\n{ended.stdout}{ended.stderr}"
    return ended.stdout
