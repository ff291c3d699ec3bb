"""The media type of an answer follows from `Accept`."""

import time

import pytest

from nanoservice.errors import ProblemError
from nanoservice.negotiation import _RANGE, preferred
from nanoservice.testing.waiting import SLACK
from tests.support.accept import CHOICES, JSON, TEXT


@pytest.mark.parametrize(("accept", "media_type"), CHOICES)
def test_accept_decides(accept: str, media_type: str | None) -> None:
    assert preferred(accept, (TEXT, JSON)) == media_type


@pytest.mark.parametrize(
    "part", ["a/a" + " " * 8000 + "x", " " * 8000 + "x", "a" * 8000, "a/" + "a" * 8000 + "@", "a/b" + "; " * 4000 + "x"]
)
def test_no_range_takes_long_to_read(part: str) -> None:
    began = time.process_time()
    _RANGE.fullmatch(part)
    assert time.process_time() - began < 0.01 * SLACK


def test_longest_header_does_not_take_long_to_read() -> None:
    def seconds() -> float:
        preferred.cache_clear()
        began = time.process_time()
        preferred("a/b,a/c;q=0," * 83, (TEXT, JSON))
        return time.process_time() - began

    assert min(seconds() for _ in range(5)) < 0.01  # garbage collection may delay some runs, but not all


def test_header_that_is_too_long_is_431_and_not_cached() -> None:
    before = preferred.cache_info().currsize
    with pytest.raises(ProblemError) as caught:
        preferred("text/plain," * 100, (TEXT, JSON))
    assert caught.value.status == 431
    assert preferred.cache_info().currsize == before
