"""Checks of what each service answers to each method, for the tests of the chassis and of the counter."""

from collections.abc import Iterable, Mapping

from tests.support.wire import connected, is_problem, request

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND")


async def check_head(port: int, paths: Iterable[str], *headers: str) -> None:
    """Fail unless HEAD has the headers of GET on each of `paths`, and never a body."""
    async with connected(port) as wire:
        for path in paths:
            await wire.send(request("GET", path, *headers), request("HEAD", path, *headers))
            get, head = await wire.reply(), await wire.reply(head=True)
            assert head.status == get.status == 200
            # HEAD of `/` counts nothing, so the server cannot say how long the body of a GET would be.
            varying = {"Date", "Content-Length"} if path == "/" else {"Date"}
            assert {name: get.headers[name] for name in get.headers.keys() - varying} == {
                name: head.headers[name] for name in head.headers.keys() - varying
            }
        await wire.send(request("HEAD", "/nowhere"), request("GET"))
        assert (await wire.reply(head=True)).status == 404
        assert (await wire.reply()).status == 200  # if HEAD had a body, this answer would begin with it


async def check_methods(port: int, paths: Mapping[str, str]) -> None:
    """Fail unless each of `paths` accepts the methods that it is mapped to, names them in `Allow`, and answers 405 to others."""
    async with connected(port) as wire:
        for path, allowed in paths.items():
            for method in METHODS:
                await wire.send(request(method, path))
                reply = await wire.reply(head=method == "HEAD")
                if method == "OPTIONS":
                    assert (reply.status, reply.headers["Allow"], reply.body) == (204, allowed, b"")
                elif method in allowed.split(","):
                    assert reply.status == 200
                else:
                    assert is_problem(reply, 405)
                    assert reply.headers["Allow"] == allowed
