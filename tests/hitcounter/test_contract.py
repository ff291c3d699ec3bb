"""Test the counter's answers on `/` to each method, media type, body and Idempotency-Key."""

import asyncio
import contextlib
import sys
from pathlib import Path

import pytest

from nanoservice import __version__
from nanoservice.testing.served import Served
from nanoservice.testing.valkey import Valkey
from nanoservice.testing.waiting import SLACK, eventually
from tests.support import needs_linux
from tests.support.contract import METHODS, check_head, check_methods
from tests.support.process import Spawn, resident
from tests.support.wire import ask, chunked, connected, is_problem, request

MIB = 1 << 20
PATHS = {"/": "GET,HEAD,OPTIONS,POST"} | dict.fromkeys(("/livez", "/readyz", "/version", "/openapi.json"), "GET,HEAD,OPTIONS")
JSON = "Accept: application/json"


async def counts(served: Served) -> tuple[int, int]:
    """Count a hit; return the number of hits before this one, and the number of posts."""
    numbers = (await ask(served.port, request("GET", "/", JSON))).json
    return numbers["hits"] - 1, numbers["posts"]


async def test_each_hit_is_counted_and_answered(served: Served) -> None:
    for number in (1, 2, 3):
        async with served.client.get("/") as answer:
            assert await answer.text() == f"Hello from Redis! I have been seen {number} times.\nPOST requests served: 0.\n"
            assert answer.status == 200
            assert answer.headers["Cache-Control"] == "no-store"
            assert answer.content_type == "text/plain"


async def test_each_post_is_counted_and_answered_and_is_not_a_hit(served: Served) -> None:
    for number in (1, 2, 3):
        async with served.client.post("/", data=b"anything") as answer:
            assert await answer.text() == f"Hello from Redis! I have been seen 0 times.\nPOST requests served: {number}.\n"
            assert answer.headers["Cache-Control"] == "no-store"


async def test_json_is_answered_where_accept_asks_for_it(served: Served) -> None:
    async with connected(served.port) as wire:
        for method, numbers in (("GET", (1, 0)), ("POST", (1, 1)), ("GET", (2, 1))):
            await wire.send(request(method, "/", JSON))
            reply = await wire.reply()
            assert reply.body == b'{"hits": %d, "posts": %d}\n' % numbers
            assert reply.headers["Content-Type"] == "application/json"
            assert reply.headers["Vary"] == "Accept"


async def test_head_and_options_count_nothing(served: Served) -> None:
    async with connected(served.port) as wire:
        for _ in range(3):
            await wire.send(request("HEAD"))
            assert (await wire.reply(head=True)).status == 200
            await wire.send(request("OPTIONS"))
            assert (await wire.reply()).status == 204
    assert await counts(served) == (0, 0)


@pytest.mark.parametrize("headers", [(), (JSON,)])
async def test_head_has_the_headers_of_get(served: Served, headers: tuple[str, ...]) -> None:
    await check_head(served.port, PATHS, *headers)


async def test_every_answer_on_the_root_forbids_caching(served: Served) -> None:
    async with connected(served.port) as wire:
        for method in METHODS:
            for header in ("Accept: */*", "Accept: text/html", "Expect: something", "Idempotency-Key:"):
                await wire.send(request(method, "/", header))
                assert (await wire.reply(head=method == "HEAD")).headers["Cache-Control"] == "no-store", (method, header)


async def test_path_accepts_its_methods_and_lists_them(served: Served) -> None:
    await check_methods(served.port, PATHS)


@pytest.mark.parametrize("size", [0, 1, 70_000, MIB - 1, MIB])
@pytest.mark.parametrize("framing", ["length", "chunked"])
async def test_body_up_to_a_mebibyte_is_discarded(served: Served, size: int, framing: str) -> None:
    body = b"x" * size
    async with connected(served.port) as wire:
        for number in (1, 2):  # both requests use one connection, so the service must read the first body to its end
            if framing == "chunked":
                await wire.send(request("POST", "/", JSON, "Transfer-Encoding: chunked"), *chunked(body, 60_000))
            else:
                await wire.send(request("POST", "/", JSON, *([] if size else ["Content-Length: 0"]), body=body))
            assert (await wire.reply()).json == {"hits": 0, "posts": number}


async def test_longer_body_is_413_and_counts_nothing(served: Served) -> None:
    body = b"x" * (MIB + 1)
    for data in (
        (request("POST", "/", body=body),),
        (request("POST", "/", "Transfer-Encoding: chunked"), *chunked(body)),
        (request("POST", "/", "Transfer-Encoding: chunked"), *chunked(body, 1 << 20)),
    ):
        async with connected(served.port) as wire:
            await wire.send(*data)
            reply = await wire.reply()
            assert is_problem(reply, 413)
            assert reply.json["detail"] == "a body has at most 1048576 bytes"
            assert reply.headers["Connection"] == "close"
            await wire.closed()
    assert await counts(served) == (0, 0)


async def test_length_that_is_too_long_is_413_before_the_body(served: Served) -> None:
    for length in (MIB + 1, 1 << 40, (1 << 63) - 1):
        assert is_problem(await ask(served.port, request("POST", "/", f"Content-Length: {length}")), 413)
    assert is_problem(await ask(served.port, request("POST", "/", f"Content-Length: {1 << 64}")), 400)


async def test_chunked_body_without_end_is_413(served: Served) -> None:
    async with connected(served.port) as wire:
        await wire.send(request("POST", "/", "Transfer-Encoding: chunked"))
        reply = asyncio.create_task(wire.reply())
        while not reply.done():
            await wire.send(b"4000\r\n" + b"x" * 0x4000 + b"\r\n")
            await asyncio.sleep(0)
        assert is_problem(await reply, 413)


@needs_linux("the test reads /proc")
async def test_bodies_are_not_kept_in_memory(spawn: Spawn, valkey: Valkey) -> None:
    patient = "import runpy; from nanoservice import connection; connection.RECEIVE_SECONDS = 120;"
    command = sys.executable, "-c", patient + "runpy.run_module('hitcounter', run_name='__main__')"
    process = spawn(valkey.environ(BIND_HOST="127.0.0.1"), command=command)

    def received() -> bool:
        """Return whether the process has read everything: no socket on its port has a byte in a queue."""
        sockets = [line.split()[1:5] for line in Path("/proc/net/tcp").read_text().splitlines()]
        return all(
            queues == "00000000:00000000" for *ends, _, queues in sockets if any(f":{process.port:04X}" in end for end in ends)
        )

    async def upload(number: int) -> int:
        """Send `number` bodies at a time; return the memory in use when each body lacks only its last byte."""
        async with contextlib.AsyncExitStack() as stack:
            wires = [await stack.enter_async_context(connected(process.port)) for _ in range(number)]
            for wire in wires:
                await wire.send(request("POST", "/", f"Content-Length: {MIB}"))
            for piece in [MIB // 16] * 15 + [MIB // 16 - 1]:  # send in pieces, so that little of each body is in flight
                for wire in wires:
                    await wire.send(b"x" * piece)
                await eventually(received, 10 * SLACK)
            used = resident(process)
            for wire in wires:
                await wire.send(b"x")
            assert [(await wire.reply()).status for wire in wires] == [200] * number
        return used

    before = await upload(5)
    assert await upload(200) - before < 80 * MIB  # the bodies have 200 MiB; 80 MiB leave room for read buffers


async def test_hit_with_a_body_is_a_hit(served: Served) -> None:
    async with connected(served.port) as wire:
        for number, size in enumerate((1, 70_000, MIB + 1), 1):
            await wire.send(request("GET", "/", JSON, body=b"x" * size))
            assert (await wire.reply()).json["hits"] == number
        await wire.send(request("GET", "/", JSON, "Transfer-Encoding: chunked"), *chunked(b"x" * 100))
        assert (await wire.reply()).json["hits"] == 4


async def test_pipelined_requests_are_answered_in_order(served: Served) -> None:
    async with connected(served.port) as wire:
        await wire.send(
            *(request("GET", "/", JSON) for _ in range(50)),
            request("POST", "/", JSON, body=b"x" * 200_000),
            request("HEAD"),
            request("POST", "/", JSON, "Transfer-Encoding: chunked"), *chunked(b"x" * 200_000, 9_999),
            request("GET", "/x"),
            *(request("GET", "/", JSON) for _ in range(50)),
        )  # fmt: skip
        assert [(await wire.reply()).json["hits"] for _ in range(50)] == list(range(1, 51))
        assert (await wire.reply()).json == {"hits": 50, "posts": 1}
        assert (await wire.reply(head=True)).status == 200
        assert (await wire.reply()).json == {"hits": 50, "posts": 2}
        assert (await wire.reply()).status == 404
        assert [(await wire.reply()).json["hits"] for _ in range(50)] == list(range(51, 101))


@pytest.mark.parametrize("begin", [b"", b"5\r\nabcde\r\n", b"5\r\nab"], ids=["at once", "after a chunk", "within a chunk"])
async def test_body_that_becomes_malformed_is_a_problem_and_counts_nothing(
    served: Served, begin: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with connected(served.port) as wire:
        await wire.send(request("POST", "/", "Transfer-Encoding: chunked", "Expect: 100-continue"))
        assert (await wire.reply()).status == 100
        await wire.send(begin)
        await asyncio.sleep(0)
        await wire.send(b"mark\r\n\r\n")
        began = asyncio.get_running_loop().time()
        assert is_problem(await wire.reply(), 400)
        await wire.closed()
        assert asyncio.get_running_loop().time() - began < 1 * SLACK
    assert await counts(served) == (0, 0)
    assert not [record for record in caplog.records if record.levelname not in ("DEBUG", "INFO")]


@pytest.mark.parametrize("key", ["k", "a" * 255, "8e03978e-40d5-43e8-bc93-6894a57f9324", '"quoted"', "a b", "~!@#$%^&*()"])
async def test_same_key_counts_once_and_gets_the_same_answer(served: Served, key: str) -> None:
    async with connected(served.port) as wire:
        await wire.send(request("POST", "/", JSON, f"Idempotency-Key: {key}", body=b"first"))
        first = await wire.reply()
        assert first.json == {"hits": 0, "posts": 1}
        await wire.send(request("GET"), request("POST"))
        await wire.reply()
        await wire.reply()
        await wire.send(request("POST", "/", JSON, f"idempotency-key:   {key} ", body=b"again" * 1000))
        assert (await wire.reply()).body == first.body
        await wire.send(request("POST", "/", JSON, f"Idempotency-Key: {key[:-1]}x"))
        assert (await wire.reply()).json == {"hits": 1, "posts": 3}


@pytest.mark.parametrize(
    "headers",
    [("",), ("   ",), ("a" * 256,), ("caf\u00e9",), ("a\tb",), ("\x80",), ("a", "a"), ("a", "")],
    ids=["empty", "blank", "256 characters", "not ASCII", "tab", "C1", "two", "two, one empty"],
)  # fmt: skip
async def test_malformed_key_is_400_and_counts_nothing(served: Served, headers: tuple[str, ...]) -> None:
    async with connected(served.port) as wire:
        keys = [f"Idempotency-Key: {header}" for header in headers]
        await wire.send(request("POST", "/", *keys, body=b"x" * 100_000), request("POST", "/", *keys))
        for _ in range(2):
            reply = await wire.reply()
            assert is_problem(reply, 400)
            assert reply.json["detail"] == "Idempotency-Key must be one header of 1 to 255 printable ASCII characters"
        await wire.send(request("GET", "/", *keys), request("GET", "/", JSON, *keys), request("HEAD", "/", *keys))
        assert (await wire.reply()).status == 200  # a GET ignores the key
        assert (await wire.reply()).json == {"hits": 2, "posts": 0}
        assert (await wire.reply(head=True)).status == 200


async def test_key_is_ignored_on_get(served: Served) -> None:
    async with connected(served.port) as wire:
        for number in (1, 2):
            await wire.send(request("GET", "/", JSON, "Idempotency-Key: k"))
            assert (await wire.reply()).json["hits"] == number


async def test_version_names_the_counter(served: Served) -> None:
    assert (await ask(served.port, request("GET", "/version"))).json == {"name": "hitcounter", "version": __version__}
