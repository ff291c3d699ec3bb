"""What the stages of the Containerfile run: Python files made small, fast to import, and the same on every machine.

`finish.py packages ROOT METADATA` does so for what pip has unpacked under ROOT, `finish.py service ROOT LIBRARY STANDARD_LIBRARY`
for the service in /app. Both run while an image is built; nothing of this is in it. ROOT, METADATA and LIBRARY each stand for `/`
of the image, and become a layer of it.
"""

import os
import py_compile
import shutil
import struct
import subprocess
import sys
from pathlib import Path

_STANDARD_LIBRARY = Path("/usr/lib/python3.13")
_TIME = int(os.environ.get("SOURCE_DATE_EPOCH", "0"))

# Not imported before a host name is looked up, which is before the first answer all the same.
_LATER = "encodings.idna"


def packages(root: Path, metadata: Path) -> None:
    """Finish the packages under `root`, and move what tells their names, versions and licences to `metadata`.

    In one layer, `aiohttp` and `aiohttp-3.dist-info` would come in the order of their names, or of all paths, by the engine.
    """
    for unpacked in root.rglob("dist-packages"):
        shutil.rmtree(unpacked / "bin", ignore_errors=True)  # commands, with the path of the builder's Python in them
        for folder in unpacked.glob("*.dist-info"):
            # What pip needs to remove a package again. There is no pip, and the hashes would be those of unstripped libraries.
            for name in ("INSTALLER", "RECORD", "REQUESTED"):
                (folder / name).unlink(missing_ok=True)
            shutil.copytree(folder, metadata / folder.relative_to(root))
            shutil.rmtree(folder)
    for library in sorted(root.rglob("*.so")):
        library.write_bytes(stripped(library))
    for source in sorted(root.rglob("*.py")):
        compile_source(source, root, "/" / source.relative_to(root))
    normalise(root)
    normalise(metadata)


def service(name: str, root: Path, library: Path, standard_library: Path) -> None:
    """Put the service `name` under `root`, and byte code of what it loads of `standard_library` under `library`.

    `standard_library` is the image's, maybe for another architecture; the service is run on this one's.
    """
    app = Path("/app")
    # The one thing in the image that tells one service from another: so an entry point without a shell can start any.
    (app / "__main__.py").symlink_to(f"{name}/__main__.py")
    # Python notes what it loads by writing byte code of it. The base has none, and what is frozen into Python needs none.
    for command in ([str(app), "--help"], ["-c", f"import {_LATER}"]):
        subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
    for noted in sorted(_STANDARD_LIBRARY.rglob("__pycache__/*.pyc")):
        module = noted.parent.parent.relative_to(_STANDARD_LIBRARY) / (noted.name.partition(".")[0] + ".py")
        compile_source(standard_library / module, library, _STANDARD_LIBRARY / module)
    for folder in list(app.rglob("__pycache__")):
        shutil.rmtree(folder)
    shutil.copytree(app, root / "app", symlinks=True)
    (root / "app" / "nanoservice" / "reload.py").unlink()  # for development alone
    for source in sorted(root.rglob("*.py")):
        compile_source(source, root, "/" / source.relative_to(root))
    normalise(library)
    normalise(root)


def compile_source(source: Path, root: Path, path: Path) -> None:
    """Write under `root` the byte code of `source`, which is `path` in the image.

    Unchecked: nothing in the image changes, so no start needs to compare a source's time, which is fixed, or its hash.
    """
    code = root / path.relative_to("/").parent / "__pycache__" / f"{path.stem}.cpython-313.pyc"
    py_compile.compile(
        str(source), str(code), str(path), doraise=True, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH
    )


def stripped(path: Path) -> bytes:
    """Return the shared library (64-bit little-endian ELF) without what no process loads of it: debug data, symbol table.

    As `strip` does, for any architecture: neither image has one. Wheels come with it, and it is two thirds of them.
    Raises ValueError for what is no such library.
    """
    library = path.read_bytes()
    if library[:6] != b"\x7fELF\x02\x01":
        raise ValueError(f"{path} is no 64-bit little-endian ELF file")
    headers, size, count = *struct.unpack_from("<Q", library, 32), *struct.unpack_from("<HH", library, 54)
    end = headers + size * count
    for header in range(headers, end, size):
        (kind,) = struct.unpack_from("<I", library, header)
        offset, file_size = *struct.unpack_from("<Q", library, header + 8), *struct.unpack_from("<Q", library, header + 32)
        if kind == 1:  # PT_LOAD
            end = max(end, offset + file_size)
    loaded = bytearray(library[:end])
    struct.pack_into("<Q", loaded, 40, 0)  # where the table of sections was
    struct.pack_into("<HHH", loaded, 58, 0, 0, 0)
    return bytes(loaded)


def normalise(root: Path) -> None:
    """Take from all under `root` the checkout's and the wheels' modes and times."""
    for path in (root, *root.rglob("*")):
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() else 0o644)
        os.utime(path, (_TIME, _TIME), follow_symlinks=False)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["packages", root, metadata]:
            packages(Path(root), Path(metadata))
        case ["service", root, library, standard_library]:
            service(os.environ["SERVICE"], Path(root), Path(library), Path(standard_library))
        case _:
            sys.exit(__doc__)
