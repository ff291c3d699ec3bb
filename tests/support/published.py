"""The image as a release publishes it, by the commands of its workflow, into two repositories of a registry."""

import functools
import os
import secrets
import tempfile
from dataclasses import dataclass
from pathlib import Path

from hitcounter import __version__ as VERSION
from tests.support.workflows import RELEASE, execute, runs

REGISTRY = os.environ.get("REGISTRY", "").strip()


@dataclass(frozen=True)
class Published:
    """The results of the workflow: the folders that it wrote, and where the image is."""

    layout: Path
    dist: Path
    repositories: tuple[str, str]
    digest: str
    said: dict[str, str]  # the output of each command, of its last run


@functools.cache
def published() -> Published:
    """Run the commands of each job of a release, in order, except those that this machine cannot run."""
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
        if not one.here or one.line == "make wheels":  # it must have been run before, and needs the internet
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
