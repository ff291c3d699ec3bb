"""Make Python files small, fast to import, and the same on every machine. The Containerfile runs this script.

`finish.py packages ROOT METADATA` finishes the packages that pip has unpacked under ROOT.
`finish.py service ROOT LIBRARY STANDARD_LIBRARY` finishes the service in /app.
Both commands run while an image is built, and the image does not contain this file. Each of the folders ROOT, METADATA and
LIBRARY stands for `/` of the image, and becomes a layer of the image.
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
_IMPORTED_AT_FIRST_DNS_LOOKUP = "encodings.idna"


def packages(root: Path, metadata: Path) -> None:
    """Finish the packages under `root`, and move the files with their names, versions and licences to `metadata`.

    The files in `metadata` make a layer of their own. In one layer with the packages, the order of `aiohttp` and
    `aiohttp-3.dist-info` would depend on the engine: some engines sort the names in each folder, others sort all paths.
    """
    for unpacked in root.rglob("dist-packages"):
        shutil.rmtree(unpacked / "bin", ignore_errors=True)  # commands, which contain the path of the builder's Python
        for folder in unpacked.glob("*.dist-info"):
            # pip reads these files when it removes a package, but the image has no pip. RECORD would also be wrong: it has the
            # hashes of the libraries before they are stripped.
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
    """Put the service `name` under `root`. Under `library`, put byte code of the standard library modules that it imports.

    `standard_library` is the folder with the image's standard library, which may be for another architecture. To find out what
    the service imports, this function runs the service with this machine's standard library.
    """
    app = Path("/app")
    # With this link, every service has the same entry point, without a shell. Only this link depends on the service's name.
    (app / "__main__.py").symlink_to(f"{name}/__main__.py")
    # The base ships no byte code, and Python writes byte code of each module that it imports. So the byte code shows which
    # modules the two commands below import. (Modules that are frozen into Python need no byte code.) The second command imports
    # a module that `--help` does not need: the service imports it before its first answer, when it looks up Redis's name.
    for command in ([str(app), "--help"], ["-c", f"import {_IMPORTED_AT_FIRST_DNS_LOOKUP}"]):
        subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
    for imported in sorted(_STANDARD_LIBRARY.rglob("__pycache__/*.pyc")):
        module = imported.parent.parent.relative_to(_STANDARD_LIBRARY) / (imported.name.partition(".")[0] + ".py")
        compile_source(standard_library / module, library, _STANDARD_LIBRARY / module)
    for folder in list(app.rglob("__pycache__")):
        shutil.rmtree(folder)
    shutil.copytree(app, root / "app", symlinks=True)
    (root / "app" / "nanoservice" / "reload.py").unlink()  # The reloader is for development only.
    for source in sorted(root.rglob("*.py")):
        compile_source(source, root, "/" / source.relative_to(root))
    normalise(library)
    normalise(root)


def compile_source(source: Path, root: Path, path: Path) -> None:
    """Write the byte code of `source` under `root`. In the image, the source has the path `path`.

    Python does not compare this byte code with its source. The comparison would cost time at each start, and no file in the image
    changes. Comparing times would show nothing, because all times are fixed.
    """
    code = root / path.relative_to("/").parent / "__pycache__" / f"{path.stem}.cpython-313.pyc"
    py_compile.compile(
        str(source), str(code), str(path), doraise=True, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH
    )


def stripped(path: Path) -> bytes:
    """Return the shared library (64-bit little-endian ELF) without the parts that no process loads: debug data and symbol table.

    These parts are two thirds of the wheels' size. The function does the same as the command `strip`, and works for any
    architecture. Neither the builder's image nor the base has `strip`. Raises ValueError if the file is not such a library.
    """
    library = path.read_bytes()
    if library[:6] != b"\x7fELF\x02\x01":
        raise ValueError(f"{path} is not a 64-bit little-endian ELF file")
    headers, size, count = *struct.unpack_from("<Q", library, 32), *struct.unpack_from("<HH", library, 54)
    end = headers + size * count
    for header in range(headers, end, size):
        (kind,) = struct.unpack_from("<I", library, header)
        offset, file_size = *struct.unpack_from("<Q", library, header + 8), *struct.unpack_from("<Q", library, header + 32)
        if kind == 1:  # PT_LOAD, a segment that is loaded
            end = max(end, offset + file_size)
    loaded = bytearray(library[:end])
    # The section header table is cut off. So clear the fields of the ELF header that describe this table: the table's offset, the
    # size and number of its entries, and the index of the section with its names.
    struct.pack_into("<Q", loaded, 40, 0)
    struct.pack_into("<HHH", loaded, 58, 0, 0, 0)
    return bytes(loaded)


def normalise(root: Path) -> None:
    """Set fixed modes and times for all files and folders under `root`, so that the checkout and the wheels have no influence."""
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
