"""Reads the lists of borrowed names in docstrings, and finds the names that a library no longer has.

Nothing here imports a module of the chassis: without a borrowed name such a module may not be importable.
"""

import ast
import re
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

DOCUMENTED = {"_exit", "_asdict"}  # names of the standard library that look private

_PYTHONS = {"builtins", "asyncio.protocols", "abc", "typing"}  # An attribute of these classes is not the library's.

_ENTRY = re.compile(r"- ((?:`[^`]+`, )*`[^`]+`)[^:`]*: (.+)")

# By the first part of a borrowed name: a function that returns the object of that name.
Owners = Mapping[str, Callable[[], Any]]


def of(module: str, name: str) -> Callable[[], Any]:
    """Return a function that imports `module` and returns the object `name` in it."""
    return lambda: getattr(import_module(module), name)


def places(thing: Any) -> list[Any]:
    """Return the objects in which a library may define an attribute of `thing`: itself, its class, and the classes above."""
    classes = [kind for kind in (thing if isinstance(thing, type) else type(thing)).__mro__ if kind.__module__ not in _PYTHONS]
    return classes if isinstance(thing, type) or not hasattr(thing, "__dict__") else [thing, *classes]


class Borrowed:
    """The names that the module in the file `path` lists as borrowed."""

    def __init__(self, path: Path, owners: Owners) -> None:
        self.path = path
        self.owners = owners
        self.reasons: dict[str, str] = {}  # by name: the sentences that follow it in the list
        text = ast.get_docstring(ast.parse(path.read_text())) or ""
        for entry in text.replace("\n  ", " ").splitlines():  # The further lines of an entry are indented.
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
        """Return sentences that say what is lost with `name` and what to do, or nothing if the library still has it."""
        if self.has(name):
            return ""
        return (
            f"{self.path.parent.name}/{self.path.name} borrows {name}, and the library no longer has it. "
            f"Change the code that uses it, or do without it. From the list: {self.reasons[name]}"
        )


def foreign_private_names(package: Path) -> Iterator[tuple[str, str]]:
    """Yield each private attribute that a module of `package` uses and that no module of it defines, with the file's name."""
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
