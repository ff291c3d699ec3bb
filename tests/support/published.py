"""Publish the image with the commands of the release workflow, into two repositories of a registry."""

import functools
import os
import secrets
import tempfile
from dataclasses import dataclass
from pathlib import Path

from nanoservice import __version__ as VERSION
from tests.support.workflows import RELEASE, execute, runs

REGISTRY = os.environ.get("REGISTRY", "").strip()


@dataclass(frozen=True)
class Published:
    """The results of the release workflow: its folders, its output, and the repositories and digest of the image."""

    layout: Path
    dist: Path
    repositories: tuple[str, str]
    digest: str
    said: dict[str, str]  # the output of the last run of each command


@functools.cache
def published() -> Published:
    """Run the commands of all jobs of a release, in order, except the commands that this machine cannot run."""
    folder = Path(tempfile.mkdtemp(prefix="published-"))
    layout, dist, output = folder / "hitcounter.oci", folder / "dist", folder / "output"
    run = f"{REGISTRY}/tests-{secrets.token_hex(4)}"
    repositories = f"{run}/ghcr.io/someone/hitcounter", f"{run}/docker.io/someone/hitcounter"
    expressions = {
        "github.ref_type == 'tag' && github.ref_name || ''": f"v{VERSION}",
        "github.repository": "Someone/hitcounter",
        "env.DOCKER_HUB": repositories[1],
        "matrix.platform": "linux/arm64",
        "github.token": "",
        "secrets.DOCKERHUB_TOKEN != '' && format('docker.io/{0}/hitcounter', secrets.DOCKERHUB_USERNAME) || ''": repositories[1],
    }
    said = {}
    for one in runs(RELEASE):
        if not one.here or one.line == "make wheels":  # `make wheels` needs the internet: run it before the tests
            continue
        environ = {name: text.replace("ghcr.io/$", f"{run}/ghcr.io/$") for name, text in one.environ}
        said[one.line] = execute(
            type(one)(one.job, one.line, tuple(environ.items())),
            expressions,
            LAYOUT=str(layout),
            DIST=str(dist),
            GITHUB_OUTPUT=str(output),
        )
        if output.exists():
            for line in output.read_text().splitlines():
                name, _, value = line.partition("=")
                expressions[f"needs.{one.job}.outputs.{name}"] = value
            output.unlink()
    return Published(layout, dist, repositories, expressions["needs.build.outputs.digest"], said)
