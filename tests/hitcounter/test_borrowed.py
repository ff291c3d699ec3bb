"""Check the name that the counter borrows from hiredis; tests/nanoservice/test_borrowed.py checks the chassis's names."""

from typing import Any

import pytest

from tests.support import ROOT
from tests.support.borrowed import DOCUMENTED, Borrowed, foreign_private_names, of

COUNTER = Borrowed(ROOT / "hitcounter" / "counter.py", {"pack_command": of("hiredis", "pack_command")})


def test_library_has_the_borrowed_name() -> None:
    assert list(COUNTER.reasons) == ["pack_command"]
    gone = COUNTER.missing("pack_command")
    assert not gone, gone
    pack_command: Any = COUNTER.owners["pack_command"]()
    assert pack_command(("GET", "key")) == b"*2\r\n$3\r\nGET\r\n$3\r\nkey\r\n"


def test_name_that_is_removed_is_reported_in_sentences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("hiredis.pack_command")
    gone = COUNTER.missing("pack_command")
    assert gone.startswith("hitcounter/counter.py borrows pack_command, and the library no longer has it. ")
    assert gone.endswith(".")


def test_no_private_name_of_a_library_is_used() -> None:
    assert {name for _, name in foreign_private_names(ROOT / "hitcounter")} <= DOCUMENTED
