"""Check that the counter's modules import only lower layers, and nothing of the chassis that is for tests or development."""

from tests.support import ROOT
from tests.support.imports import imported, modules, violations

# The layers, the lowest first. A module may import modules of lower layers, and modules of the chassis that are in the image.
LAYERS = ["counter eviction", "app", "__main__"]


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
