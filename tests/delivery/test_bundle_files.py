"""install.sh refuses a changed bundle, and handles unusual names, paths and answers. bundle.sh makes a whole bundle or none.

In these tests the bundle has tiny images, and shell scripts stand in for docker, kubectl and helm.
"""

import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
import ssl
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from nanoservice import __version__ as VERSION
from tests.delivery.test_deploy_played import played
from tests.support import ROOT
from tests.support.bundle import copy, name_of
from tests.support.images import scratch
from tests.support.services import names, project

NAME = f"{project()}-1-airgap"
SSH_KEYGEN = pytest.mark.skipif(not shutil.which("ssh-keygen"), reason="needs ssh-keygen")


def image(folder: Path, architecture: str = "amd64") -> str:
    """Write an image into an OCI layout, and return its digest."""
    blobs = folder / "blobs" / "sha256"
    blobs.mkdir(parents=True, exist_ok=True)

    def blob(content: bytes) -> dict[str, object]:
        digest = hashlib.sha256(content).hexdigest()
        (blobs / digest).write_bytes(content)
        return {"digest": f"sha256:{digest}", "size": len(content)}

    config = blob(json.dumps({"os": "linux", "architecture": architecture}).encode())
    manifest = blob(json.dumps({"schemaVersion": 2, "config": config, "layers": [blob(b"layer")]}).encode())
    return str(manifest["digest"])


def script(command: str, *arguments: str | Path) -> str:
    ended = subprocess.run(
        [sys.executable, ROOT / "scripts" / "bundle.py", command, *arguments], capture_output=True, text=True, timeout=30
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.strip()


@functools.cache
def made() -> Path:
    """Make a bundle with tiny images, and return its folder."""
    folder = scratch() / "files" / NAME
    shutil.copytree(ROOT / "scripts" / "bundle", folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("images", "manifests"):
        (folder / name).mkdir()
    source = folder / "source"
    for name in ("scripts/lib", "manifests/components", "manifests/minikube", "manifests/namespace", "manifests/redis"):
        shutil.copytree(ROOT / name, source / name)
    services = [f"{name}/__main__.py" for name in names()]
    for name in ("scripts/secret.sh", "nanoservice/__init__.py", "chart/Chart.yaml", *services):
        (source / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    (folder / f"{project()}-1.tgz").write_bytes(b"chart")
    (folder / "manifests" / "production.yaml").write_text("kind: List\n")
    images = {name: f"registry.example.com/{name}" for name in names()} | {"docker.io/v/v": "docker.io/v/v"}
    layout = scratch() / "files" / "layout"
    for name, repository in images.items():
        digest = script("image", folder / "images", f"{repository}:1", layout, image(layout), "linux/amd64")
        with (folder / "images.txt").open("a") as file:
            file.write(f"{name}={repository}@{digest}\n")
    script("archive", folder, NAME, folder.with_suffix(".tar"))
    return folder


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """Return the folder of a bundle, which has a blank and a quote in its path."""
    folder = tmp_path / "it's a stick" / NAME
    shutil.copytree(made(), folder)
    shutil.copy(made().with_suffix(".tar"), folder.parent)
    return folder


def first(folder: Path) -> str:
    """Return a PATH on which the programs in a folder come first."""
    return f"{folder}:{os.environ['PATH']}"


def install(folder: Path, *arguments: str, cwd: Path | None = None, **environ: str) -> "subprocess.CompletedProcess[str]":
    """Run install.sh from the folder `cwd`, with its error output in its output."""
    return subprocess.run(
        ["sh", str(folder / "install.sh"), *arguments],
        cwd=cwd or folder.parent,
        env={**os.environ, "NAMESPACE": "n", **environ},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=30,
    )


# --- changed files ---

Change = Callable[[Path], object]


def flip(folder: Path) -> None:
    file = folder / "images.txt"
    file.write_text(file.read_text().replace("sha256", "sha255"))


def link(folder: Path) -> None:
    (folder / "images.txt").rename(folder.parent / "elsewhere")
    (folder / "images.txt").symlink_to(folder.parent / "elsewhere")


def linked_folder(folder: Path) -> None:
    (folder / "manifests").rename(folder.parent / "elsewhere")
    (folder / "manifests").symlink_to(folder.parent / "elsewhere")


def folder_in_place_of_file(folder: Path) -> None:
    (folder / "images.txt").unlink()
    (folder / "images.txt").mkdir()


def added(name: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")

    return change


def two_names(folder: Path) -> None:
    """Add a file whose path looks like two names of the bundle."""
    (folder / "images.txt\nsource" / "nanoservice").mkdir(parents=True)
    (folder / "images.txt\nsource" / "nanoservice" / "__init__.py").write_text("x")


def pushed_link(folder: Path) -> None:
    (folder / "pushed.txt").symlink_to(folder.parent / "elsewhere")


def text(change: Callable[[bytes], bytes]) -> Change:
    def edit(folder: Path) -> None:
        file = folder / "SHA256SUMS"
        file.write_bytes(change(file.read_bytes()))

    return edit


# For each change: a function that makes the change, and a line that install.sh prints.
CHANGES: dict[str, tuple[Change, str]] = {
    "changed": (flip, "images.txt is changed"),
    "missing": (lambda folder: (folder / "images.txt").unlink(), "images.txt is missing"),
    "symbolic link": (link, "images.txt is changed"),
    "dangling link": (lambda folder: (folder / "x").symlink_to("nothing"), "x is not of this bundle"),
    "linked folder": (linked_folder, "manifests/production.yaml is missing"),
    "folder": (folder_in_place_of_file, "images.txt is missing"),
    "pipe": (lambda folder: os.mkfifo(folder / "x"), "x is not of this bundle"),
    "two names": (two_names, "images.txt exists twice"),
    "blank": (added("a b"), "a b is not of this bundle"),
    "blank at the end": (added("images.txt "), "images.txt  is not of this bundle"),
    "option": (added("-c"), "-c is not of this bundle"),
    "standard input": (added("-"), "- is not of this bundle"),
    "line end and option": (added("x\n-"), "x is not of this bundle"),
    "pattern": (added("*"), "* is not of this bundle"),
    "hidden": (added("source/.x"), "source/.x is not of this bundle"),
    "in bases/": (added("bases/x"), "install.sh: bases/SHA256SUMS is missing: unpack the bundle again"),
    "link for push": (pushed_link, "pushed.txt is not of this bundle"),
    "no sums": (text(lambda _: b""), "images.txt is not of this bundle"),
    "sums with CRLF": (text(lambda it: it.replace(b"\n", b"\r\n")), "images.txt is not of this bundle"),
    "absolute path": (text(lambda it: it + b"0" * 64 + b"  /etc/passwd\n"), "/etc/passwd is missing"),
    "path upwards": (text(lambda it: it + b"0" * 64 + b"  ../x\n"), "../x is missing"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_change_is_refused_before_anything_is_used(bundle: Path, tmp_path: Path, change: str) -> None:
    docker = played(tmp_path, "docker", "cat >/dev/null")
    made, said = CHANGES[change]
    assert install(bundle, "verify").returncode == 0  # the control
    made(bundle)
    for command in (["verify"], ["load", "docker"]):
        ended = install(bundle, *command, PATH=first(tmp_path))
        assert ended.returncode == 1
        assert said in ended.stdout.splitlines()
    assert not Path(f"{docker}.told").exists()


def test_files_below_bases_have_checksums_of_their_own(bundle: Path) -> None:
    (bundle / "bases").mkdir()
    for name in ("x", "pushed.txt"):
        (bundle / "bases" / name).write_text(name)
    (bundle / "bases" / "SHA256SUMS").write_text(f"{hashlib.sha256(b'x').hexdigest()}  x\n")
    assert "\nbases/pushed.txt is not of this bundle\n" in f"\n{install(bundle, 'verify').stdout}"
    (bundle / "bases" / "pushed.txt").unlink()
    assert install(bundle, "verify").returncode == 0
    (bundle / "bases" / "x").write_text("y")
    assert "bases/x is changed" in install(bundle, "verify").stdout


@pytest.mark.parametrize("tool", ["awk", "find", "sha256sum"])
def test_check_that_cannot_run_does_not_pass(bundle: Path, tmp_path: Path, tool: str) -> None:
    played(tmp_path, tool, "echo broken >&2; exit 1")
    ended = install(bundle, "verify", PATH=first(tmp_path))
    assert ended.returncode == 1
    assert "broken" in ended.stdout
    assert "all files are" not in ended.stdout


# --- the signature ---


def key(folder: Path, kind: str = "ed25519") -> Path:
    file = folder / f"the {kind}"
    subprocess.run(["ssh-keygen", "-q", "-t", kind, "-N", "", "-C", "a b c", "-f", str(file)], check=True)
    return file


def sign(file: Path, private: Path, namespace: str = "file") -> None:
    Path(f"{file}.sig").unlink(missing_ok=True)
    command = ["ssh-keygen", "-q", "-Y", "sign", "-f", str(private), "-n", namespace, str(file)]
    subprocess.run(command, check=True, capture_output=True)


@SSH_KEYGEN
def test_signature_is_checked_with_any_kind_of_key_from_any_folder(bundle: Path, tmp_path: Path) -> None:
    file = bundle.with_suffix(".tar")
    one, other = key(tmp_path), key(tmp_path, "rsa")
    both = tmp_path / "both.pub"
    both.write_text("".join(Path(f"{it}.pub").read_text() for it in (one, other)))
    for private in (one, other):
        sign(file, private)
        for given in (f"{private}.pub", f"the {private.name.split()[1]}.pub", "both.pub"):
            ended = install(bundle, "verify", given, cwd=tmp_path)
            assert (ended.returncode, "is signed by SHA256:" in ended.stdout) == (0, True), ended.stdout
        ended = install(bundle, "verify", f"{one if private == other else other}.pub")
        assert (ended.returncode, "is signed by another key" in ended.stdout) == (1, True)
    file.rename(tmp_path / "a b.tar")
    shutil.move(f"{file}.sig", tmp_path / "a b.tar.sig")
    assert install(bundle, "verify", str(both), cwd=tmp_path, BUNDLE="a b.tar").returncode == 0
    sign(tmp_path / "a b.tar", one, "git")
    assert "is not the file that was signed" in install(bundle, "verify", str(both), cwd=tmp_path, BUNDLE="a b.tar").stdout
    (tmp_path / "none.pub").write_text("no key\n")
    assert "none.pub has no public key" in install(bundle, "verify", "none.pub", cwd=tmp_path, BUNDLE="a b.tar").stdout


@SSH_KEYGEN
def test_key_inside_the_bundle_does_not_replace_the_callers_key(bundle: Path, tmp_path: Path) -> None:
    own, foreign = key(tmp_path), key(tmp_path, "rsa")
    shutil.copy(f"{foreign}.pub", bundle / "trusted.pub")
    shutil.copy(f"{own}.pub", tmp_path / "trusted.pub")
    sums = bundle / "SHA256SUMS"
    digest = hashlib.sha256((bundle / "trusted.pub").read_bytes()).hexdigest()
    sums.write_text(f"{sums.read_text()}{digest}  trusted.pub\n")
    file = bundle.with_suffix(".tar")
    with tarfile.open(file, "w") as tar:
        tar.add(bundle, bundle.name)
    sign(file, foreign)
    ended = install(bundle, "verify", "trusted.pub", cwd=tmp_path)
    assert (ended.returncode, "is signed by another key" in ended.stdout) == (1, True), ended.stdout


@pytest.mark.parametrize(("says", "said"), [("unknown option -- Y", "is older than OpenSSH 8.1"), ("no", "is not the file")])
def test_old_ssh_keygen_is_not_taken_for_a_wrong_signature(bundle: Path, tmp_path: Path, says: str, said: str) -> None:
    Path(f"{bundle}.tar.sig").touch()
    played(tmp_path, "ssh-keygen", f"echo {says} >&2; exit 1")
    ended = install(bundle, "verify", "SHA256:x", PATH=first(tmp_path))
    assert (ended.returncode, said in ended.stdout, says in ended.stdout) == (1, True, True), ended.stdout


def test_empty_key_is_wrong_usage_and_not_a_missing_check(bundle: Path) -> None:
    assert install(bundle, "verify", "").returncode == 64


@SSH_KEYGEN
def test_bases_that_nobody_signed_are_refused(bundle: Path, tmp_path: Path) -> None:
    private = key(tmp_path)
    sign(bundle.with_suffix(".tar"), private)
    (bundle / "bases").mkdir()
    (bundle / "bases" / "x").write_text("x")
    (bundle / "bases" / "SHA256SUMS").write_text(f"{hashlib.sha256(b'x').hexdigest()}  x\n")
    assert install(bundle, "verify").returncode == 0
    ended = install(bundle, "verify", f"{private}.pub")
    assert (ended.returncode, "-bases.tar is missing" in ended.stdout) == (1, True)


# --- registries ---


@pytest.mark.parametrize(
    "registry",
    ["https://r.example", "r.example/Team", "r.example/a b", "user@r.example", "-x", "", "/", "r.example\nx", 'r.example/"x'],
)
def test_registry_that_is_not_the_beginning_of_an_images_name_is_refused(bundle: Path, tmp_path: Path, registry: str) -> None:
    kubectl = played(tmp_path, "kubectl", ANSWERS)
    docker = played(tmp_path, "docker", "cat >/dev/null")
    commands = [["push", registry, "docker"], ["push", registry]] + ([["deploy", registry]] if registry.strip("/") else [])
    for command in commands:
        ended = install(bundle, *command, KUBECTL=kubectl, PATH=first(tmp_path))
        assert (ended.returncode, "REGISTRY must be HOST[:PORT][/PATH]" in ended.stdout) == (1, True), ended.stdout
    assert not Path(f"{docker}.told").exists()
    assert not Path(f"{kubectl}.told").exists() or "apply" not in Path(f"{kubectl}.told").read_text()


DOCKER = f"case $1 in load) cat >/dev/null ;; push) echo '1: digest: sha256:{'a' * 64} size: 1' ;; esac"
KEEPS = 'for word; do case $word in --kustomize=*) cp "${word#*=}"/kustomization.yaml "$0.yaml" ;; esac; done; '
ANSWERS = """case "$*" in *version*) printf '{"serverVersion": {"minor": "30"}}' ;; esac"""


# A cluster on which a bundle is deployed.
NAMESPACE = f"*installed-bundle*) echo 0.0.1 chart ;; *'get namespace'*) echo there {project()} ;;"
INSTALLED = f"{ANSWERS.removesuffix('esac')} {NAMESPACE} esac"


def deployed(bundle: Path, folder: Path, *arguments: str) -> list[dict[str, str]]:
    """Deploy on a fake cluster, and return the images of the kustomization."""
    kubectl = played(folder, "kubectl", KEEPS + ANSWERS)
    ended = install(bundle, "deploy", *arguments, KUBECTL=kubectl)
    assert ended.returncode == 0, ended.stdout
    images: list[dict[str, str]] = yaml.safe_load((folder / "kubectl.yaml").read_text())["images"]
    return images


@pytest.mark.parametrize(("registry", "alike"), [("r.example:5/t", "rxexample:5/t"), ("[::1]:5000", "[::2]:5000")])
def test_digests_in_another_registry_stay_and_are_not_used(bundle: Path, tmp_path: Path, registry: str, alike: str) -> None:
    played(tmp_path, "docker", DOCKER)
    for one in (registry, alike, registry, f"{registry}/"):
        ended = install(bundle, "push", one, "docker", PATH=first(tmp_path))
        assert ended.returncode == 0, ended.stdout
    lines = (bundle / "pushed.txt").read_text().splitlines()
    assert sorted(lines) == sorted(f"{one}/{base}@sha256:{'a' * 64}" for one in (registry, alike) for base in (*names(), "v"))
    ended = install(bundle, "verify")
    assert (ended.returncode, "pushed.txt was not checked" in ended.stdout) == (0, True)
    images = deployed(bundle, tmp_path, registry)
    assert [it["newName"] for it in images] == [f"{registry}/{it}" for it in (*names(), "v")]
    assert {it["digest"] for it in images} == {f"sha256:{'a' * 64}"}
    wanted = [line.partition("@")[2] for line in (bundle / "images.txt").read_text().splitlines()]
    assert [it["digest"] for it in deployed(bundle, tmp_path, "r.example:5")] == wanted
    # Lines that `push` does not write are ignored.
    unusual = ["sha256:a", f"sha256:{'a' * 64}, newTag: evil", 'a"}', f"sha256:{'a' * 64}@"]
    (bundle / "pushed.txt").write_text("".join(f"{registry}/{names()[0]}@{it}\n" for it in unusual))
    assert [it["digest"] for it in deployed(bundle, tmp_path, registry)] == wanted


def test_push_names_the_programs_of_which_it_needs_one(bundle: Path, tmp_path: Path) -> None:
    for name in "sh dirname mktemp cp rm sed grep find awk sort tr cat sha256sum shasum".split():
        if found := shutil.which(name):
            (tmp_path / name).symlink_to(found)
    old = played(tmp_path, "python3", "exit 1")
    said = "to push, Python 3.8 or newer is needed (PYTHON=...), or Docker"
    for arguments in ([], ["python"]):
        ended = install(bundle, "push", "r.example", *arguments, PATH=str(tmp_path))
        assert (ended.returncode, said in ended.stdout) == (1, True), ended.stdout
    docker = played(tmp_path, "docker", DOCKER)
    ended = install(bundle, "push", "r.example", "python", PATH=str(tmp_path), PYTHON=old)
    assert (ended.returncode, said in ended.stdout) == (1, True), ended.stdout
    assert not Path(f"{docker}.told").exists()


def test_push_by_docker_without_a_digest_fails(bundle: Path, tmp_path: Path) -> None:
    played(tmp_path, "docker", "case $1 in load) cat >/dev/null ;; esac")
    ended = install(bundle, "push", "r.example", "docker", PATH=first(tmp_path))
    assert (ended.returncode, "does not print the digest of" in ended.stdout) == (1, True)
    assert not (bundle / "pushed.txt").exists()


@pytest.mark.parametrize("tool", ["python", "docker"])
def test_push_from_a_folder_that_cannot_be_written_prints_the_names(bundle: Path, tmp_path: Path, tool: str) -> None:
    played(tmp_path, "docker", DOCKER)
    played(tmp_path, "touch", "echo 'read-only file system' >&2; exit 1")
    python = played(tmp_path, "python3", f"echo r.example/v@sha256:{'a' * 64}")
    ended = install(bundle, "push", "r.example", tool, PATH=first(tmp_path), PYTHON=python)
    assert f"r.example/v@sha256:{'a' * 64}" in ended.stdout.splitlines()
    # Docker may give an image another digest, which `deploy` has to read from pushed.txt.
    assert ended.returncode == (0 if tool == "python" else 1), ended.stdout
    assert ("pushed.txt cannot be written" in ended.stdout) == (tool == "docker")
    assert not (bundle / "pushed.txt").exists()


def test_load_uses_ctr_if_docker_does_not_answer(bundle: Path, tmp_path: Path) -> None:
    sleep = shutil.which("sleep")
    played(tmp_path, "docker", f"exec '{sleep}' 60")
    # The time limit is a second. If it was over at once, it could end before the shell has started Docker.
    played(tmp_path, "sleep", f"exec '{sleep}' 1")
    ctr = played(tmp_path, "ctr", "cat >/dev/null")
    ended = install(bundle, "load", PATH=first(tmp_path))
    assert ended.returncode == 0, ended.stdout
    assert "images import" in Path(f"{ctr}.told").read_text()


def test_error_of_docker_is_printed_if_there_is_no_ctr(bundle: Path, tmp_path: Path) -> None:
    played(tmp_path, "docker", "echo 'permission denied' >&2; exit 1")
    ended = install(bundle, "load", PATH=first(tmp_path), CTR="no-such-ctr --address=x")
    assert (ended.returncode, "permission denied\n" in ended.stdout) == (1, True), ended.stdout
    played(tmp_path, "ctr", "echo 'no containerd' >&2; exit 1")
    ended = install(bundle, "load", PATH=first(tmp_path), CTR="ctr --address=x")
    assert (ended.returncode, "no containerd\n" in ended.stdout) == (1, True), ended.stdout


# --- the cluster ---


def test_deploy_writes_nothing_into_the_bundle(bundle: Path, tmp_path: Path) -> None:
    """After an interrupted deploy, files in the bundle would make `verify` fail. The folder may also be read-only."""
    before = sorted(bundle.rglob("*"))
    kubectl = played(tmp_path, "kubectl", f'case "$*" in *apply*kustomize*) kill -9 $PPID ;; esac\n{ANSWERS}')
    assert install(bundle, "deploy", KUBECTL=kubectl, TMPDIR=str(tmp_path)).returncode == -9
    assert sorted(bundle.rglob("*")) == before
    assert install(bundle, "verify").returncode == 0


@pytest.mark.parametrize(("variant", "added"), [("production", True), ("production-openshift", False)])
def test_component_is_not_added_to_a_variant_that_has_it(bundle: Path, tmp_path: Path, variant: str, added: bool) -> None:
    shutil.copy(bundle / "manifests" / "production.yaml", bundle / "manifests" / "production-openshift.yaml")
    sums = (bundle / "SHA256SUMS").read_text().splitlines(keepends=True)
    sums += [line.replace("/production.yaml", "/production-openshift.yaml") for line in sums if "/production.yaml" in line]
    (bundle / "SHA256SUMS").write_text("".join(sums))
    openshift = 'case "$*" in *api-versions*) echo security.openshift.io/v1 ;; esac\n'
    kubectl = played(tmp_path, "kubectl", openshift + KEEPS + ANSWERS)
    assert install(bundle, "deploy", KUBECTL=kubectl, VARIANT=variant).returncode == 0
    assert ("components/openshift" in (tmp_path / "kubectl.yaml").read_text()) == added


@pytest.mark.parametrize("variant", ["../manifests/production", "production.yaml", "", "x y"])
def test_variant_that_does_not_exist_is_named(bundle: Path, tmp_path: Path, variant: str) -> None:
    kubectl = played(tmp_path, "kubectl", ANSWERS)
    ended = install(bundle, "deploy", KUBECTL=kubectl, VARIANT=variant)
    if variant:
        assert (ended.returncode, "the variants are chart production\n" in ended.stdout) == (1, True), ended.stdout
    else:
        assert ended.returncode == 0, ended.stdout


@pytest.mark.parametrize("namespace", ['n", x: "y', "n\nx", "n/x", "n x", "N&"])
def test_namespace_that_is_not_a_name_is_refused(bundle: Path, tmp_path: Path, namespace: str) -> None:
    kubectl = played(tmp_path, "kubectl", ANSWERS)
    ended = install(bundle, "deploy", KUBECTL=kubectl, NAMESPACE=namespace)
    assert (ended.returncode, "a namespace has only lower-case letters" in ended.stdout) == (1, True), ended.stdout
    assert not Path(f"{kubectl}.told").exists()


def test_relative_paths_are_those_of_the_caller(bundle: Path, tmp_path: Path) -> None:
    for name in ("kubectl", "helm"):
        played(tmp_path, name, ANSWERS)
    ended = install(bundle, "deploy", cwd=tmp_path, KUBECTL="./kubectl", HELM="./helm", VALUES="my values.yaml", VARIANT="chart")
    assert ended.returncode == 0, ended.stdout
    assert f"--values={tmp_path}/my values.yaml --set=services.{names()[0]}.image=" in (tmp_path / "helm.told").read_text()


def test_relative_paths_for_other_programs_are_those_of_the_caller(bundle: Path, tmp_path: Path) -> None:
    kubectl = played(tmp_path, "kubectl", 'echo "$KUBECONFIG" >"$0.config"; ' + ANSWERS)
    for given, used in (
        ("my config", f"{tmp_path}/my config"),
        ("/etc/*", "/etc/*"),
        (f"a:{tmp_path}/b::c", f"{tmp_path}/a:{tmp_path}/b::{tmp_path}/c"),
    ):
        ended = install(bundle, "deploy", cwd=tmp_path, KUBECTL=kubectl, KUBECONFIG=given)
        assert ended.returncode == 0, ended.stdout
        assert (tmp_path / "kubectl.config").read_text() == f"{used}\n"
    docker = played(tmp_path, "docker", 'echo "$DOCKER_CONFIG" >"$0.config"; cat >/dev/null')
    (tmp_path / "temporary").mkdir()
    environ = {"DOCKER_CONFIG": "login", "TMPDIR": "temporary", "PATH": first(tmp_path)}
    ended = install(bundle, "load", "docker", cwd=tmp_path, **environ)
    assert ended.returncode == 0, ended.stdout
    assert Path(f"{docker}.config").read_text() == f"{tmp_path}/login\n"


def test_namespace_has_the_projects_name_by_default(bundle: Path, tmp_path: Path) -> None:
    kubectl = played(tmp_path, "kubectl", KEEPS + ANSWERS)
    assert install(bundle, "deploy", KUBECTL=kubectl, NAMESPACE="").returncode == 0
    assert yaml.safe_load((tmp_path / "kubectl.yaml").read_text())["namespace"] == project()


def test_values_for_a_variant_that_has_none_are_refused(bundle: Path, tmp_path: Path) -> None:
    kubectl = played(tmp_path, "kubectl", ANSWERS)
    ended = install(bundle, "deploy", KUBECTL=kubectl, VALUES="values.yaml")
    assert (ended.returncode, "only the chart has values: set VARIANT=chart" in ended.stdout) == (1, True), ended.stdout
    assert "apply" not in Path(f"{kubectl}.told").read_text()
    # Of a release that is deployed already, the namespace has the variant.
    kubectl, helm = played(tmp_path, "kubectl", INSTALLED), played(tmp_path, "helm", "")
    ended = install(bundle, "upgrade", KUBECTL=kubectl, HELM=helm, VALUES="values.yaml")
    assert ended.returncode == 0, ended.stdout


def test_chart_takes_over_the_objects_of_another_variant(bundle: Path, tmp_path: Path) -> None:
    """The tests on a cluster install the chart with these options, and without them, in place of what `make deploy` made."""
    production = INSTALLED.replace("0.0.1 chart", "0.0.1 production")
    assert production != INSTALLED
    kubectl, helm = played(tmp_path, "kubectl", production), played(tmp_path, "helm", "")
    assert install(bundle, "upgrade", KUBECTL=kubectl, HELM=helm, VARIANT="chart").returncode == 0
    assert "upgrade --install --take-ownership --force-conflicts --wait" in Path(f"{helm}.told").read_text()


def test_values_of_the_release_are_used_again(bundle: Path, tmp_path: Path) -> None:
    kubectl = played(tmp_path, "kubectl", INSTALLED)
    keeps = 'for word; do case $word in --values=*) cat "${word#*=}" >"$0.values" ;; esac; done'
    helm = played(tmp_path, "helm", f'case $1 in get) echo "expose: none" ;; esac; {keeps}')
    assert install(bundle, "upgrade", KUBECTL=kubectl, HELM=helm).returncode == 0
    assert (tmp_path / "helm.values").read_text() == "expose: none\n"
    played(tmp_path, "helm", f'case $1 in get) echo "Error: release: not found" >&2; exit 1 ;; esac; {keeps}')
    assert install(bundle, "upgrade", KUBECTL=kubectl, HELM=helm).returncode == 0
    assert (tmp_path / "helm.values").read_text() == ""
    played(tmp_path, "helm", f'case $1 in get) echo "Error: no cluster" >&2; exit 1 ;; esac; {keeps}')
    assert install(bundle, "upgrade", KUBECTL=kubectl, HELM=helm).returncode == 1


def test_chart_is_not_deployed_without_a_component_that_the_cluster_needs(bundle: Path, tmp_path: Path) -> None:
    openshift = 'case "$*" in *api-versions*) echo security.openshift.io/v1 ;; esac\n'
    kubectl, helm = played(tmp_path, "kubectl", openshift + ANSWERS), played(tmp_path, "helm", "")
    ended = install(bundle, "deploy", KUBECTL=kubectl, HELM=helm, VARIANT="chart")
    assert (ended.returncode, "components that the chart does not have (openshift)" in ended.stdout) == (1, True), ended.stdout
    assert not Path(f"{helm}.told").exists()


def test_diff_fails_if_helm_fails(bundle: Path, tmp_path: Path) -> None:
    kubectl, helm = played(tmp_path, "kubectl", INSTALLED), played(tmp_path, "helm", "exit 1")
    ended = install(bundle, "diff", KUBECTL=kubectl, HELM=helm, VARIANT="chart")
    assert (ended.returncode, "Helm failed" in ended.stdout) == (2, True), ended.stdout
    assert "diff" not in Path(f"{kubectl}.told").read_text()


@pytest.mark.parametrize("password", ["a'b", 'a"b\\c', "ü€", "", "$(id) `id` %s %%"])
def test_password_of_the_registry_arrives_whole_and_in_no_argument(bundle: Path, tmp_path: Path, password: str) -> None:
    keeps = 'for word; do case $word in --from-file=*/.docker*) cp -p "${word#*=}" "$0.json" ;; esac; done\n'
    kubectl = played(tmp_path, "kubectl", keeps + ANSWERS)
    temporary = tmp_path / "tmp"
    temporary.mkdir()

    def deploy(password: str) -> "subprocess.CompletedProcess[str]":
        environ = {"KUBECTL": kubectl, "REGISTRY_USERNAME": "me", "REGISTRY_PASSWORD": password, "TMPDIR": str(temporary)}
        return install(bundle, "deploy", "r.example:5/team", cwd=None, **environ)

    ended = deploy(password)
    assert ended.returncode == 0, ended.stdout
    written = json.loads((tmp_path / "kubectl.json").read_text())
    assert written == {"auths": {"r.example:5": {"username": "me", "password": password}}}
    assert (tmp_path / "kubectl.json").stat().st_mode & 0o777 == 0o600
    assert not password or password not in Path(f"{kubectl}.told").read_text()
    assert not list(temporary.iterdir())
    ended = deploy(f"{password}\nx")
    assert (ended.returncode, "has a line end" in ended.stdout) == (1, True)


@pytest.mark.skipif(not shutil.which("openssl"), reason="needs openssl")
def test_certificate_of_the_page_is_valid_for_each_server_of_redis(bundle: Path) -> None:
    page = (ROOT / "docs" / "air-gap.md").read_text()
    (block,) = re.findall(r"```sh\n([^`]*openssl req [^`]*)```", page)
    subprocess.run(["sh", "-ec", block], cwd=bundle, check=True, capture_output=True, timeout=60)
    assert install(bundle, "verify").returncode == 0
    folder = bundle.parent / "tls"
    for name in re.findall(r"--from-file=\.\./tls/(\S+)", page):
        assert (folder / name).stat().st_size
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(folder / "tls.crt", folder / "tls.key")
    client = ssl.create_default_context(cafile=folder / "ca.crt")
    client.verify_flags |= ssl.VERIFY_X509_STRICT  # the default of Python 3.13, which the image has

    def handshake(host: str) -> None:
        one, other = ssl.MemoryBIO(), ssl.MemoryBIO()
        ends = [client.wrap_bio(one, other, server_hostname=host), server.wrap_bio(other, one, server_side=True)]
        for end in ends * 3:
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()
        assert ends[0].version() == "TLSv1.3"

    for host in ("redis", "redis-0", "redis-1", "redis-2"):
        handshake(host)
    with pytest.raises(ssl.SSLCertVerificationError):  # the control
        handshake("another")


# --- making the bundle ---


@pytest.mark.parametrize(
    ("name", "said"), [("a b", "a blank or backslash"), ("a\\b", "a blank or backslash"), ("a" * 101, "too long")]
)
def test_path_that_a_bundle_cannot_have_is_named(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_text("x")
    command = [sys.executable, "scripts/bundle.py", "archive", str(tmp_path / "in"), NAME, str(tmp_path / "out.tar")]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert (ended.returncode, ended.stderr.count("\n"), said in ended.stderr) == (1, 1, True), ended.stderr


def test_modes_of_the_files_do_not_change_the_archive(tmp_path: Path) -> None:
    written = []
    for mode in (0o600, 0o644, 0o777):
        folder = tmp_path / oct(mode)
        folder.mkdir()
        for name, content in (("script", "#!/bin/sh\n"), ("text", "")):
            (folder / name).write_text(content)
            (folder / name).chmod(mode)
        script("archive", folder, NAME, folder.with_suffix(".tar"))
        with tarfile.open(folder.with_suffix(".tar")) as tar:
            assert {it.name.rpartition("/")[2]: it.mode for it in tar} == {"SHA256SUMS": 0o644, "script": 0o755, "text": 0o644}
        written.append(folder.with_suffix(".tar").read_bytes())
    assert len(set(written)) == 1


class Making:
    """A copy of the repository in which bundle.sh runs, with fake programs in place of oras, kubectl and helm."""

    _ORAS = """case "$*" in
      resolve*) cat "$0.digest" ;;
      "manifest fetch --output"*) cp "$0.layout/blobs/sha256/$(cut -c 8- "$0.digest")" "$4" ;;
      copy*) for word; do :; done; mkdir -p "${word%:*}"; cp -R "$0.layout/." "${word%:*}" ;;
    esac"""

    def __init__(self, folder: Path) -> None:
        self.sources = copy(folder / "sources")
        self.dist = folder / "dist"
        self.wheels = folder / "wheels"
        self.programs = folder / "programs"
        for it in (self.dist, self.wheels, self.programs):
            it.mkdir()
        oras = played(self.programs, "oras", self._ORAS)
        Path(f"{oras}.digest").write_text(image(Path(f"{oras}.layout")))
        package = f'mkdir -p "$3" && tar -cf "$3/{project()}-{VERSION}.tgz" -C "$4" values.yaml'
        self.environ = {
            **os.environ,
            "ORAS": oras,
            "HELM": played(self.programs, "helm", package),
            "KUBECTL": played(self.programs, "kubectl", "echo 'kind: List'"),
            "DIST": str(self.dist),
            "WHEELS": str(self.wheels),
            "VENV": sys.prefix,
            "PLATFORMS": "linux/amd64",
            "REGISTRIES": "",
        }
        for name in names():
            digest = image(self.sources / f"{name}.oci")
            (self.sources / f"{name}.oci" / "index.json").write_text(json.dumps({"manifests": [{"digest": digest}]}))
            (self.dist / f"{name}.spdx.json").write_text("{}")

    def run(self, **environ: str) -> "subprocess.CompletedProcess[str]":
        """Run bundle.sh, with its error output in its output."""
        return subprocess.run(
            ["sh", "scripts/bundle.sh"],
            cwd=self.sources,
            env={**self.environ, **environ},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
        )


def test_bundle_has_what_git_knows_and_what_is_locked(tmp_path: Path) -> None:
    making = Making(tmp_path)
    for name in (".env.local", "secret.txt", "caf\u00e9.md"):
        (making.sources / name).write_text("x")
    subprocess.run(["git", "add", "caf\u00e9.md"], cwd=making.sources, check=True)
    (making.wheels / "old.whl").write_text("a wheel that is in no lock")
    (making.wheels / ".DS_Store").write_text("x")
    (making.wheels / "new.whl").write_text("a wheel")
    with (making.sources / "requirements.txt").open("a") as lock:
        lock.write(f"# sha256:{hashlib.sha256(b'a wheel').hexdigest()}\n")
    ended = making.run()
    assert ended.returncode == 0, ended.stdout
    file = making.dist / f"{name_of(making.sources)}.tar"
    with tarfile.open(file) as tar:
        inside = {it.partition("/")[2] for it in tar.getnames()}
    assert {"source/Containerfile", "source/caf\u00e9.md", "wheels/new.whl", "install.sh", "SHA256SUMS"} <= inside
    assert not {it for it in inside if it.endswith((".env.local", "secret.txt", "old.whl", ".DS_Store"))}
    assert sorted(it.name for it in making.dist.iterdir()) == sorted([file.name, *(f"{name}.spdx.json" for name in names())])
    # An existing bundle stays if the next bundle cannot be made.
    before = file.read_bytes()
    played(making.programs, "kubectl", "exit 1")
    assert making.run().returncode != 0
    assert file.read_bytes() == before
    assert sorted(it.name for it in making.dist.iterdir()) == sorted([file.name, *(f"{name}.spdx.json" for name in names())])


def test_bundle_without_sources_is_not_made(tmp_path: Path) -> None:
    making = Making(tmp_path)
    said = "the bundle has the sources that git knows, and git knows none here"
    played(making.programs, "git", "exit 127")
    ended = making.run(PATH=first(making.programs))
    assert (ended.returncode, said in ended.stdout) == (1, True), ended.stdout
    shutil.rmtree(making.sources / ".git")  # as in an archive of the sources, which may be inside another repository
    for inside in (False, True):
        if inside:
            subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
        ended = making.run()
        assert (ended.returncode, said in ended.stdout) == (1, True), ended.stdout


def test_bundle_of_one_service_of_several_is_not_made(tmp_path: Path) -> None:
    """The image of another service could be old, or LAYOUT could be the image of one service under the name of another."""
    making = Making(tmp_path)
    (making.sources / "another").mkdir()
    (making.sources / "another" / "__main__.py").touch()
    for given in ({"SERVICE": names()[0]}, {"SERVICE": names()[0], "LAYOUT": f"{names()[0]}.oci"}):
        ended = making.run(**given)
        assert (ended.returncode, "a bundle has the images of all services" in ended.stdout) == (1, True), ended.stdout
    assert not list(making.dist.glob("*.tar"))


def test_bases_that_cannot_be_read_are_not_left_out(tmp_path: Path) -> None:
    making = Making(tmp_path)
    ended = making.run(BASES="1", BUILDKIT="", PYTHON_IMAGE="r.example/python:3@sha256:0", BASE_IMAGE="r.example/base:1@sha256:0")
    assert ended.returncode == 0, ended.stdout
    oras = played(making.programs, "oras", 'case "$*" in *base*) exit 1 ;; esac\n' + Making._ORAS)
    assert oras == making.environ["ORAS"]
    ended = making.run(BASES="1", BUILDKIT="", PYTHON_IMAGE="r.example/base:1@sha256:0", BASE_IMAGE="r.example/python:3@sha256:0")
    assert (ended.returncode, "r.example/base:1@sha256:0 cannot be read" in ended.stdout) == (1, True), ended.stdout


@SSH_KEYGEN
def test_signing_key_that_cannot_be_read_is_named_before_anything_is_built(tmp_path: Path) -> None:
    engine = played(tmp_path, "docker", "exit 1")
    given = [f"VENV={sys.prefix}", f"ENGINE={engine}", f"WHEELS={tmp_path}", f"DIST={tmp_path}", "SIGNING_KEY=no-such-key"]
    command = ["make", f"--old-file={sys.prefix}/can-run", "bundle", *given]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert ended.returncode != 0
    assert "no-such-key" in ended.stderr
    assert not Path(f"{engine}.told").exists()
