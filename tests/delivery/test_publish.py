"""The published image is the image that was built, and has an SBOM. An image that was changed after the build is refused."""

import contextlib
import functools
import hashlib
import http.client
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from spdx_tools.spdx.parser.parse_anything import parse_file
from spdx_tools.spdx.validation.document_validator import validate_full_spdx_document

from nanoservice import __version__ as VERSION
from nanoservice.testing.waiting import wait_for
from tests.support import ROOT
from tests.support.helm import helm
from tests.support.images import WHEELS, Layout, engine, layout, run, sources
from tests.support.published import REGISTRY, SERVICE, published
from tests.support.services import project

pytestmark = pytest.mark.registry

SBOM = f"{SERVICE}.spdx.json"
BUNDLE = f"{project()}-{VERSION}-airgap.tar"


def make(*arguments: str, **environ: str) -> "subprocess.CompletedProcess[str]":
    given = {
        **os.environ,
        "VENV": sys.prefix,
        "SERVICE": SERVICE,
        "LAYOUT": str(published().layout),
        "DIST": str(published().dist),
        **environ,
    }
    return subprocess.run(["make", "--no-print-directory", *arguments], cwd=ROOT, env=given, text=True, capture_output=True)


@functools.cache
def program() -> str:
    command = ["go", "-C", str(ROOT / "scripts" / "tools" / "oras"), "tool", "-n", "oras"]
    return subprocess.run(command, check=True, text=True, capture_output=True).stdout.strip()


def oras(*arguments: str, check: bool = True) -> str:
    ended = subprocess.run([program(), *arguments], text=True, capture_output=True, timeout=120)
    assert not check or ended.returncode == 0, ended.stderr
    return ended.stdout if check else f"{ended.returncode}\n{ended.stderr}"


def referrers(image: str) -> dict[str, str]:
    """Return the referrers of the image, as a dict from artifact type to digest."""
    found = json.loads(oras("discover", "--format", "json", image)).get("referrers", [])
    assert len(found) == len({one["artifactType"] for one in found})
    return {one["artifactType"]: one["digest"] for one in found}


def test_both_registries_have_the_version_under_the_same_digest() -> None:
    one = published()
    assert re.fullmatch("sha256:[0-9a-f]{64}", one.digest)
    assert Layout(one.layout).digest == one.digest
    for repository in one.repositories:
        assert oras("resolve", f"{repository}:{VERSION}").strip() == one.digest
        assert oras("repo", "tags", "--exclude-digest-tags", repository).split() == [VERSION]  # there is no tag `latest`
    assert set(Layout(one.layout).manifests()) == {"linux/amd64", "linux/arm64"}


def test_image_pulled_by_digest_counts(network: str) -> None:
    if "docker" not in engine():
        pytest.skip("buildah runs no containers")
    image = f"{published().repositories[1]}@{published().digest}"
    run("pull", image)
    name = run("run", "--detach", "--rm", "--network", network, "--env=REDIS_HOST=store", image)
    ask = "import urllib.request as u; print(u.urlopen('http://localhost:8080/', timeout=5).read().decode())"
    try:
        wait_for(lambda: "seen " in run("exec", name, "/usr/bin/python3.13", "-c", ask, check=False), 30)
    finally:
        run("rm", "--force", name)


def test_sbom_refers_to_the_image_and_can_be_pulled(tmp_path: Path) -> None:
    one = published()
    for repository in one.repositories:
        found = referrers(f"{repository}@{one.digest}")
        assert set(found) == {"application/spdx+json"}
        oras("pull", "--output", str(tmp_path), f"{repository}@{found['application/spdx+json']}")
        assert (tmp_path / SBOM).read_bytes() == (one.dist / "release" / SBOM).read_bytes()


# --- the SBOM ---


def contents() -> Any:
    return json.loads((published().dist / "release" / SBOM).read_text())


def test_list_of_contents_is_valid_spdx() -> None:
    document = parse_file(str(published().dist / "release" / SBOM))
    assert not [message.validation_message for message in validate_full_spdx_document(document)]


def test_list_of_contents_is_the_same_each_time(tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert make("sbom", DIST=str(tmp_path / name)).returncode == 0
    first = (tmp_path / "one" / SBOM).read_bytes()
    assert first == (tmp_path / "two" / SBOM).read_bytes()
    assert first == (published().dist / "release" / SBOM).read_bytes()
    assert make("sbom", DIST=str(tmp_path / "later"), SOURCE_DATE_EPOCH="1700000000").returncode == 0
    assert json.loads((tmp_path / "later" / SBOM).read_text())["creationInfo"]["created"] == "2023-11-14T22:13:20Z"


def test_list_of_contents_has_all_packages_of_each_platform() -> None:
    document = contents()
    by_id = {one["SPDXID"]: one for one in document["packages"]}
    links: dict[str, set[str]] = {}
    for link in document["relationships"]:
        if link["relationshipType"] == "CONTAINS":
            links.setdefault(link["spdxElementId"], set()).add(link["relatedSpdxElement"])
    lock = (ROOT / "requirements.txt").read_text()
    locked = set(re.findall(r"^([a-z0-9-]+)==(\S+)", lock, re.MULTILINE))
    index = by_id["SPDXRef-Image-index"]
    assert index["checksums"] == [{"algorithm": "SHA256", "checksumValue": published().digest.removeprefix("sha256:")}]
    assert len(links["SPDXRef-Image-index"]) == 2
    for image in links["SPDXRef-Image-index"]:
        locators = [by_id[one]["externalRefs"][0]["referenceLocator"] for one in links[image]]
        assert {found for one in locators for found in re.findall("pkg:pypi/(.+)@(.+)[?]", one)} == locked
        wheels = [by_id[one] for one in links[image] if one.startswith("SPDXRef-Python-")]
        for wheel in wheels:
            assert f"sha256:{wheel['checksums'][0]['checksumValue']}" in lock
            assert wheel["licenseDeclared"] != "NOASSERTION"
        architecture = image.rpartition("-")[2]
        machine = {"amd64": "x86_64", "arm64": "aarch64"}[architecture]
        assert all(one["packageFileName"].endswith((f"{machine}.whl", "-any.whl")) for one in wheels)
        assert [
            one for one in locators if one.startswith("pkg:deb/debian/libc6@") and f"arch={architecture}&distro=debian-13" in one
        ]
    amd64 = next(layer for layer in platform_layers("linux/amd64"))
    packages = {name.rpartition("/")[2] for name in amd64 if re.search(r"dpkg/status\.d/[^/]+(?<!\.md5sums)$", name)}
    assert packages == {by_id[one]["name"] for one in links["SPDXRef-Image-linux-amd64"] if one.startswith("SPDXRef-Debian-")}


def platform_layers(platform: str) -> Iterator[list[str]]:
    """Yield one list: the names of all files in all layers of the image for `platform`."""
    one = Layout(published().layout)
    child = Layout(published().layout, one.manifests()[platform])
    yield [name for layer in child.layers() for name in layer.getnames()]


def test_list_of_contents_names_licences_and_dependencies() -> None:
    document = contents()
    texts = {one["licenseId"]: one["extractedText"] for one in document["hasExtractedLicensingInfos"]}
    libc = next(one for one in document["packages"] if one["name"] == "libc6")
    assert "GNU C Library" in texts[libc["licenseDeclared"]]
    wants = {(link["spdxElementId"], link["relatedSpdxElement"]) for link in document["relationships"]}
    assert ("SPDXRef-Image-linux-amd64", "SPDXRef-Python-aiohttp-linux-amd64") in wants
    assert ("SPDXRef-Python-yarl-linux-arm64", "SPDXRef-Python-multidict-linux-arm64") in wants


def test_image_of_a_wheel_that_is_not_in_the_lock_gets_no_list_of_contents(tmp_path: Path) -> None:
    lock = tmp_path / "requirements.txt"
    text = (ROOT / "requirements.txt").read_text()
    digest = hashlib.sha256(next(WHEELS.glob("attrs-*.whl")).read_bytes()).hexdigest()
    lock.write_text(text.replace(digest, "0" * 64))
    command = [sys.executable, str(ROOT / "scripts" / "sbom.py"), str(published().layout), str(lock), str(WHEELS), VERSION]
    ended = subprocess.run(command, text=True, capture_output=True)
    assert ended.returncode != 0
    assert re.search(r"attrs-\S+\.whl, from which the image was made, is not in the lock", ended.stderr)


# --- the files of a release ---


def test_manifests_of_a_release_name_the_image_by_digest() -> None:
    folder = published().dist / "release"
    manifests = sorted(folder.glob("*.yaml"))
    assert {file.name for file in manifests} == {file.name for file in (ROOT / "manifests" / "rendered").iterdir()} - {"dev.yaml"}
    for file in manifests:
        images = re.findall(r"^\s+image: (\S+)$", file.read_text(), re.MULTILINE)
        assert f"{published().repositories[0]}@{published().digest}" in images
        assert all(re.search("@sha256:(?!0{64})[0-9a-f]{64}$", image) for image in images)


def test_files_from_an_earlier_run_are_not_in_a_release(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(published().dist / "release", tmp_path / "dist" / "release"))
    assert (folder / BUNDLE).exists()
    (folder / "left.yaml").write_text("from another time\n")
    assert make("release-files", DIST=str(tmp_path / "dist"), REGISTRIES=published().registries[0]).returncode == 0
    assert {file.name for file in folder.iterdir()} == {file.name for file in (published().dist / "release").iterdir()} - {BUNDLE}


def test_files_that_commands_make_are_not_in_the_repository() -> None:
    command = ["git", "ls-files", "--cached", "--ignored", "--exclude-standard"]
    assert not subprocess.run(command, cwd=ROOT, check=True, text=True, capture_output=True).stdout


def test_checksums_find_what_was_changed(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(published().dist / "release", tmp_path / "release"))
    command = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    files = {file.name for file in folder.iterdir()} - {"SHA256SUMS"}
    said = subprocess.run(command, cwd=folder, check=True, text=True, capture_output=True).stdout
    assert said.splitlines() == [f"{name}: OK" for name in sorted(files)]
    with open(folder / "production.yaml", "a") as file:
        file.write("# more\n")
    assert subprocess.run(command, cwd=folder, capture_output=True).returncode != 0


def test_changes_of_a_release_are_those_of_its_version() -> None:
    _, _, rest = (ROOT / "CHANGELOG.md").read_text().partition(f"\n## {VERSION}\n")
    section, _, _ = rest.partition("\n## ")
    assert section.strip().startswith("- ")
    assert (published().dist / "changes.md").read_text().strip() == section.strip()


# --- the chart ---

CHART = f"charts/{project()}"


def test_chart_of_the_release_is_beside_the_images_of_the_first_registry(tmp_path: Path) -> None:
    first, second = published().registries
    file = published().dist / "release" / f"{project()}-{VERSION}.tgz"
    helm("pull", "--plain-http", f"oci://{first}/{CHART}", f"--version={VERSION}", f"--destination={tmp_path}")
    assert (tmp_path / file.name).read_bytes() == file.read_bytes()
    assert oras("resolve", f"{second}/{CHART}:{VERSION}", check=False).startswith("1\n")
    made = [it for it in yaml.safe_load_all(helm("template", "it", str(file)).stdout) if it and it["kind"] == "Deployment"]
    images = {it["metadata"]["name"]: it["spec"]["template"]["spec"]["containers"][0]["image"] for it in made}
    assert images[SERVICE] == f"{published().repositories[0]}@{published().digest}"
    digest = oras("resolve", f"{first}/{CHART}:{VERSION}").strip()
    assert (published().dist / "chart").read_text() == f"{first}/{CHART}@{digest}\n"  # `make sign` signs this
    manifest = json.loads(oras("manifest", "fetch", f"{first}/{CHART}@{digest}"))
    assert manifest["annotations"]["org.opencontainers.image.created"].startswith("1980-01-01T00:00:00")


def test_chart_that_is_published_is_not_moved(tmp_path: Path) -> None:
    registry = f"{published().registries[0]}"
    before = oras("resolve", f"{registry}/{CHART}:{VERSION}")
    dist = Path(shutil.copytree(published().dist, tmp_path / "dist"))
    (dist / "release" / f"{project()}-{VERSION}.tgz").write_bytes(b"another")
    ended = make("publish", REGISTRIES=registry, DIST=str(dist))
    assert ended.returncode != 0
    assert f"{registry}/{CHART}:{VERSION} is another chart already: a version never changes" in ended.stderr
    assert oras("resolve", f"{registry}/{CHART}:{VERSION}") == before


# --- releases and images that are refused ---


def test_publishing_again_changes_nothing() -> None:
    one = published()
    before = [referrers(f"{repository}@{one.digest}") for repository in one.repositories]
    chart = oras("resolve", f"{one.registries[0]}/{CHART}:{VERSION}")
    assert make("publish", REGISTRIES=" ".join(one.registries)).returncode == 0
    assert [referrers(f"{repository}@{one.digest}") for repository in one.repositories] == before
    assert oras("resolve", f"{one.registries[0]}/{CHART}:{VERSION}") == chart


@pytest.fixture
def changed(tmp_path: Path) -> Path:
    """Build an image whose source has one more comment, and return the folder of its OCI layout."""
    context = sources(tmp_path / "context")
    with open(context / "hitcounter" / "app.py", "a") as file:
        file.write("# another\n")
    layout(context, tmp_path / "changed.oci", PLATFORMS="linux/amd64,linux/arm64")
    return tmp_path / "changed.oci"


def test_second_build_with_another_digest_stops_the_release(changed: Path) -> None:
    ended = make("release-compare", LAYOUT=str(changed), DIGESTS=published().digests)
    assert ended.returncode != 0
    assert f"the image of {SERVICE} differs: {published().digest} was expected" in ended.stderr
    assert make("release-compare", DIGESTS=published().digests).returncode == 0
    assert make("release-compare", DIGESTS="").returncode != 0


def test_files_that_differ_from_the_attested_ones_are_not_uploaded(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(published().dist / "release", tmp_path / "release"))
    sums = make("release-sums").stdout.strip().removeprefix("sums=")
    assert make("release-files-compare", DIST=str(tmp_path), SUMS=sums).returncode == 0
    assert make("release-files-compare", DIST=str(tmp_path), SUMS="").returncode != 0
    with open(folder / "production.yaml", "a") as file:
        file.write("# more\n")
    assert make("release-files-compare", DIST=str(tmp_path), SUMS=sums).returncode != 0
    with open(folder / "SHA256SUMS", "w") as file:
        subprocess.run(["sha256sum", "production.yaml"], cwd=folder, check=True, stdout=file)
    ended = make("release-files-compare", DIST=str(tmp_path), SUMS=sums)
    assert ended.returncode != 0
    assert f"the files differ: the digest {sums} of their checksums was expected" in ended.stderr


def test_version_that_is_published_is_not_moved(changed: Path) -> None:
    repository = published().repositories[0]
    ended = make("publish", LAYOUT=str(changed), REGISTRIES=published().registries[0])
    assert ended.returncode != 0
    assert f"{repository}:{VERSION} is {published().digest} already" in ended.stderr
    assert oras("resolve", f"{repository}:{VERSION}").strip() == published().digest


def test_tag_that_moved_is_found(changed: Path) -> None:
    registry = f"{published().registries[0]}/moved"
    moved = f"{registry}/{SERVICE}"
    other = Layout(changed).digest
    oras("copy", "--no-tty", "--from-oci-layout", f"{changed}@{other}", f"{moved}:{VERSION}")
    ended = make("publish", REGISTRIES=registry)
    assert ended.returncode != 0
    assert f"{moved}:{VERSION} is {other} already, and not {published().digest}" in ended.stderr
    assert make("release-compare", DIGESTS=json.dumps({SERVICE: oras("resolve", f"{moved}:{VERSION}").strip()})).returncode != 0


def test_layer_that_was_tampered_with_is_not_published(tmp_path: Path) -> None:
    tampered = Path(shutil.copytree(published().layout, tmp_path / "tampered.oci"))
    tamper(max((tampered / "blobs" / "sha256").iterdir(), key=lambda blob: blob.stat().st_size))
    registry = f"{published().registries[0]}/tampered"
    ended = make("publish", LAYOUT=str(tampered), REGISTRIES=registry)
    assert ended.returncode != 0
    assert re.search("mismatch|digest invalid", ended.stderr, re.IGNORECASE)
    assert oras("resolve", f"{registry}/{SERVICE}:{VERSION}", check=False).startswith("1\n")
    assert make("sbom", LAYOUT=str(tampered), DIST=str(tmp_path / "dist")).returncode != 0


def tamper(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@contextlib.contextmanager
def between(tampered: str, failing: str = "no tag") -> Iterator[str]:
    """Run a proxy in front of the registry, and yield the proxy's address.

    The proxy flips one bit of the content whose digest is `tampered`, and answers requests for the tag `failing` with status 500.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle(self) -> None:
            with contextlib.suppress(ConnectionError):  # a client that notices the flipped bit closes the connection at once
                super().handle()

        def do_GET(self) -> None:
            with contextlib.closing(http.client.HTTPConnection(REGISTRY.partition("/")[0], timeout=30)) as connection:
                self.answer(connection)

        def answer(self, connection: http.client.HTTPConnection) -> None:
            connection.request(self.command, self.path, headers={"Accept": ", ".join(self.headers.get_all("Accept", []))})
            answer = connection.getresponse()
            body = bytearray(answer.read())
            if self.path.endswith(tampered) and body:
                body[len(body) // 2] ^= 1
            self.send_response(500 if self.path.endswith(f"/manifests/{failing}") else answer.status)
            for name in ("Content-Type", "Docker-Content-Digest"):
                if value := answer.headers[name]:
                    self.send_header(name, value)
            self.send_header("Content-Length", answer.headers["Content-Length"] if self.command == "HEAD" else str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("what", ["layer", "manifest", "nothing"])
def test_content_that_was_changed_on_the_way_is_refused(tmp_path: Path, what: str) -> None:
    one = Layout(published().layout)
    manifest = json.loads((published().layout / "blobs" / one.manifests()["linux/arm64"].replace(":", "/")).read_text())
    digest = {"layer": manifest["layers"][-1]["digest"], "manifest": one.digest, "nothing": "no digest"}[what]
    name = published().repositories[0].partition("/")[2]
    with between(digest) as address:
        said = oras(
            "copy",
            "--no-tty",
            "--from-plain-http",
            "--to-oci-layout",
            f"{address}/{name}@{one.digest}",
            f"{tmp_path}/got:it",
            check=False,
        )
    assert said.startswith("0\n" if what == "nothing" else "1\n"), said
    assert what == "nothing" or "mismatch" in said


def test_version_is_not_moved_if_the_registry_fails_to_answer(changed: Path) -> None:
    name = published().repositories[0].partition("/")[2]
    for failing, reason in (("no tag", f"is {published().digest} already"), (VERSION, f"does not say whether it has {VERSION}")):
        with between("no digest", failing) as address:
            registry = f"{address.replace('127.0.0.1', 'localhost')}/{name.rpartition('/')[0]}"
            ended = make("publish", LAYOUT=str(changed), REGISTRIES=registry)
        assert ended.returncode != 0
        assert reason in ended.stderr
    assert oras("resolve", f"{published().repositories[0]}:{VERSION}").strip() == published().digest


def test_update_gives_an_image_the_digest_that_its_tag_has_now(tmp_path: Path) -> None:
    name = f"{published().repositories[1]}:{VERSION}"
    for command in (["init", "--quiet"], ["add", "."]):
        (tmp_path / "Containerfile").write_text(f"ARG BASE={name}@sha256:{'0' * 64}\n")
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    environ = os.environ | {"ORAS": program()}
    subprocess.run(["sh", ROOT / "scripts" / "update-images.sh"], cwd=tmp_path, env=environ, check=True, timeout=60)
    assert (tmp_path / "Containerfile").read_text() == f"ARG BASE={name}@{published().digest}\n"
