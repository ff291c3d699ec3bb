"""The modules of the counter import downwards only, and of the chassis nothing that is for tests or for development."""

from tests.support import ROOT
from tests.support.imports import imported, modules, violations

# From the bottom up. A module may import modules of the layers before its own, and any of the chassis's that serves.
LAYERS = ["counter", "app", "__main__"]


def test_each_module_imports_only_modules_of_lower_layers() -> None:
    wrong = violations(ROOT / "hitcounter", LAYERS, "tests/hitcounter/test_imports.py")
    assert not wrong, "\n".join(wrong)


def test_counter_imports_nothing_that_is_not_in_the_image() -> None:
    absent = "nanoservice.testing", "nanoservice.reload", "tests"
    wrong = {
        f"{name} imports {other}"
        for name, path in modules(ROOT / "hitcounter").items()
        for other in imported(name, path)
        if f"{other}.".startswith(tuple(f"{module}." for module in absent))
    }
    assert not wrong
