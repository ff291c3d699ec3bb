"""The form of an answer follows `Accept`."""

import time

import pytest

from nanoservice.errors import ProblemError
from nanoservice.negotiation import _RANGE, preferred
from nanoservice.testing.served import Served
from nanoservice.testing.waiting import SLACK
from tests.support.wire import connected, request

TEXT, JSON = "text/plain", "application/json"

CHOICES = [
    # what it wants
    ("text/plain", TEXT),
    ("application/json", JSON),
    ("APPLICATION/JSON", JSON),
    ("application/*", JSON),
    ("text/*", TEXT),
    ("*/*", TEXT),
    ("text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,*/*;q=0.8", TEXT),  # a browser
    # quality
    ("text/plain;q=0.5, application/json", JSON),
    ("text/plain;q=0.5, application/json;q=0.4", TEXT),
    ("text/plain;q=0.123,application/json;q=0.124", JSON),
    ("text/plain; Q=0.1 ; ext=1, application/json; q=0.2", JSON),
    ("text/plain;q=0.001", TEXT),
    # the most specific range that fits decides, wherever it stands
    ("*/*, text/plain;q=0.1", JSON),
    ("text/plain;q=0.1, */*;q=0.2", JSON),
    ("*/*;q=0.1, application/json", JSON),
    ("text/*;q=0.1, */*;q=0.5, application/json;q=0.3", JSON),
    ("text/*;q=0, */*", JSON),
    ("text/plain;q=0, */*;q=0.1", JSON),
    # between equals what is named first, then what is offered first
    ("application/json, text/plain", JSON),
    ("text/plain, application/json", TEXT),
    ("application/*, text/*", JSON),
    ("*/*, */*", TEXT),
    # nothing that it takes
    ("text/html", None),
    ("image/*", None),
    ("*/*;q=0", None),
    ("text/plain;q=0", None),
    ("text/plain;q=0.000, application/json;q=0", None),
    ("text/plain+x", None),
    ("text/plai", None),
    # malformed: passed over, and what is left decides
    ("", TEXT),
    (" ", TEXT),
    (",", TEXT),
    ("nonsense", TEXT),
    ("*", TEXT),
    ("text/", TEXT),
    ("/json", TEXT),
    ("text/plain/x", TEXT),
    ("*/json", None),
    (";;;, application/json", JSON),
    ("text plain, application/json;q=0.1", JSON),
    ("application/json;q=2", JSON),
    ("application/json;q=-1", JSON),
    ("application/json;q=", JSON),
    ("application/json;;q=1;", JSON),
    ("caf\u00e9/\u00e9, application/json", JSON),
]


@pytest.mark.parametrize(("accept", "form"), CHOICES)
def test_accept_decides(accept: str, form: str | None) -> None:
    assert preferred(accept, (TEXT, JSON)) == form


async def test_service_answers_in_the_form_or_406_which_counts_nothing(served: Served) -> None:
    hits = posts = 0
    async with connected(served.port) as wire:
        for accept, form in [choice for choice in CHOICES if choice[0].isascii()]:
            for method in ("GET", "POST", "HEAD"):
                await wire.send(request(method, "/", f"Accept: {accept}"))
                reply = await wire.reply(head=method == "HEAD")
                assert reply.status == (200 if form else 406), accept
                assert reply.headers["Content-Type"].partition(";")[0] == (form or "application/problem+json"), accept
            await wire.send(request("GET", "/", "Accept: application/json"))
            hits, posts = hits + 1 + bool(form), posts + bool(form)
            assert (await wire.reply()).json == {"hits": hits, "posts": posts}, accept


@pytest.mark.parametrize(
    ("headers", "form"),
    [
        ((), TEXT),
        (("application/json",), JSON),
        (("text/html", "application/json"), JSON),
        (("text/plain;q=0.1", "application/json;q=0.2"), JSON),
        (("application/json", "text/plain"), JSON),
        (("*/*", "text/plain;q=0"), JSON),
    ],
)
async def test_several_accept_headers_are_one_list(served: Served, headers: tuple[str, ...], form: str) -> None:
    async with connected(served.port) as wire:
        await wire.send(request("GET", "/", *(f"Accept: {header}" for header in headers)))
        assert (await wire.reply()).headers["Content-Type"].startswith(form)


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

    assert min(seconds() for _ in range(5)) < 0.01  # one of them meets no collection of garbage


def test_header_that_is_too_long_is_431_and_not_remembered() -> None:
    before = preferred.cache_info().currsize
    with pytest.raises(ProblemError) as caught:
        preferred("text/plain," * 100, (TEXT, JSON))
    assert caught.value.status == 431
    assert preferred.cache_info().currsize == before


async def test_accept_of_a_megabyte_is_431(served: Served) -> None:
    async with connected(served.port) as wire:
        await wire.send(request("GET", "/", *["Accept: " + "a/b," * 2000] * 100))
        reply = await wire.reply()
        assert (reply.status, reply.headers["Content-Type"]) == (431, "application/problem+json")
        assert reply.json["detail"] == "Accept is longer than 1000 characters"
