"""Check that each module of the chassis imports only modules of lower layers, so there is no import cycle."""

from pathlib import Path

from tests.support import ROOT
from tests.support.imports import imported, modules, violations

# The layers, the lowest first. A module may import modules of lower layers, but no module of its own layer.
LAYERS = [
    "errors trace limits",
    "config logs answer listen negotiation embedded bounds failures blocking",
    "health direct",
    "sentinel body",
    "replication",
    "redis",
    "probes metrics",
    "connection background",
    "service",
    "server reload",
    "run",
    # The last two layers are for tests alone, so no lower layer imports them.
    "testing testing.waiting testing.proxy",
    "testing.valkey testing.served",
    "testing.replicated",
]


def test_each_module_imports_only_modules_of_lower_layers() -> None:
    wrong = violations(ROOT / "nanoservice", LAYERS, "tests/nanoservice/test_imports.py")
    assert not wrong, "\n".join(wrong)


def test_chassis_imports_no_service_and_no_test() -> None:
    others = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"nanoservice"}
    wrong = {
        f"{name} imports {other}"
        for name, path in modules(ROOT / "nanoservice").items()
        for other in imported(name, path)
        if other.partition(".")[0] in others
    }
    assert not wrong


def test_upward_imports_cycles_and_unknown_modules_are_found(tmp_path: Path) -> None:
    package = tmp_path / "thing"
    package.mkdir()
    texts = {
        "__init__": "",
        "low": "def f():\n    from thing import high",
        "mid": "import thing.beside",
        "beside": "from . import mid",
        "high": "from thing.low import f\nfrom thing.mid import g",
        "new": "",
    }
    for name, text in texts.items():
        (package / f"{name}.py").write_text(text)
    assert violations(package, ["low", "mid beside", "high gone"], "here") == [
        "thing.beside imports thing.mid, which is not in a layer below it (LAYERS in here)",
        "thing.gone does not exist: take it out of LAYERS in here",
        "thing.low imports thing.high, which is not in a layer below it (LAYERS in here)",
        "thing.mid imports thing.beside, which is not in a layer below it (LAYERS in here)",
        "thing.new is in no layer: add it to LAYERS in here",
    ]
