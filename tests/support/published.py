"""Publish the first service's image with the commands of the release workflow, into two folders of a registry."""

import functools
import json
import os
import secrets
import tempfile
from dataclasses import dataclass
from pathlib import Path

from nanoservice import __version__ as VERSION
from tests.support.services import names
from tests.support.workflows import RELEASE, execute, runs

SERVICE = names()[0]
REGISTRY = os.environ.get("REGISTRY", "").strip()


@dataclass(frozen=True)
class Published:
    """The results of the release workflow: its folders, its output, and the registries and digest of the image."""

    layout: Path
    dist: Path
    registries: tuple[str, str]
    digest: str
    said: dict[str, str]  # the output of the last run of each command

    @property
    def repositories(self) -> list[str]:
        return [f"{registry}/{SERVICE}" for registry in self.registries]

    @property
    def digests(self) -> str:
        """The value of the variable DIGESTS for the published image."""
        return json.dumps({SERVICE: self.digest}, separators=(",", ":"))


@functools.cache
def published(*jobs: str) -> Published:
    """Run the commands of all jobs of a release, or of these `jobs`, in order, except those that this machine cannot run."""
    folder = Path(tempfile.mkdtemp(prefix="published-"))
    layout, dist, output = folder / f"{SERVICE}.oci", folder / "dist", folder / "output"
    run = f"{REGISTRY}/tests-{secrets.token_hex(4)}"
    registries = f"{run}/ghcr.io/someone", f"{run}/docker.io/someone"
    expressions = {
        "github.ref_type == 'tag' && github.ref_name || ''": f"v{VERSION}",
        "github.repository_owner": "Someone",
        "env.DOCKER_HUB": registries[1],
        "matrix.platform": "linux/arm64",
        "matrix.service": SERVICE,
        "github.token": "",
        "secrets.DOCKERHUB_TOKEN != '' && format('docker.io/{0}', secrets.DOCKERHUB_USERNAME) || ''": registries[1],
    }
    said = {}
    for one in runs(RELEASE):
        if not one.here or (jobs and one.job not in jobs):
            continue
        if one.line == "make wheels":  # this needs the internet: run it before the tests
            continue
        environ = {name: text.replace("ghcr.io/$", f"{run}/ghcr.io/$") for name, text in one.environ}
        said[one.line] = execute(
            type(one)(one.job, one.line, tuple(environ.items())),
            expressions,
            SERVICE=SERVICE,
            LAYOUT=str(layout),
            DIST=str(dist),
            GITHUB_OUTPUT=str(output),
        )
        if output.exists():
            for line in output.read_text().splitlines():
                name, _, value = line.partition("=")
                expressions[f"needs.{one.job}.outputs.{name}"] = value
            output.unlink()
    digest = json.loads(expressions["needs.build.outputs.digests"])[SERVICE]
    return Published(layout, dist, registries, digest, said)
