"""The bundle has the same bytes each time. Without a network, install.sh finds each change, and loads and pushes the images."""

import functools
import json
import os
import re
import secrets
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.delivery.test_bundle_files import ANSWERS
from tests.delivery.test_deploy_played import played
from tests.support import ROOT
from tests.support.bundle import Island, copy, make, name_of, replaced, unpack
from tests.support.images import Layout, layout, scratch
from tests.support.services import names

pytestmark = pytest.mark.bundle

TOOLS = Path(os.environ.get("BUNDLE_TOOLS", ""))
REGISTRY = os.environ.get("REGISTRY", "").strip()


@functools.cache
def key(name: str = "key") -> Path:
    """Make a key pair of OpenSSH, and return the file of the private key."""
    file = scratch() / name
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(file)], check=True)
    return file


@functools.cache
def made() -> Path:
    """Make the bundle from a copy of the sources, and sign it. Return its file."""
    return make("bundle", copy(scratch() / "one"), scratch() / "one-dist", SIGNING_KEY=str(key()))


@functools.cache
def unpacked() -> Path:
    return unpack(made(), made().parent)


@functools.cache
def shells() -> dict[str, tuple[str, list[str]]]:
    """Return PATH and the command of each shell. busybox has no program of GNU on its PATH."""
    folder = scratch() / "busybox"
    folder.mkdir()
    busybox = TOOLS / "busybox"
    for name in subprocess.check_output([busybox, "--list"], text=True).split():
        (folder / name).symlink_to(busybox)
    for name in ("docker", "ctr", "ssh-keygen", "python3"):
        if found := shutil.which(name, path=f"{TOOLS}:{os.environ['PATH']}"):
            (folder / name).symlink_to(found)
    path = f"{TOOLS}:{os.environ['PATH']}"
    return {
        "dash": (path, [str(TOOLS / "dash")]),
        "busybox": (str(folder), [str(folder / "sh")]),
        "bash": (path, ["bash", "--posix"]),
    }


@pytest.fixture(scope="module")
def island(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Island]:
    if os.geteuid():
        pytest.skip("only root can make a network and start Docker and containerd")
    one = Island(tmp_path_factory.mktemp("i"), TOOLS)
    yield one
    one.close()


@pytest.fixture(scope="module")
def docker(island: Island) -> str:
    return island.docker("store", containerd_store=True)


@pytest.fixture(scope="module")
def classic(island: Island) -> str:
    return island.docker("classic", containerd_store=False)


@pytest.fixture(scope="module")
def containerd(island: Island) -> str:
    return island.containerd()


def install(*arguments: str, shell: str = "dash", at: Path | None = None, **environ: str) -> "subprocess.CompletedProcess[str]":
    """Run install.sh on this machine, with its error output in its output."""
    path, command = shells()[shell]
    return subprocess.run(
        [*command, str((at or unpacked()) / "install.sh"), *arguments],
        env={"PATH": path, "HOME": str(scratch()), **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=180,
    )


# --- the content of the bundle ---


def test_two_copies_give_the_same_bundle_and_signature() -> None:
    assert name_of(ROOT) in made().name
    sources, dist = copy(scratch() / "another copy"), scratch() / "another dist"
    other = make("bundle", sources, dist, umask=0o077, SIGNING_KEY=str(key()), TZ="Asia/Tokyo")
    assert other.read_bytes() == made().read_bytes()
    assert Path(f"{other}.sig").read_bytes() == Path(f"{made()}.sig").read_bytes()


def index() -> list[dict[str, object]]:
    return list(json.loads((unpacked() / "images" / "index.json").read_text())["manifests"])


def images() -> dict[str, str]:
    """Return a dict from the name of each image in the manifests to its digest."""
    lines = (unpacked() / "images.txt").read_text().split()
    return dict(line.partition("=")[2].split("@") for line in lines)


def test_manifests_and_chart_name_only_images_that_are_in_the_bundle() -> None:
    wanted = {f"{name}@{digest}" for name, digest in images().items()}
    assert len(wanted) == len(names()) + 1
    with tarfile.open(next(unpacked().glob("*.tgz"))) as tar:
        members = [tar.extractfile(it) for it in tar.getmembers() if "/manifests/" in it.name]
        texts = [member.read().decode() for member in members if member]
    texts += [file.read_text() for file in (unpacked() / "manifests").iterdir()]
    assert {image for text in texts for image in re.findall(r"(?m)^ *-? *image: (\S+)$", text)} == wanted
    for digest in images().values():
        file = unpacked() / "images" / "blobs" / digest.replace(":", "/")
        assert file.exists()


def test_services_have_both_platforms_and_lists_of_contents() -> None:
    for name in names():
        digest = next(digest for image, digest in images().items() if image.endswith(f"/{name}"))
        root = json.loads((unpacked() / "images" / "blobs" / digest.replace(":", "/")).read_text())
        assert {it["platform"]["architecture"] for it in root["manifests"]} == {"amd64", "arm64"}
        assert digest.partition(":")[2] in (unpacked() / f"{name}.spdx.json").read_text()


def test_sources_and_wheels_are_those_of_the_repository() -> None:
    there = {it.relative_to(unpacked() / "source").as_posix() for it in (unpacked() / "source").rglob("*") if it.is_file()}
    tracked = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()
    assert there == {name for name in tracked if (ROOT / name).exists()}
    locks = "".join((ROOT / name).read_text() for name in ("requirements.txt", "requirements-dev.txt"))
    locked = set(re.findall("sha256:([0-9a-f]{64})", locks))
    sums = (unpacked() / "SHA256SUMS").read_text()
    wheels = re.findall(r"(?m)^([0-9a-f]{64})  wheels/", sums)
    assert wheels
    assert set(wheels) <= locked


# --- changed files ---


def flipped(file: Path) -> bytes:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    return bytes(content)


PARTS = [
    "images.txt",
    "manifests/production.yaml",
    "*.tgz",
    "*.spdx.json",
    "push.py",
    "images/index.json",
    "images/blobs/sha256/*",
]
PARTS += ["source/Containerfile", "source/scripts/lib/base.sh", "wheels/aiohttp-*", "install.sh"]


@pytest.mark.parametrize("part", PARTS)
def test_changed_file_is_refused_before_anything_is_loaded(island: Island, docker: str, part: str) -> None:
    file = min(unpacked().glob(part))
    # Change install.sh by an additional comment only, because another change could stop the script before its check.
    content = file.read_bytes() + b"# changed\n" if part == "install.sh" else flipped(file)
    environ = {"DOCKER_HOST": docker, "NAMESPACE": "none"}
    with replaced(file, content):
        for command in (["verify"], ["load"], ["push", "localhost:1"], ["deploy"], ["upgrade"], ["diff"]):
            ended = island.run("sh", "install.sh", *command, cwd=unpacked(), **environ)
            assert ended.returncode == (2 if command == ["diff"] else 1)
            assert f"{file.relative_to(unpacked())} is changed\n" in ended.stdout
    assert island.run("docker", "images", "--quiet", DOCKER_HOST=docker).stdout == ""


@pytest.mark.parametrize("shell", ["dash", "busybox", "bash"])
def test_missing_and_additional_files_are_refused(shell: str) -> None:
    with replaced(unpacked() / "manifests" / "minikube.yaml", None):
        ended = install("verify", shell=shell)
        assert (ended.returncode, ended.stdout.splitlines()[0]) == (1, "manifests/minikube.yaml is missing")
    with replaced(unpacked() / "source" / names()[0] / "more.py", b"import os\n"):
        ended = install("verify", shell=shell)
        assert (ended.returncode, ended.stdout.splitlines()[0]) == (1, f"source/{names()[0]}/more.py is not of this bundle")
    with replaced(unpacked() / "SHA256SUMS", flipped(unpacked() / "SHA256SUMS")):
        assert install("verify", shell=shell).returncode == 1
    with replaced(unpacked() / "SHA256SUMS", None):
        assert "SHA256SUMS is missing" in install("verify", shell=shell).stdout
    ended = install("verify", shell=shell)  # the control
    assert ended.returncode == 0, ended.stdout


# --- the signature ---


def fingerprint(file: Path) -> str:
    return subprocess.check_output(["ssh-keygen", "-l", "-f", str(file)], text=True).split()[1]


@pytest.mark.parametrize("shell", ["dash", "busybox", "bash"])
def test_signature_is_checked_with_a_key_or_a_fingerprint(shell: str) -> None:
    right, other = [fingerprint(key()), f"{key()}.pub"], [f"{key('other')}.pub", fingerprint(key("other"))]
    for given in right if shell == "dash" else right[:1]:
        ended = install("verify", given, shell=shell)
        assert ended.returncode == 0, ended.stdout
        assert f"{made().name} is signed by {fingerprint(key())}" in ended.stdout
    for given in other if shell == "dash" else other[:1]:
        ended = install("verify", given, shell=shell)
        assert ended.returncode == 1
        assert f"{made().name} is signed by another key" in ended.stdout
    assert "neither a file nor a fingerprint" in install("verify", "nothing.pub", shell=shell).stdout
    assert "who made the bundle was not checked" in install("verify", shell=shell).stdout


def test_signature_of_another_file_is_refused(tmp_path: Path) -> None:
    given = f"{key()}.pub"
    with replaced(Path(f"{made()}.sig"), None):
        assert ".tar.sig, the signature, is missing" in install("verify", given).stdout
    changed = tmp_path / made().name
    changed.write_bytes(flipped(made()))
    shutil.copy(f"{made()}.sig", f"{changed}.sig")
    ended = install("verify", given, BUNDLE=str(changed))
    assert ended.returncode == 1
    assert f"{changed} is not the file that was signed" in ended.stdout
    # A folder that matches its own SHA256SUMS may come from another bundle than the signed one.
    signed = tmp_path / "signed.tar"
    with tarfile.open(signed, "w") as tar:
        (tmp_path / "sums").write_text("another\n")
        tar.add(tmp_path / "sums", f"{unpacked().name}/SHA256SUMS")
    subprocess.run(
        ["ssh-keygen", "-q", "-Y", "sign", "-f", str(key()), "-n", "file", str(signed)], check=True, capture_output=True
    )
    assert f"this folder is not from {signed}" in install("verify", given, BUNDLE=str(signed)).stdout


def test_verify_says_that_it_cannot_check_the_signature_without_ssh_keygen(tmp_path: Path) -> None:
    path, _ = shells()["busybox"]
    for file in Path(path).iterdir():
        if file.name != "ssh-keygen":
            (tmp_path / file.name).symlink_to(os.readlink(file))
    command = ["sh", "install.sh", "verify", f"{key()}.pub"]
    ended = subprocess.run(command, cwd=unpacked(), env={"PATH": str(tmp_path)}, capture_output=True, text=True)
    assert ended.returncode == 1
    assert "there is no ssh-keygen" in ended.stderr


# --- loading and pushing images ---


def test_network_has_no_route(island: Island) -> None:
    connect = "import socket; socket.create_connection(('192.0.2.1', 443), timeout=5)"
    assert "Network is unreachable" in island.run("python3", "-c", connect).stdout


@pytest.mark.parametrize(("store", "shell"), [("docker", "dash"), ("classic", "busybox"), ("containerd", "bash")])
def test_images_are_loaded_into_an_empty_store(request: pytest.FixtureRequest, island: Island, store: str, shell: str) -> None:
    address = request.getfixturevalue(store)
    path, command = shells()[shell]
    tool = "ctr" if store == "containerd" else "docker"
    variable = "CONTAINERD_ADDRESS" if store == "containerd" else "DOCKER_HOST"
    environ = {variable: address, "PATH": path}
    for _ in range(2):  # loading again changes nothing
        ended = island.run(*command, "install.sh", "load", tool, cwd=unpacked(), **environ)
        assert ended.returncode == 0, ended.stdout
    if store == "containerd":
        said = island.run("ctr", "--namespace=k8s.io", "images", "list", "--quiet", CONTAINERD_ADDRESS=address).stdout.split()
        assert {f"{name}@{digest}" for name, digest in images().items()} <= set(said)
    else:
        said = island.run("docker", "images", "--format={{.Repository}}", DOCKER_HOST=address).stdout.split()
        assert {name.removeprefix("docker.io/") for name in images()} == {one.removeprefix("docker.io/") for one in said}


# Print the digest that the registry has for an image.
READ = """
import hashlib, sys, urllib.request
host, _, name = sys.argv[1].partition("/")
kinds = "application/vnd.oci.image.index.v1+json, application/vnd.docker.distribution.manifest.v2+json"
request = urllib.request.Request(f"http://{host}/v2/{name}/manifests/{sys.argv[2]}", headers={"Accept": kinds})
print("sha256:" + hashlib.sha256(urllib.request.urlopen(request, timeout=9).read()).hexdigest())
"""


@pytest.mark.parametrize("tool", ["python", "docker", "classic"])
def test_images_are_pushed_into_an_empty_registry(request: pytest.FixtureRequest, island: Island, tool: str) -> None:
    registry, log = island.registry({"python": 5001, "docker": 5002, "classic": 5003}[tool])
    environ = {} if tool == "python" else {"DOCKER_HOST": request.getfixturevalue(tool)}
    try:
        for _ in range(2):
            arguments = ["push", f"{registry}/team", tool.replace("classic", "docker")]
            ended = island.run("sh", "install.sh", *arguments, cwd=unpacked(), **environ)
            assert ended.returncode == 0, ended.stdout
            pushed = dict(line.split("@") for line in (unpacked() / "pushed.txt").read_text().split())
            assert list(pushed) == [f"{registry}/team/{name.rpartition('/')[2]}" for name in images()]
            # Docker's classic store compresses the layers again, so pushed.txt must have the digest in the registry.
            assert (list(pushed.values()) == list(images().values())) == (tool != "classic")
        assert install("verify").returncode == 0
        for name, digest in pushed.items():
            assert island.run("python3", "-c", READ, name, digest).stdout == f"{digest}\n"
        assert "PUT /v2/team/" in log.read_text()
    finally:
        (unpacked() / "pushed.txt").unlink(missing_ok=True)


# --- building the images from the bundle ---


def test_image_that_is_rebuilt_from_the_bundle_has_the_same_digest(tmp_path: Path) -> None:
    bases = make("bundle-bases", copy(tmp_path / "sources"), tmp_path / "dist", BUILDKIT="")
    there = unpack(made(), tmp_path)
    assert unpack(bases, tmp_path) == there
    registry = f"{REGISTRY}/tests-{secrets.token_hex(4)}"
    ended = install("push", registry, at=there, PATH=os.environ["PATH"])
    assert ended.returncode == 0, ended.stdout
    found = {line.rpartition("/")[2].partition("@")[0]: line for line in ended.stdout.split() if line.startswith(registry)}
    options = f"--build-arg PYTHON={found['python']} --build-arg BASE={found['python3-debian13']}"
    for name in names():
        digest = next(digest for image, digest in images().items() if image.endswith(f"/{name}"))
        built = layout(
            there / "source",
            tmp_path / f"{name}.oci",
            options=options,
            wheels=there / "wheels",
            PLATFORMS="linux/amd64,linux/arm64",
            SERVICE=name,
        )
        assert built.digest == digest
        assert built.manifests() == Layout(there / "images", digest).manifests()
    # install.sh also finds a changed file of the second archive.
    file = there / "bases" / "index.json"
    with replaced(file, flipped(file)):
        assert "bases/index.json is changed" in install("verify", at=there).stdout


# --- wrong usage ---


@pytest.mark.parametrize("arguments", [[], ["help"], ["verify", "a", "b"], ["push"], ["load", "podman"], ["deploy", "a", "b"]])
def test_wrong_usage_prints_the_commands(arguments: list[str]) -> None:
    ended = install(*arguments)
    assert ended.returncode == 64
    assert "Usage: sh install.sh verify [KEY]" in ended.stdout


@pytest.mark.parametrize("shell", ["dash", "busybox", "bash"])
def test_deploy_runs_in_each_shell(tmp_path: Path, shell: str) -> None:
    """A script stands in for kubectl; tests/e2e deploys on a real cluster."""
    ended = install("deploy", "r.example/team", shell=shell, KUBECTL=played(tmp_path, "kubectl", ANSWERS))
    assert ended.returncode == 0, ended.stdout
    assert "apply --server-side --force-conflicts --kustomize=" in (tmp_path / "kubectl.told").read_text()


def test_deploy_says_that_it_needs_kubectl() -> None:
    ended = install("deploy", KUBECTL="no-such-kubectl")
    assert (ended.returncode, ended.stdout) == (1, "install.sh: kubectl is needed: https://kubernetes.io/docs/tasks/tools/\n")
