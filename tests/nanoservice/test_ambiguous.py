"""A request that two servers may understand differently is refused, because a proxy in front could be one of the two."""

import pytest

from nanoservice.testing.served import Served
from tests.support.wire import ask, connected, is_problem, request

BODY = "Content-Length: 5"
GET = b"GET / HTTP/1.1\r\nHost: %b\r\n\r\n"


@pytest.mark.parametrize("host", ["user@localhost", "localhost/path", "localhost?x", "localhost#x", "localhost, other", "a b"])
async def test_host_that_is_no_name_is_refused(served: Served, host: str) -> None:
    assert is_problem(await ask(served.port, GET % host.encode()), 400)


@pytest.mark.parametrize("host", ["localhost", "localhost:8080", "127.0.0.1:80", "[::1]:8080", "xn--caf-dma.example."])
async def test_host_that_is_a_name_or_an_address_is_accepted(served: Served, host: str) -> None:
    assert (await ask(served.port, GET % host.encode())).status == 200


@pytest.mark.parametrize("value", ["", " ", ",", "chunked,", "identity", "gzip", "chunked, chunked", "chunked;q=1"])
@pytest.mark.parametrize("length", [(), (BODY,)], ids=["alone", "with a length"])
async def test_transfer_coding_that_is_not_exactly_chunked_is_refused(
    served: Served, value: str, length: tuple[str, ...]
) -> None:
    before = (await ask(served.port, request())).json["hits"]
    async with connected(served.port) as wire:
        await wire.send(request("POST", "/", f"Transfer-Encoding: {value}", *length), b"0\r\n\r\n", request())
        assert is_problem(await wire.reply(), 400)
        await wire.closed()
    assert (await ask(served.port, request())).json["hits"] == before + 1
