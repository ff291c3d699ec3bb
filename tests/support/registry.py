"""Run the registry of Debian's package docker-registry on loopback, and a proxy and a token server for it."""

import base64
import contextlib
import http.client
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self
from urllib.parse import parse_qs, urlsplit

import trustme
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

from nanoservice.testing.waiting import SLACK, wait_for

# Clients use plain HTTP for 127.0.0.1, and HTTPS for these addresses, which are loopback too.
TLS_ADDRESS, OTHER_ADDRESS = "127.0.0.2", "127.0.0.3"


def program(name: str) -> str:
    found = shutil.which(name, path=os.environ.get("BUNDLE_TOOLS"))
    assert found, f"{name} is missing: run make test-bundle"
    return found


@dataclass
class Registry:
    """A running registry."""

    host: str
    log: Path

    def requests(self, repository: str) -> list[tuple[str, str, int]]:
        """Return method, path and status of each request to the repository, in the order of their answers."""
        found = re.findall(r'"([A-Z]+) (/v2/\S*) HTTP/1.1" (\d+) ', self.log.read_text())
        return [(method, path, int(status)) for method, path, status in found if path.startswith(f"/v2/{repository}/")]


@contextlib.contextmanager
def running(
    folder: Path, *, certificate: tuple[Path, Path] | None = None, auth: object = None, address: str = TLS_ADDRESS
) -> Iterator[Registry]:
    """Run a registry with its data in `folder`. `certificate` is the file of the certificate, and the file of its key."""
    folder.mkdir()
    http_settings: dict[str, object] = {"addr": f"{address}:0", "secret": "secret"}
    if certificate:
        http_settings["tls"] = {"certificate": str(certificate[0]), "key": str(certificate[1])}
    config = {"version": 0.1, "storage": {"filesystem": {"rootdirectory": str(folder / "data")}}, "http": http_settings}
    (folder / "config.yml").write_text(yaml.safe_dump({**config, **({"auth": auth} if auth else {})}))
    log = folder / "log"
    with log.open("w") as output:
        process = subprocess.Popen([program("docker-registry"), "serve", folder / "config.yml"], stdout=output, stderr=output)
    try:

        def port() -> str | None:
            assert process.poll() is None, log.read_text()
            found = re.search(rf"listening on {re.escape(address)}:(\d+)", log.read_text())
            return found and found[1]

        yield Registry(f"{address}:{wait_for(port, 20 * SLACK, 'the registry listens')}", log)
    finally:
        process.terminate()
        process.wait(20)


def certificate(authority: trustme.CA, folder: Path, address: str = TLS_ADDRESS) -> tuple[Path, Path]:
    """Write a certificate that the authority issues for an address, and its key. Return both files."""
    issued = authority.issue_cert(address)
    chain, key = folder / f"{address}.pem", folder / f"{address}.key"
    chain.write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
    issued.private_key_pem.write_to_path(str(key))
    return chain, key


def htpasswd(folder: Path, user: str, password: str) -> dict[str, object]:
    """Return the registry's settings for one user with a password."""
    file = folder / "htpasswd"
    file.write_bytes(subprocess.check_output([program("htpasswd"), "-nbB", user, password]))
    return {"htpasswd": {"realm": "registry", "path": str(file)}}


@dataclass
class Seen:
    """A request that a server got, and the header Authorization of this request."""

    method: str
    path: str
    authorization: str | None


@dataclass
class Server:
    """A small HTTP server. `answer` gets a request, and sends the answer."""

    address: str
    answer: Callable[["Handler"], None]
    context: ssl.SSLContext | None = None
    seen: list[Seen] = field(default_factory=list)

    @property
    def host(self) -> str:
        return f"{self.address}:{self.port}"

    def __enter__(self) -> Self:
        handler = type("_Handler", (Handler,), {"owner": self})
        self._server = ThreadingHTTPServer((self.address, 0), handler)
        self.port = self._server.server_address[1]
        # With a small buffer, the kernel does not buffer a whole upload that `answer` does not read.
        self._server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        if self.context:
            self._server.socket = self.context.wrap_socket(self._server.socket, server_side=True, do_handshake_on_connect=False)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class Handler(BaseHTTPRequestHandler):
    """The handler of one request."""

    owner: Server
    timeout = 60

    def handle_one_request(self) -> None:
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            super().handle_one_request()

    def _do(self) -> None:
        self.owner.seen.append(Seen(self.command, self.path, self.headers["Authorization"]))
        self.owner.answer(self)

    do_GET = do_HEAD = do_POST = do_PUT = _do

    def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"] or 0))

    def pass_on(self, registry: Registry, location: Callable[[str], str] = str) -> None:
        """Pass the request on to a registry without TLS, and pass its answer back with an edited Location."""
        connection = http.client.HTTPConnection(registry.host, timeout=60)
        kept = {name: value for name, value in self.headers.items() if name in ("Accept", "Content-Type", "Content-Length")}
        connection.request(self.command, self.path, self.body(), kept)
        answer = connection.getresponse()
        headers = {name: value for name, value in answer.headers.items() if name not in ("Date", "Transfer-Encoding")}
        if "Location" in headers:
            headers["Location"] = location(headers["Location"])
        body = answer.read()
        self.reply(answer.status, body, **headers)
        connection.close()

    def log_message(self, *_: object) -> None:
        pass


@dataclass
class TokenServer:
    """The answers of a token server whose tokens the registry accepts. `scopes` has the scopes that clients asked for."""

    authority: trustme.CA
    folder: Path
    basic: str
    scopes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        issued = self.authority.issue_cert("tokens.example.org")
        self._key = load_pem_private_key(issued.private_key_pem.bytes(), None)
        leaf = x509.load_pem_x509_certificate(issued.cert_chain_pems[0].bytes())
        self._x5c = [base64.b64encode(leaf.public_bytes(Encoding.DER)).decode()]
        self.authority.cert_pem.write_to_path(str(self.folder / "tokens.pem"))

    def settings(self, realm: str) -> dict[str, object]:
        """Return the registry's settings."""
        bundle = str(self.folder / "tokens.pem")
        return {"token": {"realm": realm, "service": "registry", "issuer": "issuer", "rootcertbundle": bundle}}

    def __call__(self, request: Handler) -> None:
        if request.headers["Authorization"] != self.basic:
            return request.reply(401)
        query = parse_qs(urlsplit(request.path).query)
        self.scopes += query["scope"]
        kind, name, actions = query["scope"][0].split(":")
        access = [{"type": kind, "name": name, "actions": actions.split(",")}]
        claims = {"iss": "issuer", "sub": "user", "aud": query["service"][0], "access": access, "jti": "1"}
        now = int(time.time())
        signed = ".".join(
            _base64(json.dumps(part).encode())
            for part in (
                {"typ": "JWT", "alg": "ES256", "x5c": self._x5c},
                {**claims, "iat": now, "nbf": now - 10, "exp": now + 60},
            )
        )
        assert isinstance(self._key, ec.EllipticCurvePrivateKey)
        r, s = utils.decode_dss_signature(self._key.sign(signed.encode(), ec.ECDSA(hashes.SHA256())))
        token = f"{signed}.{_base64(r.to_bytes(32, 'big') + s.to_bytes(32, 'big'))}"
        return request.reply(200, json.dumps({"token": token}).encode(), Content_Type="application/json")


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
