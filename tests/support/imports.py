"""Check the imports between the modules of a package against an order of layers."""

import ast
from collections.abc import Iterator
from pathlib import Path


def modules(package: Path) -> dict[str, Path]:
    """Return a dict from the dotted name of each module in `package` to its file. A package's file is its `__init__.py`."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(name: str, path: Path) -> Iterator[str]:
    """Yield the dotted names that the module `name` imports, also inside functions; `from a import b` yields `a` and `a.b`."""
    package = name if path.stem == "__init__" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = ".".join(parents[: len(parents) - node.level + 1]) if node.level else ""
            base = ".".join(filter(None, (base, node.module)))
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def violations(package: Path, layers: list[str], where: str) -> list[str]:
    """Return a sentence for each violation of this rule: a module of `package` may import only modules of lower layers.

    `layers` has the lowest layer first, and names the modules without the name of the package. `__init__.py` of the package is
    below all layers. The sentences refer to the layers in the file `where`.
    """
    found = modules(package)
    level = {package.name: 0} | {
        f"{package.name}.{name}": number for number, layer in enumerate(layers, 1) for name in layer.split()
    }
    wrong = [f"{name} is in no layer: add it to LAYERS in {where}" for name in found.keys() - level]
    wrong += [f"{name} does not exist: take it out of LAYERS in {where}" for name in level.keys() - found]
    for name, path in found.items():
        for other in sorted(set(imported(name, path)) & found.keys() - {package.name}):
            if name in level and other in level and level[other] >= level[name]:
                wrong.append(f"{name} imports {other}, which is not in a layer below it (LAYERS in {where})")
    return sorted(wrong)
