"""List the contents of an image: write an SPDX 2.3 document (ISO/IEC 5962) about an OCI layout, with the same bytes each time.

Usage: sbom.py LAYOUT LOCK WHEELS VERSION

The script writes the document to standard output. The document lists the packages that the image itself records: Debian packages
in /var/lib/dpkg, and Python packages in their metadata. For each Python package the document also names the wheel in WHEELS from
which the package was unpacked, and the packages that require this package (from LOCK). The service is not a package of its own:
the image's own entry stands for the service.
"""

import gzip
import hashlib
import io
import json
import os
import posixpath
import re
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from datetime import UTC, datetime
from email.message import Message
from email.parser import BytesParser
from pathlib import Path
from typing import Any
from urllib.parse import quote

Element = dict[str, Any]

_STATUS = "var/lib/dpkg/status.d/"
_PACKAGES = "usr/local/lib/python3.13/dist-packages/"
_INTERESTING = re.compile(
    rf"{_STATUS}[^/]+|usr/share/doc/[^/]+(/copyright)?|(etc|usr/lib)/os-release|{_PACKAGES}[^/]+\.dist-info/(METADATA|WHEEL)"
)
# Some packages do not declare an SPDX expression as their licence yet. This dictionary maps the names that they use to SPDX
# expressions.
_LICENCES = {name: name for name in ("Apache-2.0", "MIT", "PSF-2.0")} | {
    "Apache 2": "Apache-2.0",
    "Apache 2.0": "Apache-2.0",
    "MIT License": "MIT",
}


class Image:
    """The files of one platform's image that describe its packages."""

    def __init__(self, blobs: Path, manifest: Any) -> None:
        self._files: dict[str, bytes] = {}
        self._links: dict[str, str] = {}
        for layer in manifest["layers"]:
            with tarfile.open(fileobj=io.BytesIO(unpacked(blob(blobs, layer["digest"])))) as tar:
                for member in tar:
                    name = posixpath.normpath(member.name).lstrip("/")
                    if not _INTERESTING.fullmatch(name):
                        continue
                    if member.isfile() and (file := tar.extractfile(member)):
                        self._files[name] = file.read()
                    elif member.issym():
                        self._links[name] = posixpath.normpath(posixpath.join(posixpath.dirname(name), member.linkname))

    def read(self, name: str) -> bytes | None:
        """Return the content of a file, or None if there is no such file. The file or its folder may be a symbolic link."""
        folder = posixpath.dirname(name)
        name = posixpath.join(self._links.get(folder, folder), posixpath.basename(name))
        return self._files.get(self._links.get(name, name))

    def match(self, pattern: str) -> Iterator[tuple[str, Message]]:
        """Yield the name and the fields of each file that the pattern matches, sorted by name."""
        for name in sorted(self._files):
            if re.fullmatch(pattern, name):
                yield name, BytesParser().parsebytes(self._files[name])


def blob(blobs: Path, digest: str) -> bytes:
    """Return the blob with the digest `digest`. Raises ValueError if the content has another digest."""
    content = (blobs / digest.replace(":", "/")).read_bytes()
    if f"sha256:{hashlib.sha256(content).hexdigest()}" != digest:
        raise ValueError(f"the content of {digest} in {blobs} has another digest")
    return content


def unpacked(layer: bytes) -> bytes:
    """Return the tar archive of a layer, which may be compressed or not."""
    return gzip.decompress(layer) if layer.startswith(b"\x1f\x8b") else layer


def debian_packages(image: Image, platform: str) -> Iterator[tuple[Element, Element | None]]:
    """Yield each Debian package of the image with its licence. The licence is None if the image lacks the licence's text."""
    release = dict(re.findall(r'^(\w+)="?([^"\n]*)', (image.read("usr/lib/os-release") or b"").decode(), re.MULTILINE))
    distribution = f"{release['ID']}-{release['VERSION_ID']}"
    for _, fields in image.match(rf"{_STATUS}(?!.*\.md5sums)[^/]+"):
        name, version, architecture = fields["Package"], fields["Version"], fields["Architecture"]
        text = image.read(f"usr/share/doc/{name}/copyright")
        reference = f"LicenseRef-Debian-{identifier(name)}"
        source = re.fullmatch(r"(\S+)(?: \((.+)\))?", fields.get("Source", name))
        assert source
        yield (
            package(
                f"Debian-{name}-{platform}",
                name,
                version,
                f"pkg:deb/debian/{quote(name)}@{quote(version)}?arch={architecture}&distro={distribution}",
                reference if text else "NOASSERTION",
                supplier="Organization: " + re.sub("<(.*)>", r"(\1)", fields["Maintainer"]),
                sourceInfo=f"built from the source package {source[1]} {source[2] or version}",
            ),
            text
            and {
                "licenseId": reference,
                "name": f"copyright and licence of {name}",
                "extractedText": text.decode(errors="replace"),
            },
        )


def python_packages(image: Image, platform: str, lock: dict[str, Any], wheels: Path) -> Iterator[Element]:
    """Yield the image's Python packages. Raises ValueError if the lock lacks a package's version, or the hash of its wheel."""
    for name, fields in image.match(rf"{_PACKAGES}[^/]+/METADATA"):
        project, version = normal(fields["Name"]), fields["Version"]
        wheel = unpacked_from(wheels, image, posixpath.dirname(name))
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if lock.get(project, {}).get("version") != version or digest not in lock[project]["hashes"]:
            raise ValueError(f"{wheel.name}, from which the image was made, is not in the lock")
        yield package(
            f"Python-{project}-{platform}",
            fields["Name"],
            version,
            f"pkg:pypi/{project}@{quote(version)}?file_name={quote(wheel.name)}",
            python_licence(fields),
            packageFileName=wheel.name,
            checksums=[{"algorithm": "SHA256", "checksumValue": digest}],
        )


def unpacked_from(wheels: Path, image: Image, folder: str) -> Path:
    """Return the wheel whose metadata equals the metadata in the image's `folder`. Raises ValueError if no wheel has it."""
    info = posixpath.basename(folder)
    for wheel in sorted(wheels.glob(f"{info.removesuffix('.dist-info')}-*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            if all(archive.read(f"{info}/{name}") == image.read(f"{folder}/{name}") for name in ("METADATA", "WHEEL")):
                return wheel
    raise ValueError(f"{wheels} has no wheel with the metadata of {info}; run: make wheels")


def python_licence(fields: Message) -> str:
    """Return the licence that a package declares, or NOASSERTION if the declaration is ambiguous or missing."""
    if expression := fields["License-Expression"]:
        return str(expression)
    return _LICENCES.get(fields.get("License", ""), "NOASSERTION")


def read_lock(text: str) -> dict[str, Any]:
    """Return the version and the hashes of each package in a lock, and the packages that require it (`via`)."""
    found: dict[str, Any] = {}
    for name, version, rest in re.findall(r"^([\w.-]+)==(\S+)((?:.*\n(?=\s))*.*)", text, re.MULTILINE):
        requirers = [line.strip(" #") for line in rest.partition("# via")[2].splitlines() if line.strip(" #")]
        found[normal(name)] = {"version": version, "hashes": set(re.findall(r"sha256:(\w+)", rest)), "via": requirers}
    return found


def normal(name: str) -> str:
    """Return the normalised name of a Python package, which PyPI uses to compare names."""
    return re.sub(r"[-_.]+", "-", name).lower()


def identifier(text: str) -> str:
    """Replace each character of `text` that SPDX does not allow in an identifier by a hyphen, and return the result."""
    return re.sub(r"[^a-zA-Z0-9.-]", "-", text)


def package(spdx: str, name: str, version: str, purl: str, licence: str, **more: Any) -> Element:
    """Return an entry with the fields that every package has. Unknown values are NOASSERTION."""
    return {
        "SPDXID": f"SPDXRef-{identifier(spdx)}",
        "name": name,
        "versionInfo": version,
        "downloadLocation": "NOASSERTION",
        "filesAnalyzed": False,
        "licenseConcluded": "NOASSERTION",
        "licenseDeclared": licence,
        "copyrightText": "NOASSERTION",
        "externalRefs": [{"referenceCategory": "PACKAGE-MANAGER", "referenceType": "purl", "referenceLocator": purl}],
        **more,
    }


def container(name: str, digest: str, version: str, platform: str = "") -> Element:
    """Return the entry of one platform's image. Without `platform`, return the entry of the index of all platforms."""
    return package(
        f"Image-{platform or 'index'}",
        name,
        version,
        f"pkg:oci/{name}@{quote(digest, safe='')}" + (f"?arch={platform.partition('/')[2]}" if platform else ""),
        "Apache-2.0",
        primaryPackagePurpose="CONTAINER",
        checksums=[{"algorithm": "SHA256", "checksumValue": digest.removeprefix("sha256:")}],
    )


def document(layout: Path, lock: dict[str, Any], wheels: Path, version: str, created: int) -> Element:
    """Return the document about all platforms of the image in `layout`."""
    blobs = layout / "blobs"
    top = json.loads((layout / "index.json").read_bytes())["manifests"][0]["digest"]
    index = json.loads(blob(blobs, top))
    packages, licences, relationships = [], {}, []

    def relate(one: str, how: str, other: str) -> None:
        relationships.append({"spdxElementId": one, "relationshipType": how, "relatedSpdxElement": other})

    name = ""
    for entry in index["manifests"]:
        platform = f"{entry['platform']['os']}/{entry['platform']['architecture']}"
        manifest = json.loads(blob(blobs, entry["digest"]))
        name = json.loads(blob(blobs, manifest["config"]["digest"]))["config"]["Labels"]["org.opencontainers.image.title"]
        image = Image(blobs, manifest)
        root = container(name, entry["digest"], version, platform)
        packages.append(root)
        relate("SPDXRef-Image-index", "CONTAINS", root["SPDXID"])
        for one, licence in debian_packages(image, platform):
            packages.append(one)
            relate(root["SPDXID"], "CONTAINS", one["SPDXID"])
            if licence:
                licences[licence["licenseId"]] = licence
        here = {normal(one["name"]): one for one in python_packages(image, platform, lock, wheels)}
        for project, one in here.items():
            packages.append(one)
            relate(root["SPDXID"], "CONTAINS", one["SPDXID"])
            for name_in_lock in lock[project]["via"]:
                requirer = root if name_in_lock.startswith("-r ") else here.get(normal(name_in_lock))
                if requirer:
                    relate(requirer["SPDXID"], "DEPENDS_ON", one["SPDXID"])
    content = {
        "packages": [container(name, top, version), *packages],
        "hasExtractedLicensingInfos": [licences[one] for one in sorted(licences)],
        "relationships": [
            {
                "spdxElementId": "SPDXRef-DOCUMENT",
                "relationshipType": "DESCRIBES",
                "relatedSpdxElement": "SPDXRef-Image-index",
            },
            *relationships,
        ],
    }
    hashed = hashlib.sha256(json.dumps([content, created]).encode()).hexdigest()
    return {
        "spdxVersion": "SPDX-2.3",
        "dataLicense": "CC0-1.0",
        "SPDXID": "SPDXRef-DOCUMENT",
        "name": f"{name} {version}",
        # Each document needs a namespace of its own. This URL is only a name: nothing can be downloaded from it.
        "documentNamespace": f"https://spdx.org/spdxdocs/{name}-{hashed}",
        "creationInfo": {
            "created": datetime.fromtimestamp(created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "creators": [f"Tool: {name}-sbom.py"],
        },
        **content,
    }


if __name__ == "__main__":
    if len(sys.argv) != 5:
        print(__doc__, file=sys.stderr)
        sys.exit(64)
    layout, lock, wheels, version = sys.argv[1:]
    try:
        made = document(
            Path(layout),
            read_lock(Path(lock).read_text()),
            Path(wheels),
            version,
            int(os.environ.get("SOURCE_DATE_EPOCH", "0")),
        )
    except (ValueError, OSError) as error:
        sys.exit(f"make: the contents of the image cannot be listed: {error}")
    json.dump(made, sys.stdout, indent=1)
    print()
