"""Run programs of the image for arm64 on a machine with another architecture.

QEMU translates each instruction. It looks for each file in the folder of the unpacked image first, so it needs no container.
`make test-arm64` sets the environment variable QEMU to the path of `qemu-aarch64`.
"""

import functools
import os
import subprocess
from pathlib import Path

from tests.support import ROOT
from tests.support.images import Layout, layout, scratch, tree


@functools.cache
def built() -> Layout:
    """Return the image for arm64."""
    return layout(tree(), scratch() / "arm64", PLATFORMS="linux/arm64")


@functools.cache
def files() -> Path:
    """Return a folder with the image's files."""
    folder = scratch() / "arm64-files"
    for layer in built().layers():
        layer.extractall(folder, filter="tar")
    return folder


def run(*arguments: str, **settings: str) -> "subprocess.Popen[str]":
    """Run the image's Python with `arguments`, and with the image's environment variables and `settings`.

    The working directory is the image's folder /app. Python imports modules that are not there from this repository.
    """
    config = built().config["config"]
    python = config["Entrypoint"][0]
    environ = dict(line.split("=", 1) for line in config["Env"])
    return subprocess.Popen(
        [os.environ["QEMU"], "-L", str(files()), "-0", python, f"{files()}{python}", "-B", *arguments],
        env={**environ, "PYTHONPATH": str(ROOT), **settings},
        cwd=files() / "app",
        text=True,
        bufsize=1,
        stdout=subprocess.PIPE,
    )
