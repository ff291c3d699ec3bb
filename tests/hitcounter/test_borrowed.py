"""Check the name that the counter borrows from hiredis; tests/nanoservice/test_borrowed.py checks the chassis's names."""

from typing import Any

import hiredis

from hitcounter import counter
from tests.support import ROOT
from tests.support.borrowed import DOCUMENTED, Borrowed, foreign_private_names


def test_library_has_the_borrowed_name() -> None:
    borrowed = Borrowed(counter, {"pack_command": hiredis.pack_command})
    assert list(borrowed.reasons) == ["pack_command"]
    assert not borrowed.missing("pack_command")
    command: Any = "GET", "key"
    assert hiredis.pack_command(command) == b"*2\r\n$3\r\nGET\r\n$3\r\nkey\r\n"


def test_name_that_is_taken_away_is_reported_in_a_sentence() -> None:
    gone = Borrowed(counter, {}).missing("pack_command")
    assert gone.startswith("hitcounter.counter borrows pack_command, and the library no longer has it: ")
    assert "Without it nothing is counted" in gone


def test_no_private_name_of_a_library_is_used() -> None:
    assert {name for _, name in foreign_private_names(ROOT / "hitcounter")} <= DOCUMENTED
