"""What the texts name is there."""

import re
from pathlib import Path

import pytest

from nanoservice.testing.served import Served
from tests.support import ROOT

TEXTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
of_each_text = pytest.mark.parametrize("text", TEXTS, ids=lambda path: path.name)


@of_each_text
def test_make_targets_exist(text: Path) -> None:
    commands = re.findall(r"^(?:    )?make ([a-z][a-z0-9 -]*)|`make ([a-z][a-z0-9 -]*)", text.read_text(), re.MULTILINE)
    targets = set(re.findall(r"^([a-z][a-z0-9-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {target for both in commands for target in "".join(both).split()} <= targets


@of_each_text
def test_files_exist(text: Path) -> None:
    content = text.read_text()
    # With a folder, from the root or from the text's own; a test's also by its name alone.
    named = re.findall(r"`((?:\.ci|bench|docs|hitcounter|image|manifests|nanoservice|tests)/[\w./-]+)`", content)
    linked = re.findall(r"\]\((?!https?://)([\w./-]+)\)", content)
    missing = [name for name in named if not (ROOT / name).exists()]
    missing += [name for name in linked if not (text.parent / name).exists()]
    tests = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    missing += set(re.findall(r"\btest_\w+\.py\b", content)) - tests
    assert not missing


async def test_metrics_of_the_runbook_are_measured(served: Served) -> None:
    named = re.findall(r"^\| `([a-z_]+)` \|", (ROOT / "docs" / "operations.md").read_text(), re.MULTILINE)
    async with served.client.get("/") as answer:
        assert answer.status == 200
    async with served.client.get(f"http://127.0.0.1:{served.admin_port}/metrics") as answer:
        page = await answer.text()
    assert named
    assert not [name for name in named if not re.search(rf"^{name}(_count)?\b[^_]", page, re.MULTILINE)]
