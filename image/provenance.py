"""Write how the image was made: SLSA provenance, version 1, as an in-toto statement without a signature.

`provenance.py NAME DIGEST COMMIT BUILDER SERVICE PLATFORMS OPTIONS` writes it to standard output. Who has the sources, the
builder and the bases that it names makes the same image again. On GitHub one with a signature stands beside it, which tells in
what run it was made.
"""

import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any


def bases(containerfile: str, options: str) -> dict[str, str]:
    """Return the images that the build stands on: those of the Containerfile, or what the engine's options put in their place."""
    return dict(re.findall(r"^ARG (\w+)=(\S+[:@]\S+)$", containerfile, re.MULTILINE)) | dict(
        re.findall(r"--build-arg[ =](\w+)=(\S+)", options)
    )


def dependency(reference: str) -> dict[str, Any]:
    """Return an image as a dependency: by its digest, where it is given."""
    name, _, digest = reference.partition("@")
    algorithm, _, value = digest.partition(":")
    return {"uri": f"docker://{name}", **({"digest": {algorithm: value}} if digest else {})}


def statement(name: str, digest: str, commit: str, builder: str, service: str, platforms: str, options: str) -> dict[str, Any]:
    """Return the statement about the image `name` of that digest, which a builder made of a commit with these options of make."""
    lock = Path("requirements.txt").read_bytes()
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": name, "digest": {"sha256": digest.removeprefix("sha256:")}}],
        "predicateType": "https://slsa.dev/provenance/v1",
        "predicate": {
            "buildDefinition": {
                "buildType": "urn:hitcounter:make:image-multiarch",  # docs/verify.md says what it is
                "externalParameters": {
                    "command": "make image-multiarch",
                    "service": service,
                    "platforms": platforms.split(","),
                    "options": options.split(),
                },
                "resolvedDependencies": [
                    {"uri": "git+file:.", "digest": {"gitCommit": commit}},
                    {"uri": "file:requirements.txt", "digest": {"sha256": hashlib.sha256(lock).hexdigest()}},
                    *map(dependency, bases(Path("Containerfile").read_text(), options).values()),
                ],
            },
            # Whoever ran make: without a signature, no name would be proof of anything.
            "runDetails": {"builder": {"id": "urn:hitcounter:make", "version": {"engine": builder}}},
        },
    }


if __name__ == "__main__":
    json.dump(statement(*sys.argv[1:]), sys.stdout, indent=1)
    print()
