"""No line is longer than .editorconfig allows, and each line of Markdown has at most one sentence."""

import re
import subprocess
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COLUMNS, CELL = 130, 120
# A URL or a digest cannot be wrapped, so the length of a line does not include them.
UNBREAKABLE = re.compile(r"https?://\S+|sha256:[0-9a-f]{64}")
# This pattern matches the end of a sentence if another sentence follows on the same line.
TWO_SENTENCES = re.compile(r"""(?<!\.)(?<!\be\.g)(?<!\bi\.e)[.!?](?:["')*_]|\]\([^)]*\))*\s+["'(*_\[]*[A-Z`]""")

pytestmark = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="only git knows which files belong to the repository")


def lines(ending: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield each line of the tracked files whose names end with `ending`, as (name of the file, NAME:NUMBER, line)."""
    git = ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z", f"*{ending}"]
    for name in subprocess.check_output(git, cwd=ROOT, text=True).split("\0")[:-1]:
        for number, line in enumerate((ROOT / name).read_text().splitlines(), 1):
            yield name, f"{name}:{number}", line


def unlimited() -> list[str]:
    """Return the patterns of .editorconfig whose files may have lines of any length."""
    ((glob, columns), *exceptions) = re.findall(
        r"^\[(.*)\]$(?:\n(?!\[).*)*?\nmax_line_length = (\w+)$", (ROOT / ".editorconfig").read_text(), re.MULTILINE
    )
    assert (glob, columns) == ("*", str(COLUMNS))
    assert {columns for _, columns in exceptions} == {"off"}
    return [part for glob, _ in exceptions for part in glob.strip("{}").split(",")]


def prose(text: str) -> list[str]:
    """Return the lines of a Markdown text. Lines of code, headings and rows of tables become empty lines."""
    found, fenced, in_list = [], False, False
    for line in text.splitlines():
        fenced ^= line.lstrip().startswith("```")
        in_list = bool(re.match(r" *([-*]|\d+\.) ", line)) or (in_list and (not line or line.startswith("  ")))
        code = fenced or re.match(r" {7}" if in_list else r" {4}", line)
        kept = "" if code or line.lstrip().startswith(("|", "#", "<!--")) else re.sub(r"`[^`]*`", "`", line)
        found.append(re.sub(r"^\s*([-*]|\d+\.)\s+", "", kept))
    return found


def test_no_line_is_longer_than_editorconfig_says() -> None:
    globs = unlimited()
    assert not [
        place
        for name, place, line in lines()
        if len(UNBREAKABLE.sub("", line)) > COLUMNS
        and not (name.endswith(".md") and line.lstrip().startswith("|"))
        and not any(fnmatch(name if "/" in glob else Path(name).name, glob) for glob in globs)
    ]


def test_cells_of_tables_are_phrases() -> None:
    rows = [(place, re.split(r"(?<!\\)\|", line)) for _, place, line in lines(".md") if line.lstrip().startswith("|")]
    assert not [(place, cell) for place, cells in rows for cell in cells if len(cell.strip()) > CELL]


def test_markdown_has_one_sentence_a_line() -> None:
    names = sorted({name for name, _, _ in lines(".md")})
    found = [(name, number, line) for name in names for number, line in enumerate(prose((ROOT / name).read_text()), 1)]
    assert not [(f"{name}:{number}", line) for name, number, line in found if TWO_SENTENCES.search(line)]


def test_second_sentence_of_a_line_is_found() -> None:
    two = ["One. Two", "It ends (here.) Then it goes on", "See [this](x.md). `make` does it", "- One! *Two*", "1. One? Two"]
    one = [
        "It is 1.5, e.g. `x`, or ... Perhaps",
        "1. Do it",
        "    a. B",
        "`a. B` and c",
        "| a. B |",
        "```\na. B\n```",
        "See a.md.",
    ]
    for texts, expected in ((two, True), (one, False)):
        assert [any(map(TWO_SENTENCES.search, prose(text))) for text in texts] == [expected] * len(texts)
