"""The bundle's push.py puts the images of an OCI layout into a registry under the same digests, and keeps passwords safe."""

import base64
import functools
import hashlib
import json
import re
import secrets
import socket
import ssl
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from tests.support import ROOT
from tests.support.registry import (
    OTHER_ADDRESS,
    TLS_ADDRESS,
    Handler,
    Registry,
    Server,
    TokenServer,
    certificate,
    htpasswd,
    running,
)

pytestmark = pytest.mark.bundle

USER, PASSWORD, WRONG = "someone", secrets.token_hex(16), secrets.token_hex(16)
BASIC = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
LOGIN = {"REGISTRY_USERNAME": USER, "REGISTRY_PASSWORD": PASSWORD}
INDEX = "application/vnd.oci.image.index.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"


class Layout:
    """An OCI layout with two images: `app`, an index for two platforms with a tag, and `store`, one manifest with two tags."""

    def __init__(self, folder: Path, size: int = 3000) -> None:
        self.folder, self.size, self.layers = folder, size, 0
        (folder / "blobs" / "sha256").mkdir(parents=True)
        (folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
        children = [{**self.image(), "platform": {"os": "linux", "architecture": each}} for each in ("amd64", "arm64")]
        self.app = self.blob(json.dumps({"schemaVersion": 2, "mediaType": INDEX, "manifests": children}).encode(), INDEX)
        self.store = self.image()
        names = {
            "example.org/some/app:1.0": self.app,
            f"example.org/some/app@{self.app['digest']}": self.app,
            f"docker.io/valkey/store@{self.store['digest']}": self.store,
            "docker.io/valkey/store:9": self.store,
            "docker.io/valkey/store:9.1": self.store,
        }
        entries = [{**one, "annotations": {"io.containerd.image.name": name}} for name, one in names.items()]
        (folder / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": entries}))

    def path(self, descriptor: dict[str, Any]) -> Path:
        return self.folder / "blobs" / "sha256" / str(descriptor["digest"])[7:]

    def blob(self, data: bytes, kind: str) -> dict[str, Any]:
        descriptor = {"mediaType": kind, "digest": f"sha256:{hashlib.sha256(data).hexdigest()}", "size": len(data)}
        self.path(descriptor).write_bytes(data)
        return descriptor

    def image(self) -> dict[str, Any]:
        config = self.blob(json.dumps({"os": "linux", "of": secrets.token_hex(8)}).encode(), f"{MANIFEST}+config")
        layers = [self.blob(secrets.token_bytes(self.size), "application/vnd.oci.image.layer.v1.tar") for _ in range(2)]
        self.layers += 3
        document = {"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": layers}
        return self.blob(json.dumps(document).encode(), MANIFEST)

    def said(self, registry: str) -> str:
        """Return the lines that push.py prints for these images."""
        return f"{registry}/app@{self.app['digest']}\n{registry}/store@{self.store['digest']}\n"


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "layout")


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def ca(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ca") / "ca.pem"
    authority.cert_pem.write_to_path(str(path))
    return path


@pytest.fixture(scope="module")
def secured(authority: trustme.CA, ca: Path) -> Iterator[Registry]:
    """Run a registry with a password and a certificate of a private CA."""
    files = certificate(authority, ca.parent)
    with running(ca.parent / "secured", certificate=files, auth=htpasswd(ca.parent, USER, PASSWORD)) as registry:
        yield registry


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """Run a registry without a password and without TLS."""
    with running(tmp_path_factory.mktemp("plain") / "plain", address="127.0.0.1") as registry:
        yield registry


@pytest.fixture
def team() -> str:
    """Return a path in a registry that no other test uses."""
    return f"team-{secrets.token_hex(4)}"


def relative(location: str) -> str:
    """Return the part of a URL after the host."""
    return "/" + location.split("/", 3)[3]


def push(layout: Layout, registry: str, *, before: str = "", **environ: str) -> "subprocess.CompletedProcess[str]":
    """Run push.py with only Python's standard library, after the shell command `before`. Fail if its output has a password."""
    command = [sys.executable, "-I", "-S", str(ROOT / "scripts" / "bundle" / "push.py"), str(layout.folder), registry]
    given = {"HOME": str(layout.folder.parent), "SSL_CERT_FILE": "", **environ}
    shell = ["sh", "-c", f'{before}\nexec "$@"', "sh", *command]
    ended = subprocess.run(shell, env=given, text=True, capture_output=True, timeout=300)
    for password in (PASSWORD, WRONG):
        for secret in (password, base64.b64encode(f"{USER}:{password}".encode()).decode()):
            assert secret not in ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr
    return ended


def pushed(layout: Layout, registry: str, **environ: str) -> None:
    """Push, and fail unless push.py says that all images are in the registry."""
    ended = push(layout, registry, **environ)
    assert (ended.returncode, ended.stdout) == (0, layout.said(registry)), ended.stderr


def refused(layout: Layout, registry: str, **environ: str) -> str:
    """Push, and fail unless push.py fails and prints no image. Return the last line of its error output."""
    ended = push(layout, registry, **environ)
    assert (ended.returncode, ended.stdout) == (1, ""), ended.stderr
    last = ended.stderr.splitlines()[-1]
    assert last.startswith("install.sh: ")
    return last


@functools.cache
def oras() -> str:
    command = ["go", "-C", str(ROOT / "scripts" / "tools" / "oras"), "tool", "-n", "oras"]
    return subprocess.run(command, check=True, text=True, capture_output=True).stdout.strip()


def check(layout: Layout, registry: str, folder: Path, *options: str) -> None:
    """Read all images back with oras, which checks each digest."""

    def run(*arguments: str) -> str:
        return subprocess.run([oras(), *arguments], check=True, text=True, capture_output=True, timeout=120).stdout

    for base, tags, descriptor in (("app", ["1.0"], layout.app), ("store", ["9", "9.1"], layout.store)):
        assert run("repo", "tags", *options, f"{registry}/{base}").split() == tags
        for tag in tags:
            assert run("resolve", *options, f"{registry}/{base}:{tag}").strip() == descriptor["digest"]
        from_options = [option.replace("--", "--from-", 1) if option.startswith("--") else option for option in options]
        run("copy", *from_options, "--to-oci-layout", f"{registry}/{base}@{descriptor['digest']}", f"{folder}:{base}")
    mine, theirs = ({path.name for path in (each / "blobs" / "sha256").iterdir()} for each in (layout.folder, folder))
    assert mine == theirs


def test_images_are_pushed_into_a_registry_with_password_and_private_ca(
    layout: Layout, secured: Registry, ca: Path, team: str, tmp_path: Path
) -> None:
    registry = f"{secured.host}/{team}"
    pushed(layout, registry, REGISTRY_CA=str(ca), **LOGIN)
    check(layout, registry, tmp_path / "read", "--ca-file", str(ca), "--username", USER, "--password", PASSWORD)


def test_images_are_pushed_into_a_plain_registry_on_loopback(layout: Layout, plain: Registry, team: str, tmp_path: Path) -> None:
    for host in (plain.host, plain.host.replace("127.0.0.1", "localhost")):
        pushed(layout, f"{host}/{team}")
    check(layout, f"{plain.host}/{team}", tmp_path / "read", "--plain-http")


def test_second_push_sends_no_blob_and_prints_the_same(layout: Layout, plain: Registry, team: str) -> None:
    registry = f"{plain.host}/{team}"
    pushed(layout, registry)
    first = Counter(method for method, _, status in plain.requests(team) if status < 400)
    assert (first["POST"], first["PUT"]) == (layout.layers, layout.layers + 5)  # 3 manifests, of which one has 2 tags; an index
    pushed(layout, registry)
    both = Counter(method for method, _, status in plain.requests(team) if status < 400)
    assert (both["POST"], both["PUT"]) == (first["POST"], first["PUT"])
    assert both["HEAD"] == first["HEAD"] + layout.layers


@pytest.mark.parametrize("part", ["config", "layers", "manifest", "index"])
@pytest.mark.parametrize("damage", ["missing", "changed", "cut off"])
def test_damaged_layout_is_refused_before_anything_is_sent(
    layout: Layout, plain: Registry, team: str, part: str, damage: str
) -> None:
    """All parts except the index belong to the last image, so the check covers all images before the first one is sent."""
    document = json.loads(layout.path(layout.store).read_bytes())
    parts = {"config": document["config"], "layers": document["layers"][1], "manifest": layout.store, "index": layout.app}
    path = layout.path(parts[part])
    intact = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(intact[:-1] + (b"?" if damage == "changed" else b""))
    said = refused(layout, f"{plain.host}/{team}")
    assert f"{path} {'cannot be read' if damage == 'missing' else 'was changed'}" in said
    path.write_bytes(intact)
    pushed(layout, f"{plain.host}/{team}")
    first = plain.requests(team)[0]  # the log has no request of the push that was refused
    assert first[0] == "HEAD" and len([each for each in plain.requests(team) if each[:2] == first[:2]]) == 1


def test_folder_that_is_not_a_layout_is_refused(layout: Layout, plain: Registry, team: str) -> None:
    for name in ("oci-layout", "index.json"):
        (layout.folder / name).rename(layout.folder / "moved")
        assert f"{layout.folder} is not an OCI layout" in refused(layout, f"{plain.host}/{team}")
        (layout.folder / "moved").rename(layout.folder / name)
    pushed(layout, f"{plain.host}/{team}")


@pytest.mark.parametrize(
    "changed, says",
    [
        ({"REGISTRY_PASSWORD": WRONG}, "answered 401 .*The user or the password is wrong"),
        ({"REGISTRY_PASSWORD": ""}, "answered 401 .*Set REGISTRY_USERNAME and REGISTRY_PASSWORD"),
        ({"REGISTRY_CA": ""}, "has no valid certificate: .*If a private CA signed it, set REGISTRY_CA"),
        ({"REGISTRY_CA": "/no/such/file"}, "REGISTRY_CA: /no/such/file has no certificate that can be read: No such file"),
        ({"REGISTRY_CA": __file__}, "REGISTRY_CA: .*test_push.py has no certificate that can be read"),
    ],
)
def test_wrong_settings_are_refused(
    layout: Layout, secured: Registry, ca: Path, team: str, changed: dict[str, str], says: str
) -> None:
    right = {"REGISTRY_CA": str(ca), **LOGIN}
    assert re.search(says, refused(layout, f"{secured.host}/{team}", **{**right, **changed}))
    assert not [each for each in secured.requests(team) if each[2] < 400]
    pushed(layout, f"{secured.host}/{team}", **right)


def test_certificate_for_another_host_is_refused(layout: Layout, authority: trustme.CA, ca: Path, tmp_path: Path) -> None:
    for name, valid in ((OTHER_ADDRESS, False), (TLS_ADDRESS, True)):
        files = certificate(authority, tmp_path, name)
        with running(tmp_path / name, certificate=files) as registry:
            if valid:
                pushed(layout, registry.host, REGISTRY_CA=str(ca))
            else:
                assert "has no valid certificate: IP address mismatch" in refused(layout, registry.host, REGISTRY_CA=str(ca))


def test_tls_on_loopback_is_named_in_the_error(layout: Layout, authority: trustme.CA, plain: Registry, tmp_path: Path) -> None:
    files = certificate(authority, tmp_path, "127.0.0.1")
    with running(tmp_path / "registry", certificate=files, address="127.0.0.1") as registry:
        assert "answered 400 for app. Client sent an HTTP request to an HTTPS server." in refused(layout, registry.host)
    pushed(layout, plain.host)


def test_ca_of_openssl_is_accepted(layout: Layout, tmp_path: Path) -> None:
    """The CA certificate that `openssl req -x509` makes has no extension keyUsage."""
    now, keys = datetime.now(UTC), [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
    names = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]) for name in ("private CA", "registry")]
    san = x509.SubjectAlternativeName([x509.IPAddress(ip_address(TLS_ADDRESS))])
    ca, own = (
        x509.CertificateBuilder(names[0], names[of], keys[of].public_key(), of + 1, now, now + timedelta(days=1))
        .add_extension(extension, critical=False)
        .sign(keys[0], hashes.SHA256())
        .public_bytes(Encoding.PEM)
        for of, extension in enumerate((x509.BasicConstraints(ca=True, path_length=None), san))
    )
    files = tmp_path / "own.pem", tmp_path / "own.key"
    files[0].write_bytes(own)
    files[1].write_bytes(keys[1].private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    (tmp_path / "ca.pem").write_bytes(ca)
    with running(tmp_path / "registry", certificate=files) as registry:
        pushed(layout, registry.host, REGISTRY_CA=str(tmp_path / "ca.pem"))


def test_registry_that_cannot_be_reached_is_named(layout: Layout, plain: Registry, team: str) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{unused.getsockname()[1]}"
        said = refused(layout, f"{host}/{team}")
    assert said.startswith(f"install.sh: {host} cannot be reached: ConnectionRefusedError")
    assert "no-such-host.invalid cannot be reached: gaierror" in refused(layout, "no-such-host.invalid")
    pushed(layout, f"{plain.host}/{team}")


def test_registry_name_that_is_not_allowed_is_refused(layout: Layout, plain: Registry, team: str) -> None:
    for name in (f"https://{plain.host}/{team}", f"{plain.host}/Team", f"{USER}:{PASSWORD}@{plain.host}", ""):
        assert "REGISTRY must be HOST[:PORT][/PATH]" in refused(layout, name)
    for host in ("127.0.0.1:65536", "[1:2]"):
        assert re.search("Port out of range|'1:2'|IPv6|cannot be reached", refused(layout, f"{host}/{team}"))
    assert re.search("answered 404 .*The path of REGISTRY may be wrong", refused(layout, f"{plain.host}/{team}..x"))
    pushed(layout, f"{plain.host}/{team}")


def test_password_of_docker_login_is_used(layout: Layout, secured: Registry, ca: Path, team: str, tmp_path: Path) -> None:
    registry, config = f"{secured.host}/{team}", tmp_path / ".docker" / "config.json"
    config.parent.mkdir()
    for content, says in (
        ("{", "config.json is not a valid configuration of docker"),
        ('{"auths": {"example.org": {"auth": "eDp5"}}}', "Set REGISTRY_USERNAME and REGISTRY_PASSWORD"),
        (json.dumps({"auths": {secured.host: {}}, "credsStore": "desktop"}), "in its credential helper desktop, which this"),
        (json.dumps({"credHelpers": {secured.host: "pass"}}), "in its credential helper pass, which this program cannot ask"),
    ):
        config.write_text(content)
        assert says in refused(layout, registry, REGISTRY_CA=str(ca))
    config.write_text(json.dumps({"auths": {secured.host: {"auth": BASIC.partition(" ")[2]}}}))
    pushed(layout, registry, REGISTRY_CA=str(ca))
    config.rename(tmp_path / "config.json")
    pushed(layout, registry, REGISTRY_CA=str(ca), DOCKER_CONFIG=str(tmp_path))


def test_password_is_not_sent_without_tls(layout: Layout, plain: Registry, team: str) -> None:
    """A server without TLS that asks for a password gets none. The same server on 127.0.0.1, the control, gets the password."""

    def wants_a_password(request: Handler) -> None:
        if request.headers["Authorization"] != BASIC:
            return request.reply(401, WWW_Authenticate='Basic realm="x"')
        return request.pass_on(plain)

    for address in (OTHER_ADDRESS, "127.0.0.1"):
        with Server(address, wants_a_password) as server:
            if address == "127.0.0.1":
                pushed(layout, f"{server.host}/{team}", **LOGIN)
            else:
                assert "and that the registry runs, with HTTPS" in refused(layout, f"{server.host}/{team}", **LOGIN)
            assert {each.authorization for each in server.seen} == ({None, BASIC} if address == "127.0.0.1" else set())


@pytest.fixture
def tls(authority: trustme.CA) -> ssl.SSLContext:
    """Return the context of a server with a certificate for both addresses."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert(TLS_ADDRESS, OTHER_ADDRESS).configure_cert(context)
    return context


def test_token_of_the_token_server_is_used(
    layout: Layout, authority: trustme.CA, ca: Path, tls: ssl.SSLContext, team: str, tmp_path: Path
) -> None:
    tokens = TokenServer(authority, tmp_path, BASIC)
    files = certificate(authority, tmp_path)
    with Server(OTHER_ADDRESS, tokens, tls) as server:
        settings = tokens.settings(f"https://{server.host}/token")
        with running(tmp_path / "registry", certificate=files, auth=settings) as registry:
            given = {"REGISTRY_CA": str(ca), **LOGIN}
            said = refused(layout, f"{registry.host}/{team}", **{**given, "REGISTRY_PASSWORD": WRONG})
            assert f"{server.host} answered 401" in said and "The user or the password is wrong" in said
            said = refused(layout, f"{registry.host}/{team}", **{**given, "REGISTRY_PASSWORD": ""})
            assert "Set REGISTRY_USERNAME and REGISTRY_PASSWORD" in said
            pushed(layout, f"{registry.host}/{team}", **given)
            assert set(tokens.scopes) == {f"repository:{team}/{base}:pull,push" for base in ("app", "store")}


def test_token_server_without_tls_gets_no_password(
    layout: Layout, plain: Registry, ca: Path, tls: ssl.SSLContext, team: str
) -> None:
    """A realm on loopback, which needs no TLS, is the control."""

    def gives_tokens(request: Handler) -> None:
        request.reply(200, b'{"access_token": "letters"}')

    def wants_a_token(request: Handler) -> None:
        if request.headers["Authorization"] != "Bearer letters":
            return request.reply(401, WWW_Authenticate=f'Bearer realm="http://{tokens.host}/token",service="x"')
        return request.pass_on(plain)

    for address in (OTHER_ADDRESS, "127.0.0.1"):
        with Server(address, gives_tokens) as tokens, Server(TLS_ADDRESS, wants_a_token, tls) as server:
            if address == "127.0.0.1":
                pushed(layout, f"{server.host}/{team}", REGISTRY_CA=str(ca), **LOGIN)
                assert {each.authorization for each in tokens.seen} == {BASIC}
            else:
                said = refused(layout, f"{server.host}/{team}", REGISTRY_CA=str(ca), **LOGIN)
                assert f"leads to http://{address}, which is not HTTPS" in said
                assert not tokens.seen


def test_other_hosts_get_no_password(layout: Layout, plain: Registry, ca: Path, tls: ssl.SSLContext, team: str) -> None:
    """The registry redirects all uploads, and all HEAD requests for blobs, to another host."""

    def registry(request: Handler) -> None:
        if request.headers["Authorization"] != BASIC:
            request.reply(401, WWW_Authenticate='Basic realm="x"')
        elif request.command == "HEAD":
            request.reply(307, Location=f"https://{other.host}{request.path}")
        else:
            request.pass_on(plain, lambda location: f"https://{other.host}{relative(location)}")

    with (
        Server(OTHER_ADDRESS, lambda request: request.pass_on(plain), tls) as other,
        Server(TLS_ADDRESS, registry, tls) as server,
    ):
        pushed(layout, f"{server.host}/{team}", REGISTRY_CA=str(ca), **LOGIN)
        assert Counter(each.method for each in other.seen) == {"HEAD": layout.layers, "PUT": layout.layers}
        assert {each.authorization for each in other.seen} == {None}
        assert {each.authorization for each in server.seen} == {None, BASIC}


def test_upload_to_an_address_without_tls_is_refused(
    layout: Layout, plain: Registry, ca: Path, tls: ssl.SSLContext, team: str
) -> None:
    """A registry behind a proxy with TLS may answer with addresses without TLS. A relative address is the control."""
    with Server(OTHER_ADDRESS, lambda request: request.pass_on(plain)) as other:
        for start in (f"http://{other.host}", ""):

            def registry(request: Handler, start: str = start) -> None:
                request.pass_on(plain, lambda location: start + relative(location))

            with Server(TLS_ADDRESS, registry, tls) as server:
                if not start:
                    pushed(layout, f"{server.host}/{team}", REGISTRY_CA=str(ca))
                else:
                    said = refused(layout, f"{server.host}/{team}", REGISTRY_CA=str(ca), **LOGIN)
                    assert f"leads to http://{OTHER_ADDRESS}, which is not HTTPS" in said and "X-Forwarded-Proto" in said
        assert not other.seen


@pytest.mark.parametrize("broken, works", [(2, True), (100, False)])
def test_upload_is_tried_again_if_the_connection_breaks(
    layout: Layout, plain: Registry, team: str, broken: int, works: bool
) -> None:
    """The proxy closes the connection after half of an upload, for each of the first `broken` uploads."""

    def proxy(request: Handler) -> None:
        uploads = [each for each in server.seen if each.method == "PUT" and "/blobs/" in each.path]
        if request.command == "PUT" and len(uploads) <= broken:
            request.rfile.read(int(request.headers["Content-Length"]) // 2)
            request.connection.shutdown(socket.SHUT_RDWR)
            request.close_connection = True
        else:
            request.pass_on(plain, relative)

    with Server("127.0.0.1", proxy) as server:
        if works:
            pushed(layout, f"{server.host}/{team}")
        else:
            assert f"{server.host} cannot be reached: " in refused(layout, f"{server.host}/{team}")


@pytest.mark.parametrize(
    "status, says",
    [
        (200, "answered 200 .*This is a page, not a registry's answer"),
        (403, "answered 403 .*This is a page.*This user may not push there"),
        (413, "answered 413 .*A proxy in front of the registry limits the size of uploads"),
        (507, "answered 507 .*A full disk is a common cause"),
    ],
)
def test_answer_of_a_proxy_is_reported_with_advice(plain: Registry, team: str, tmp_path: Path, status: int, says: str) -> None:
    """The proxy answers each upload of a layer with a page, and reads none of the layer. Without this page, the push succeeds."""
    layout = Layout(tmp_path / "layout", 8_000_000)  # more than a kernel buffers

    def proxy(request: Handler) -> None:
        if pages and int(request.headers["Content-Length"] or 0) == layout.size:
            request.reply(status, b"<html>no</html>", Content_Type="text/html")
            request.close_connection = True
        else:
            request.pass_on(plain, relative)

    with Server("127.0.0.1", proxy) as server:
        pages = True
        assert re.search(says, refused(layout, f"{server.host}/{team}"))
        pages = False
        pushed(layout, f"{server.host}/{team}")


@pytest.mark.parametrize("part, says", [("blobs", "stored sha256:.* as sha256:0"), ("manifests", "answers with another digest")])
def test_registry_that_keeps_other_bytes_is_refused(layout: Layout, plain: Registry, team: str, part: str, says: str) -> None:
    """The proxy answers with a digest, or with bytes, that differ from those in the registry."""

    def proxy(request: Handler) -> None:
        if request.command == "PUT" and changes and part == "blobs":
            request.reply(201, Docker_Content_Digest="sha256:0")
        elif request.command == "GET" and changes and part == "manifests":
            request.reply(200, b"{}")
        else:
            request.pass_on(plain, relative)

    with Server("127.0.0.1", proxy) as server:
        changes = True
        assert re.search(says, refused(layout, f"{server.host}/{team}"))
        changes = False
        pushed(layout, f"{server.host}/{team}")


def test_blob_is_never_whole_in_memory(plain: Registry, team: str, tmp_path: Path) -> None:
    """A process that may use 150 MB of memory sends a layer of 200 MB."""
    layout = Layout(tmp_path / "layout")
    layer = layout.blob(bytes(200_000_000), "application/vnd.oci.image.layer.v1.tar")
    config = layout.blob(b"{}", f"{MANIFEST}+config")
    document = {"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": [layer]}
    entry = {**layout.blob(json.dumps(document).encode(), MANIFEST), "annotations": {"io.containerd.image.name": "x/large:1"}}
    (layout.folder / "index.json").write_text(json.dumps({"manifests": [entry]}))
    ended = push(layout, f"{plain.host}/{team}", before="ulimit -v 150000 || exit 3")
    assert (ended.returncode, ended.stdout) == (0, f"{plain.host}/{team}/large@{entry['digest']}\n"), ended.stderr
