"""Read the commands of the workflows, and run the commands that this machine can run."""

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

# This machine cannot run the commands that begin with one of these keys. Each value is the reason.
NOT_HERE = {
    "make test-newest": "it tests packages that are in no lock, so its failure must not stop a change",
    "make renovate-check": "it takes most of a minute, and only Renovate reads the file that it checks",
    "make builder": "BuildKit's image cannot be pulled; the engine's own builder makes the same image with another digest",
    "make tools": "the target fetches Skaffold from a site that cannot be reached; Go builds Skaffold instead",
    "sudo apt-get install": "the command installs a package that Debian has and the runner's Ubuntu lacks",
    "skaffold": "no test runs Skaffold on a cluster; `make render-check` runs Skaffold without one",
    "curl": "the command asks minikube, which does not run here; this machine asks the node's port of another cluster",
    "kubectl wait": "the command waits for objects that Skaffold deletes",
    "make sign": "the target signs with the identity of the workflow, which only GitHub gives",
    "gh release create": "the command makes a release on GitHub",
}
# hitcounter: begin
# tests/e2e/test_skaffold.py runs the commands that begin with these words.
for words in ("skaffold", "kubectl wait"):
    del NOT_HERE[words]
# hitcounter: end


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
        """Whether this machine can run the command."""
        return not self.line.startswith(tuple(NOT_HERE))

    @property
    def targets(self) -> list[str]:
        """The targets of a `make` command. For any other command the list is empty."""
        words = self.line.partition(" >>")[0].split()
        return [word for word in words[1:] if "=" not in word] if words[0] == "make" else []


def runs(workflow: Any) -> Iterator[Run]:
    """Yield each `run:` of a workflow's steps and each `runCmd:` of the actions that the steps use, in order."""
    for name, job in workflow["jobs"].items():
        for step in job.get("steps", []):
            line = step.get("run", step.get("with", {}).get("runCmd"))
            if line:
                environ = {**workflow.get("env", {}), **job.get("env", {}), **step.get("env", {})}
                yield Run(name, line.strip(), tuple(environ.items()))


def execute(run: Run, expressions: dict[str, str], **environ: str) -> str:
    """Run the command as a GitHub runner does, with each `${{ }}` replaced from `expressions`; return its standard output."""

    def value(expression: "re.Match[str]") -> str:
        return expressions[expression[1]]

    # With these variables, a `make` in the command would act as a part of the `make` that runs the tests.
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
