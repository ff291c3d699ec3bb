"""The services of this repository, as the tests of delivery see them."""

import functools
import importlib
import subprocess
from typing import Any

import yaml

from nanoservice.service import Service
from tests.support import ROOT


@functools.cache
def names() -> list[str]:
    """Return the names of all services, in the order of their numbers."""
    return subprocess.check_output(["sh", "scripts/services.sh", "names"], cwd=ROOT, text=True).split()


@functools.cache
def numbers() -> dict[str, int]:
    """Return a dict from the name of each service to its number, from which its ports follow."""
    _, *rows = subprocess.check_output(["sh", "scripts/services.sh"], cwd=ROOT, text=True).splitlines()
    return {name: int(port) - 8080 for name, port, *_ in (row.split() for row in rows)}


@functools.cache
def services() -> dict[str, Service[Any]]:
    """Return a dict from the name of each service to its definition."""
    return {name: importlib.import_module(f"{name}.app").SERVICE for name in names()}


@functools.cache
def project() -> str:
    """Return the name of the project, which is the name of its namespace."""
    return str(yaml.safe_load((ROOT / "manifests" / "namespace" / "namespace.yaml").read_text())["metadata"]["name"])
