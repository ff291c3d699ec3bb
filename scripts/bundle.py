"""Write the parts of a bundle for clusters without internet. Each run writes the same bytes.

Usage: bundle.py image IMAGES NAME LAYOUT DIGEST PLATFORMS
       bundle.py archive FOLDER NAME FILE

`image` copies the image DIGEST of the OCI layout LAYOUT into the OCI layout IMAGES, and prints the digest of the copy. NAME is
the image's name, such as registry.example.com/service:0.1.0. PLATFORMS is a list such as linux/amd64,linux/arm64. If the image
is an index with more platforms, the copy has only PLATFORMS, and another digest.

`archive` writes FOLDER/SHA256SUMS, and then FILE, a tar archive in which FOLDER is called NAME.
"""

import hashlib
import json
import os
import re
import sys
import tarfile
from pathlib import Path
from typing import Any

INDEXES = "application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json"
TIME = 315532800  # the year 1980: some programs refuse older files


def main(arguments: list[str]) -> int:
    """Run a command, and return the exit status."""
    match arguments:
        case ["image", images, name, layout, digest, platforms]:
            print(add_image(Path(images), name, Path(layout), digest, platforms.split(",")))
        case ["archive", folder, name, file]:
            write_sums(Path(folder))
            write_archive(Path(folder), name, Path(file))
        case _:
            print(__doc__, file=sys.stderr)
            return os.EX_USAGE
    return 0


# --- images ---


def blob(layout: Path, digest: str) -> bytes:
    """Return the blob `digest` of an OCI layout, or raise SystemExit if its content has another digest."""
    content = (layout / "blobs" / digest.replace(":", "/")).read_bytes()
    if f"sha256:{hashlib.sha256(content).hexdigest()}" != digest:
        raise SystemExit(f"make: {layout}: the content of {digest} has another digest")
    return content


def write_blob(images: Path, content: bytes) -> str:
    """Write a blob into an OCI layout, and return its digest."""
    digest = hashlib.sha256(content).hexdigest()
    (images / "blobs" / "sha256").mkdir(parents=True, exist_ok=True)
    (images / "blobs" / "sha256" / digest).write_bytes(content)
    return f"sha256:{digest}"


def add_image(images: Path, name: str, layout: Path, digest: str, platforms: list[str]) -> str:
    """Copy an image, describe it in IMAGES/index.json and IMAGES/docker-ARCHITECTURE.json, and return its digest."""
    content = blob(layout, digest)
    root = json.loads(content)
    if "manifests" in root:
        chosen = [it for it in root["manifests"] if platform_of(it.get("platform", {})) in platforms]
        if chosen != root["manifests"]:
            root["manifests"] = chosen
            content = json.dumps(root, separators=(",", ":")).encode()
        manifests = [it["digest"] for it in chosen]
    else:
        manifests = [digest]
    found = [copy_manifest(images, name, layout, it) for it in manifests]
    if missing := sorted(set(platforms) - set(found)):
        print(f"make: {name} has no image for {', '.join(missing)}", file=sys.stderr)
    digest = write_blob(images, content)
    # Without a media type, a manifest or an index has the format of OCI.
    media_type = root.get("mediaType") or INDEXES[0].replace("index", "index" if "manifests" in root else "manifest")
    repository = name.rpartition(":")[0]
    for reference, tag in (f"{repository}@{digest}", None), (name, name.rpartition(":")[2]):
        # containerd and Docker give the image this name. A pod names the image by digest, and `docker push` by tag.
        annotations = {"io.containerd.image.name": reference}
        if tag:
            annotations["org.opencontainers.image.ref.name"] = tag
        entry = {"mediaType": media_type, "digest": digest, "size": len(content), "annotations": annotations}
        index = read(images / "index.json", {"schemaVersion": 2, "mediaType": INDEXES[0], "manifests": []})
        index["manifests"].append(entry)
        write(images / "index.json", index)
    write(images / "oci-layout", {"imageLayoutVersion": "1.0.0"})
    return digest


def copy_manifest(images: Path, name: str, layout: Path, digest: str) -> str:
    """Copy the image of one platform, describe it for Docker's classic image store, and return the platform."""
    content = blob(layout, digest)
    manifest = json.loads(content)
    if manifest.get("mediaType") in INDEXES:
        raise SystemExit(f"make: {name}: an index in an index is not supported")
    write_blob(images, content)
    for it in manifest["config"], *manifest["layers"]:
        write_blob(images, blob(layout, it["digest"]))
    config = json.loads(blob(layout, manifest["config"]["digest"]))
    # Docker's classic image store loads one platform, and reads only manifest.json. install.sh chooses this machine's file.
    file = images / f"docker-{config['architecture']}.json"
    paths = [f"blobs/{it['digest'].replace(':', '/')}" for it in (manifest["config"], *manifest["layers"])]
    write(file, [*read(file, []), {"Config": paths[0], "RepoTags": [name], "Layers": paths[1:]}])
    return platform_of(config)


def platform_of(config: dict[str, Any]) -> str:
    """Return a platform's name, such as linux/amd64."""
    parts = [config.get("os", ""), config.get("architecture", ""), config.get("variant", "")]
    return "/".join(part for part in parts if part).replace("linux/arm64/v8", "linux/arm64")


def read(file: Path, default: Any) -> Any:
    """Return the JSON content of a file, or `default` if the file does not exist."""
    return json.loads(file.read_text()) if file.exists() else default


def write(file: Path, content: Any) -> None:
    """Write JSON. The same content gives the same bytes."""
    file.write_text(json.dumps(content, indent=1) + "\n")


# --- the archive ---


def files(folder: Path) -> list[Path]:
    """Return the files below a folder, in an order that does not depend on the locale."""
    return sorted((it for it in folder.rglob("*") if not it.is_dir()), key=lambda it: it.relative_to(folder).as_posix())


def write_sums(folder: Path) -> None:
    """Write the checksum of each file of a folder into SHA256SUMS."""
    sums = folder / "SHA256SUMS"
    sums.unlink(missing_ok=True)
    for it in files(folder):
        if re.search(r"[\s\\]", it.relative_to(folder).as_posix()):
            raise SystemExit(f"make: {it.relative_to(folder)}: a bundle cannot have a file with a blank or backslash in its path")
    lines = [f"{hashlib.sha256(it.read_bytes()).hexdigest()}  {it.relative_to(folder).as_posix()}\n" for it in files(folder)]
    sums.write_text("".join(lines))


def write_archive(folder: Path, name: str, file: Path) -> None:
    """Write a tar archive. Its order, owners, times and permissions do not depend on the machine."""
    with tarfile.open(file, "w", format=tarfile.USTAR_FORMAT) as tar:
        for path in files(folder):
            entry = tarfile.TarInfo(f"{name}/{path.relative_to(folder).as_posix()}")
            entry.size = path.stat().st_size
            entry.mtime = TIME
            with path.open("rb") as content:
                # The file's own mode depends on the file system: on a share of Windows each file is executable.
                entry.mode = 0o755 if content.read(2) == b"#!" else 0o644
                content.seek(0)
                try:
                    tar.addfile(entry, content)
                except ValueError as error:  # the path is too long for the format ustar, which every tar reads
                    raise SystemExit(f"make: {entry.name}: {error}") from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
