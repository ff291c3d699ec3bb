"""Read the lists of borrowed names in docstrings, and find the names that a library no longer has."""

import ast
import inspect
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

DOCUMENTED = {"_exit", "_asdict"}  # these names of the standard library look private

_ENTRY = re.compile(r"- ((?:`[^`]+`, )*`[^`]+`)[^:`]*: (.+)")


class Borrowed:
    """The names that `module` lists as borrowed; `owners` has the library's object for the first part of each name."""

    def __init__(self, module: ModuleType, owners: Mapping[str, Any]) -> None:
        self.module = module
        self.owners = owners
        self.reasons: dict[str, str] = {}  # the sentences that follow each name in the list
        for entry in (module.__doc__ or "").replace("\n  ", " ").splitlines():  # indented lines continue an entry
            if found := _ENTRY.fullmatch(entry):
                self.reasons |= dict.fromkeys(re.findall(r"`([^`]+)`", found[1]), found[2])

    def missing(self, name: str) -> str:
        """Return a sentence that says what breaks without `name`, or an empty string if the library still has `name`."""
        owner, _, attribute = name.partition(".")
        if owner in self.owners and (not attribute or hasattr(self.owners[owner], attribute)):
            return ""
        return f"{self.module.__name__} borrows {name}, and the library no longer has it: {self.reasons[name]}"


class Without:
    """An object that behaves like `thing` except that it has no attribute `gone`."""

    def __init__(self, thing: Any, gone: str) -> None:
        self._thing = thing
        self._gone = gone

    def __getattribute__(self, name: str) -> Any:
        if name == object.__getattribute__(self, "_gone"):
            raise AttributeError(name)
        return getattr(object.__getattribute__(self, "_thing"), name)


def changed_parameters(own: type, base: type, names: Iterator[str]) -> Iterator[str]:
    """Yield a sentence for each method of `names` whose parameters in the class `own` differ from those in the class `base`."""
    for name in names:
        if name in vars(own):
            ours, theirs = (list(inspect.signature(getattr(one, name)).parameters) for one in (own, base))
            if ours != theirs:
                yield f"{base.__name__}.{name} now has the parameters {theirs}, and {own.__name__} overrides it with {ours}"


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
