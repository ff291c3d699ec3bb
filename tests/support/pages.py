"""Read the commands of a page, in the order of the page."""

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Step:
    """A command of a page, and the texts in backquotes of its sentence "You see ..."."""

    command: str
    seen: list[str]


def steps(page: Path, part: str) -> list[Step]:
    """Return the steps of the part of `page` whose heading is `part`."""
    text = page.read_text().partition(f"\n## {part}\n")[2].partition("\n## ")[0]
    found = []
    for block, rest in re.findall(r"```sh\n(.*?)```\n\n?((?:[^\n]+\n)*)", text, re.DOTALL):
        seen = re.search(r"You see (.*)", rest)
        found.append(
            Step(textwrap.dedent(block).replace("\n   ", "\n").strip(), re.findall("`([^`]+)`", seen[1]) if seen else [])
        )
    return found
