"""Push the images of an OCI layout into a registry, and keep their digests. The program needs only Python's standard library.

Usage: python3 push.py LAYOUT REGISTRY
  LAYOUT    a folder with oci-layout, index.json and blobs/sha256/
  REGISTRY  HOST[:PORT][/PATH], such as registry.example.com/team
Standard output gets a line REGISTRY/NAME@DIGEST for each image. Each file's checksum is checked before anything is sent. A blob
that the registry has is not sent again. The program uses no proxy. It uses HTTPS, except for localhost, 127.0.0.1 and [::1].
It reads these variables:
  REGISTRY_CA                           a file with the certificate of a private CA
  REGISTRY_USERNAME, REGISTRY_PASSWORD  the user and the password; without these, `docker login` can set them
  DOCKER_CONFIG                         the folder in which docker has its config.json; the default is ~/.docker
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import http.client
import io
import json
import os
import re
import ssl
import sys
import time
from pathlib import Path
from typing import Any, BinaryIO, Callable, Iterator, NamedTuple
from urllib.parse import urlencode, urljoin, urlsplit
from urllib.request import parse_http_list, parse_keqv_list

CONNECT_SECONDS, ANSWER_SECONDS = 20, 120  # time limits for connecting, and for each read or write
PAUSES = (1, 2, 4)  # seconds before each further try, after a connection broke
LOOPBACK = ("localhost", "127.0.0.1", "::1")
ADVICE = {
    401: "The user or the password is wrong, or this user may not push there",
    403: "This user may not push there, or the project does not exist yet",
    404: "The path of REGISTRY may be wrong, or the project does not exist yet",
    413: "A proxy in front of the registry limits the size of uploads. Raise this limit",
    500: "See the registry's log. A full disk is a common cause",
}
MALFORMED = (ValueError, KeyError, TypeError, AttributeError)


class PushError(Exception):
    """A message for the person who runs the program."""


class Answer(NamedTuple):
    """The answer to one request."""

    url: str
    status: int
    headers: http.client.HTTPMessage
    body: bytes


def main(arguments: list[str]) -> int:
    """Push the images, and return the exit status."""
    if len(arguments) != 2:
        print(__doc__, file=sys.stderr)
        return 64
    layout, registry = Path(arguments[0]), arguments[1]
    try:
        if not re.fullmatch(r"([\w.-]+|\[[0-9a-fA-F:]+\])(:[0-9]{1,5})?(/[a-z0-9._/-]*[a-z0-9])?", registry, re.ASCII):
            raise PushError(
                "REGISTRY must be HOST[:PORT][/PATH], with PATH in lower case, without https:// and without a password"
            )
        for (base, digest), (contents, tags) in images(layout).items():
            repository = Repository(registry, base)
            for descriptor, path, is_manifest in contents:
                if is_manifest:
                    for reference in (descriptor["digest"] == digest and tags) or [descriptor["digest"]]:
                        repository.retry(repository.push_manifest, descriptor, path, reference)
                else:
                    repository.retry(repository.push_blob, descriptor, path)
            print(f"{registry}/{base}@{digest}", flush=True)
    except (PushError, ValueError) as error:  # a ValueError says what is wrong with a URL
        print(f"install.sh: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


# --- the layout ---


def images(layout: Path) -> dict[tuple[str, str], tuple[list[Any], list[str]]]:
    """Check the layout. Return what to push, and the tags, for each pair of a name and a digest."""
    found: dict[tuple[str, str], tuple[list[Any], list[str]]] = {}
    try:
        (layout / "oci-layout").read_bytes()
        for descriptor in json.loads((layout / "index.json").read_bytes())["manifests"]:
            name = descriptor["annotations"]["io.containerd.image.name"].partition("@")[0]
            base, _, tag = name.rpartition("/")[2].partition(":")
            _, tags = found.setdefault((base, descriptor["digest"]), (list(walk(layout, descriptor)), []))
            tags += [tag] if tag else []
    except (OSError, *MALFORMED) as error:
        raise PushError(f"{layout} is not an OCI layout with names of images: {error!r}") from error
    return found


def walk(layout: Path, descriptor: Any) -> Iterator[tuple[Any, Path, bool]]:
    """Yield the descriptor of each part of an image, its file, and whether it is a manifest or an index. The image comes last."""
    path = checked(layout, descriptor["digest"])
    document = json.loads(path.read_bytes())
    for child in document.get("manifests", []):
        yield from walk(layout, child)
    for part in [document["config"], *document["layers"]] if "config" in document else []:
        yield part, checked(layout, part["digest"]), False
    yield descriptor, path, True


@functools.lru_cache(maxsize=None)
def checked(layout: Path, digest: str) -> Path:
    """Return the path of a blob, or raise PushError if the checksum is wrong."""
    path = layout / "blobs" / "sha256" / digest[len("sha256:") :]
    checksum = hashlib.sha256()
    try:
        with path.open("rb") as file:
            for block in iter(lambda: file.read(1 << 20), b""):
                checksum.update(block)
    except OSError as error:
        raise PushError(f"{path} cannot be read: {error.strerror}. Copy the bundle again") from error
    if digest != f"sha256:{checksum.hexdigest()}":
        raise PushError(f"{path} was changed: its checksum is not its name. Copy the bundle again")
    return path


# --- the registry ---


class Repository:
    """A repository of the registry, which has the images of one name."""

    def __init__(self, registry: str, base: str) -> None:
        self.host, _, path = registry.partition("/")
        self.name = f"{path}/{base}" if path else base
        scheme = "http" if urlsplit(f"//{self.host}").hostname in LOOPBACK else "https"
        self.url = f"{scheme}://{self.host}/v2/{self.name}"
        (self.basic, self.advice), self.authorization = credentials(self.host), ""
        self.tls = ssl.create_default_context()
        self.tls.verify_flags &= ~ssl.VERIFY_X509_STRICT  # Python 3.13 refuses CAs that `openssl req -x509` makes
        if authority := os.environ.get("REGISTRY_CA"):
            try:
                self.tls.load_verify_locations(authority)
            except OSError as error:
                raise PushError(f"REGISTRY_CA: {authority} has no certificate that can be read: {error.strerror}") from error

    def push_blob(self, descriptor: Any, path: Path) -> None:
        """Send a blob, unless the registry has it."""
        digest, size = descriptor["digest"], path.stat().st_size
        if self.ask("HEAD", f"{self.url}/blobs/{digest}").status == 200:
            return
        print(f"sending {self.name}@{digest}, {size / 1e6:.1f} MB", file=sys.stderr)
        started = self.ask("POST", f"{self.url}/blobs/uploads/", expected=202)
        location = urljoin(started.url, started.headers.get("Location", ""))
        location += ("&" if urlsplit(location).query else "?") + urlencode({"digest": digest})
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(size)}
        with path.open("rb") as file:
            stored = self.ask("PUT", location, headers, file, expected=201).headers.get("Docker-Content-Digest", digest)
        if stored != digest:
            raise PushError(f"{self.host} stored {digest} as {stored}. Check that no proxy changes the data")

    def push_manifest(self, descriptor: Any, path: Path, reference: str) -> None:
        """Send a manifest or an index, unless the registry has the same bytes under this tag or digest. Read it back."""
        url, kind, sent = f"{self.url}/manifests/{reference}", descriptor["mediaType"], path.read_bytes()
        stored = self.ask("GET", url, {"Accept": kind}).body
        if stored != sent:
            print(f"sending {self.name}, manifest {reference}", file=sys.stderr)
            self.ask("PUT", url, {"Content-Type": kind, "Content-Length": str(len(sent))}, io.BytesIO(sent), expected=201)
            stored = self.ask("GET", url, {"Accept": kind}, expected=200).body
        if stored != sent:
            raise PushError(f"{self.host} did not keep {self.name}, manifest {reference}: it answers with another digest")

    def retry(self, step: Callable[..., None], *arguments: Any, pauses: tuple[int, ...] = PAUSES) -> None:
        """Run a step. Run it again if the connection breaks."""
        try:
            step(*arguments)
        except ssl.SSLCertVerificationError as error:
            advice = "If a private CA signed it, set REGISTRY_CA to the file with the certificate of this CA"
            raise PushError(f"{self.host} has no valid certificate: {error.verify_message}. {advice}") from error
        except (OSError, http.client.HTTPException) as error:
            if not pauses:
                advice = "Check the address and the network, and that the registry runs, with HTTPS"
                raise PushError(f"{self.host} cannot be reached: {error!r}. {advice}") from error
            print(f"{self.host}: {error!r}; trying again in {pauses[0]} s", file=sys.stderr)
            time.sleep(pauses[0])
            self.retry(step, *arguments, pauses=pauses[1:])

    def ask(
        self, method: str, url: str, headers: dict[str, str] | None = None, body: BinaryIO | None = None, expected: int = 0
    ) -> Answer:
        """Send a request, and return the answer. Follow redirects of GET and HEAD, without credentials to another host.

        Raise PushError for the status 401, and for a status other than `expected`, unless `expected` is 0.
        """
        challenged = False
        for _ in range(5):
            ours = origin(url) == origin(self.url)
            authorization = {"Authorization": self.authorization} if ours and self.authorization else {}
            answer = self.send(method, url, {**(headers or {}), **authorization}, body)
            if answer.status == 401 and ours and not challenged:
                self.authorize(answer)
                challenged = True
            elif answer.status in (301, 302, 303, 307, 308) and method in ("GET", "HEAD"):
                url = urljoin(url, answer.headers.get("Location", ""))
            elif answer.status == 401 or expected not in (0, answer.status):
                raise self.refusal(answer)
            else:
                return answer
        raise PushError(f"{self.host} redirects too often")

    def authorize(self, answer: Answer) -> None:
        """Set `authorization` to the credentials that the challenge in an answer demands."""
        self.authorization = ""
        for challenge in answer.headers.get_all("WWW-Authenticate", []):
            scheme, _, parameters = challenge.partition(" ")
            if scheme.lower() == "basic":
                self.authorization = self.basic or self.authorization
            elif scheme.lower() == "bearer":
                self.authorization = f"Bearer {self.token(parameters)}"
        if not self.authorization:
            raise self.refusal(answer)

    def token(self, challenge: str) -> str:
        """Return a token of the server that the challenge names."""
        scope = f"repository:{self.name}:pull,push"
        try:
            named = parse_keqv_list(parse_http_list(challenge))
            query = urlencode({"service": named.get("service", ""), "scope": scope})
            url = f"{named['realm']}{'&' if '?' in named['realm'] else '?'}{query}"
            answer = self.send("GET", url, {"Authorization": self.basic} if self.basic else {})
            if answer.status != 200:
                raise self.refusal(answer)
            document = json.loads(answer.body)
            return re.fullmatch("[!-~]+", document.get("token") or document["access_token"])[0]  # type: ignore[index]
        except MALFORMED as error:
            raise PushError(f"{self.host} asks for a token, but its token server gives none") from error

    def send(self, method: str, url: str, headers: dict[str, str], body: BinaryIO | None = None) -> Answer:
        """Send one request over its own connection, and return the answer."""
        scheme, host, port = origin(url)
        if scheme == "https":
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                host, port, timeout=CONNECT_SECONDS, context=self.tls, blocksize=1 << 18
            )
        elif scheme == "http" and host in LOOPBACK:
            connection = http.client.HTTPConnection(host, port, timeout=CONNECT_SECONDS, blocksize=1 << 18)
        else:
            advice = "Correct the registry's URL in its configuration, or let its proxy set X-Forwarded-Proto"
            raise PushError(f"{self.host} leads to {scheme}://{host}, which is not HTTPS. {advice}")
        if body:
            body.seek(0)
        parts = urlsplit(url)
        try:
            connection.connect()
            connection.sock.settimeout(ANSWER_SECONDS)
            # A server that refuses an upload may answer, and close the connection, before it has the whole body.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError, ssl.SSLEOFError):
                connection.request(method, f"{parts.path}?{parts.query}".rstrip("?"), body, {"Connection": "close", **headers})
            response = connection.getresponse()
            return Answer(url, response.status, response.headers, response.read())
        finally:
            connection.close()

    def refusal(self, answer: Answer) -> PushError:
        """Return an error that says what the server answered, and what to do."""
        try:
            said = "; ".join(f"{error['code']}: {error.get('message')}" for error in json.loads(answer.body)["errors"])
        except MALFORMED:
            said = {
                "text/plain": answer.body.decode(errors="replace"),
                "text/html": "This is a page, not a registry's answer. Check REGISTRY, and that no proxy answers",
            }.get(answer.headers.get_content_type(), "")
        advice = ADVICE.get(min(answer.status, 500), "")
        if answer.status == 401 and not self.basic:
            advice = self.advice
        said = re.sub("[^ -~]+", " ", said)[:300].strip()
        parts = (f"{urlsplit(answer.url).netloc} answered {answer.status} for {self.name}", said, advice)
        return PushError(". ".join(filter(None, parts)))


def origin(url: str) -> tuple[str, str, int]:
    """Return scheme, host and port of a URL."""
    parts = urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)


def credentials(host: str) -> tuple[str, str]:
    """Return the value of the header Authorization for Basic authentication, or "" and advice if there is no password."""
    user, password = os.environ.get("REGISTRY_USERNAME"), os.environ.get("REGISTRY_PASSWORD")
    advice = "Set REGISTRY_USERNAME and REGISTRY_PASSWORD"
    if user and password:
        return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode(), ""
    path = Path(os.environ.get("DOCKER_CONFIG") or os.path.expanduser("~/.docker")) / "config.json"
    try:
        config = json.loads(path.read_bytes())
        for key in (host, f"https://{host}", f"https://{host}/v1/"):
            if given := config.get("auths", {}).get(key, {}).get("auth"):
                return "Basic " + base64.b64encode(base64.b64decode(given, validate=True)).decode(), ""
        if helper := config.get("credHelpers", {}).get(host) or config.get("credsStore"):
            advice += f". Docker has a password in its credential helper {helper}, which this program cannot ask"
    except FileNotFoundError:
        pass
    except (OSError, *MALFORMED) as error:
        raise PushError(f"{path} is not a valid configuration of docker: {error!r}") from error
    return "", advice


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
