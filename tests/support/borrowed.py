"""Read the lists of borrowed names in docstrings, and find the names that a library no longer has.

Nothing here imports a module of the chassis, because the import may fail when a borrowed name is missing.
"""

import ast
import re
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

DOCUMENTED = {"_exit", "_asdict"}  # these names of the standard library look private, but are documented

# If a class of these modules defines an attribute, the attribute comes from Python and not from a library.
_PYTHONS = {"builtins", "asyncio.protocols", "abc", "typing"}

_ENTRY = re.compile(r"- ((?:`[^`]+`, )*`[^`]+`)[^:`]*: (.+)")

# Maps the first part of a borrowed name to a function that returns the object of this name.
Owners = Mapping[str, Callable[[], Any]]


def of(module: str, name: str) -> Callable[[], Any]:
    """Return a function that imports `module` and returns the object `name` in it."""
    return lambda: getattr(import_module(module), name)


def places(thing: Any) -> list[Any]:
    """Return the objects that may define an attribute of `thing`: `thing` itself, its class, and the base classes."""
    classes = [kind for kind in (thing if isinstance(thing, type) else type(thing)).__mro__ if kind.__module__ not in _PYTHONS]
    return classes if isinstance(thing, type) or not hasattr(thing, "__dict__") else [thing, *classes]


class Borrowed:
    """The names that the module in the file `path` lists as borrowed."""

    def __init__(self, path: Path, owners: Owners) -> None:
        self.path = path
        self.owners = owners
        self.reasons: dict[str, str] = {}  # the sentences that follow each name in the list
        text = ast.get_docstring(ast.parse(path.read_text())) or ""
        for entry in text.replace("\n  ", " ").splitlines():  # Indented lines continue an entry.
            if found := _ENTRY.fullmatch(entry):
                self.reasons |= dict.fromkeys(re.findall(r"`([^`]+)`", found[1]), found[2])

    def has(self, name: str) -> bool:
        """Return whether the library still has `name`."""
        owner, _, attribute = name.partition(".")
        try:
            found = self.owners[owner]()
        except (ImportError, AttributeError):
            return False
        return not attribute or any(attribute in vars(place) for place in places(found))

    def missing(self, name: str) -> str:
        """Return what breaks without `name` and what to do, or an empty string if the library still has `name`."""
        if self.has(name):
            return ""
        return (
            f"{self.path.parent.name}/{self.path.name} borrows {name}, and the library no longer has it. "
            f"Change the code that uses this name, or do without it. From the list: {self.reasons[name]}"
        )


def foreign_private_names(package: Path) -> Iterator[tuple[str, str]]:
    """Yield the file and the name of each private attribute that `package` reads or sets but does not define."""
    trees = {path: ast.parse(path.read_text()) for path in sorted(package.glob("*.py"))}
    defined = set()
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                defined.add(node.name)
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                for target in (one for group in targets for one in ast.walk(group)):
                    if isinstance(target, ast.Name):
                        defined.add(target.id)
                    elif isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == "self":
                        defined.add(target.attr)
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.endswith("__"):
                if node.attr not in defined:
                    yield path.name, node.attr
