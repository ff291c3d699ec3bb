"""Build the image, read the image's content, and run containers: tools for the tests of the image.

The variables of `make test-image` choose the engines and the options of the build. The first engine that is found builds and
runs the images of the tests.
"""

import atexit
import functools
import json
import os
import platform
import shutil
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.support import ROOT
from tests.support.services import names

PLATFORM = "linux/" + {"x86_64": "amd64", "arm64": "arm64", "aarch64": "arm64"}[platform.machine()]
VALKEY = (
    os.environ.get("VALKEY")
    or "docker.io/valkey/valkey:9-alpine@sha256:48332870af354a799964c0012ae1194a0bf2bf894eb508f945810596dc2d8d11"
)
WHEELS = Path(os.environ.get("WHEELS", ROOT / "wheels")).absolute()


class BuildError(Exception):
    """A build failed; the text of this error is the whole output of the build."""


class Layout:
    """An image in an OCI layout: the first image of the layout, or the image that has a digest."""

    def __init__(self, folder: Path, digest: str | None = None) -> None:
        self._blobs = folder / "blobs" / "sha256"
        self.digest: str = digest or json.loads((folder / "index.json").read_text())["manifests"][0]["digest"]

    @functools.cached_property
    def _manifest(self) -> Any:
        return self._json(self.digest)

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """The image's configuration, which says how to run the image and how the image was built."""
        return dict(self._json(self.config_digest))

    @property
    def config_digest(self) -> str:
        """The digest of the configuration, which some engines use as the name of an image."""
        return str(self._manifest["config"]["digest"])

    def manifests(self) -> dict[str, str]:
        """Return a dict from platform to digest, for the images in an index."""
        return {
            f"{one['platform']['os']}/{one['platform']['architecture']}": one["digest"] for one in self._manifest["manifests"]
        }

    def _json(self, digest: str) -> Any:
        return json.loads(self._blob(digest).read_text())

    def _blob(self, digest: str) -> Path:
        return self._blobs / digest.removeprefix("sha256:")

    def layers(self, first: int = 0) -> Iterator[tarfile.TarFile]:
        """Yield the layers from index `first` up to the highest layer. A negative index counts from the highest layer."""
        for layer in self._manifest["layers"][first:]:
            with tarfile.open(self._blob(layer["digest"])) as tar:
                yield tar


def engines() -> list[str]:
    return _script("engines", ROOT).split()


def layout(context: Path, folder: Path, *, options: str = "", wheels: Path = WHEELS, **environ: str) -> Layout:
    """Build an image from `context`, with more `options` for the engine's build; return the OCI layout in `folder`."""
    environ = {"PLATFORMS": PLATFORM, "ENGINE": engine(), "WHEELS": str(wheels), **environ}
    environ["BUILD_OPTIONS"] = f"{os.environ.get('BUILD_OPTIONS', '')} {options}"
    _script("image-multiarch", context, LAYOUT=str(folder), **environ)
    return Layout(folder)


def loaded(name: str, context: Path = ROOT, *, options: str = "", **environ: str) -> str:
    """Build an image from `context`, load it into the engine as `name`, and return the name."""
    environ = {"ENGINE": engine(), "WHEELS": str(WHEELS), **environ}
    environ["BUILD_OPTIONS"] = f"{os.environ.get('BUILD_OPTIONS', '')} {options}"
    _script("image", context, IMAGE=name, **environ)
    return name


def _script(name: str, context: Path, **environ: str) -> str:
    environ = {**os.environ, "SERVICE": os.environ.get("SERVICE") or names()[0], **environ}
    command = ["sh", str(ROOT / "scripts" / f"{name}.sh")]
    ended = subprocess.run(command, cwd=context, env=environ, text=True, capture_output=True, timeout=600)
    if ended.returncode:
        raise BuildError(ended.stdout + ended.stderr)
    return ended.stdout


def sources(folder: Path) -> Path:
    """Copy the files that a build may use into `folder`, and return `folder`."""
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for name in ("Containerfile", ".dockerignore", *allowed):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(ROOT / name, folder / name)
    return folder


@functools.cache
def scratch() -> Path:
    """Return a temporary folder, which is deleted when the tests are finished."""
    folder = tempfile.mkdtemp(prefix="image-tests-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@functools.cache
def tree() -> Path:
    """Return a copy of the sources, so that you may change the sources while the tests run."""
    return sources(scratch() / "sources")


@functools.cache
def built() -> tuple[Layout, float]:
    """Build the image without a cache; return the image and the duration of the build in seconds."""
    began = time.monotonic()
    image = layout(tree(), scratch() / "image", options="--no-cache")
    return image, time.monotonic() - began


@functools.cache
def image() -> str:
    """Load the image into the engine, and return its name there."""
    built()
    return loaded("hitcounter-test", tree())


@functools.cache
def engine() -> str:
    return engines()[0]


def run(*arguments: str, check: bool = True, **options: Any) -> str:
    """Run a command of the engine; return its output, or with `check=False` its exit status and its output."""
    ended = subprocess.run([engine(), *arguments], capture_output=True, timeout=120, **{"text": True, **options})
    assert not check or ended.returncode == 0, ended.stderr
    return str(ended.stdout.strip()) if check else f"{ended.returncode}\n{ended.stdout}{ended.stderr}"
