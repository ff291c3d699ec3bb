"""The media type of an answer on `/` follows from `Accept`."""

import pytest

from nanoservice.testing.served import Served
from tests.support.accept import CHOICES, JSON, TEXT
from tests.support.wire import connected, request


async def test_service_answers_in_the_media_type_or_406_which_counts_nothing(served: Served) -> None:
    hits = posts = 0
    async with connected(served.port) as wire:
        for accept, media_type in [choice for choice in CHOICES if choice[0].isascii()]:
            for method in ("GET", "POST", "HEAD"):
                await wire.send(request(method, "/", f"Accept: {accept}"))
                reply = await wire.reply(head=method == "HEAD")
                assert reply.status == (200 if media_type else 406), accept
                assert reply.headers["Content-Type"].partition(";")[0] == (media_type or "application/problem+json"), accept
            await wire.send(request("GET", "/", "Accept: application/json"))
            hits, posts = hits + 1 + bool(media_type), posts + bool(media_type)
            assert (await wire.reply()).json == {"hits": hits, "posts": posts}, accept


@pytest.mark.parametrize(
    ("headers", "media_type"),
    [
        ((), TEXT),
        (("application/json",), JSON),
        (("text/html", "application/json"), JSON),
        (("text/plain;q=0.1", "application/json;q=0.2"), JSON),
        (("application/json", "text/plain"), JSON),
        (("*/*", "text/plain;q=0"), JSON),
    ],
)
async def test_several_accept_headers_are_one_list(served: Served, headers: tuple[str, ...], media_type: str) -> None:
    async with connected(served.port) as wire:
        await wire.send(request("GET", "/", *(f"Accept: {header}" for header in headers)))
        assert (await wire.reply()).headers["Content-Type"].startswith(media_type)


@pytest.mark.parametrize("headers", [["Accept: " + "a/b," * 2000], ["Accept: " + "a/b," * 1000] * 3])
async def test_accept_of_many_kilobytes_is_431(served: Served, headers: list[str]) -> None:
    async with connected(served.port) as wire:
        await wire.send(request("GET", "/", *headers))
        reply = await wire.reply()
        assert (reply.status, reply.headers["Content-Type"]) == (431, "application/problem+json")
        assert reply.json["detail"] == "Accept is longer than 1000 characters"
