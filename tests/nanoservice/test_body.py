"""A JSON body is read into a dataclass or refused; tests/nanoservice/test_shop.py tests each reason to refuse it."""

import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass

import msgspec
import pytest
from aiohttp import web

from nanoservice import config
from nanoservice.answer import Answer
from nanoservice.body import json_body
from nanoservice.direct import MAX_BODY
from nanoservice.service import Service
from nanoservice.testing.served import Served, serving
from nanoservice.testing.valkey import Valkey
from tests.support import ROOT
from tests.support.process import environment
from tests.support.wire import ask, chunked, is_problem, request

JSON = "Content-Type: application/json"


class Strict(msgspec.Struct, forbid_unknown_fields=True):
    name: str


def setup(app: web.Application, config: config.Config) -> None:
    read_text, read_strict = json_body(str), json_body(Strict)

    async def text(request: web.Request) -> Answer:
        return Answer(b"%d" % len(await read_text(request)))

    async def strict(request: web.Request) -> Answer:
        return Answer((await read_strict(request)).name.encode())

    app.router.add_post("/text", text)
    app.router.add_post("/strict", strict)


@pytest.fixture
async def served(valkey: Valkey) -> AsyncIterator[Served]:
    async with serving(Service("reader", "1", config.Config, setup), valkey.environ()) as it:
        yield it


@pytest.mark.parametrize(("size", "status"), [(MAX_BODY, 200), (MAX_BODY + 1, 413)])
async def test_body_has_at_most_1_mib_however_it_is_sent(served: Served, size: int, status: int) -> None:
    body = b'"' + b"x" * (size - 2) + b'"'
    for data in (
        request("POST", "/text", JSON, body=body),
        request("POST", "/text", JSON, "Transfer-Encoding: chunked") + b"".join(chunked(body)),
    ):
        reply = await ask(served.port, data)
        assert reply.status == status
        assert reply.body == b"%d" % (size - 2) if status == 200 else is_problem(reply, status)


async def test_unknown_fields_can_be_refused(served: Served) -> None:
    reply = await ask(served.port, request("POST", "/strict", JSON, body=b'{"name": "ada", "nme": 1}'))
    assert is_problem(reply, 422)
    assert reply.json["detail"] == "the body is not valid: Object contains unknown field `nme`"


async def test_body_without_a_content_type_is_415(served: Served) -> None:
    assert is_problem(await ask(served.port, request("POST", "/strict", body=b'{"name": "ada"}')), 415)


@pytest.mark.parametrize(("charset", "status"), [('"UTF-8"', 200), ("utf8", 200), ("utf-16", 415), ("latin1", 415)])
async def test_charset_other_than_utf_8_is_415(served: Served, charset: str, status: int) -> None:
    header = f"Content-Type: application/json; charset={charset}"
    reply = await ask(served.port, request("POST", "/strict", header, body=b'{"name": "ada"}'))
    assert reply.status == status
    assert status == 200 or is_problem(reply, status)


async def test_byte_order_mark_is_ignored(served: Served) -> None:
    assert (await ask(served.port, request("POST", "/strict", JSON, body=b'\xef\xbb\xbf{"name": "ada"}'))).body == b"ada"


def test_type_that_cannot_be_read_is_an_error_at_once() -> None:
    @dataclass
    class Wrong:
        either: list[int] | tuple[str, ...]

    with pytest.raises(TypeError, match="more than one array-like"):
        json_body(Wrong)


def test_service_that_reads_no_json_does_not_load_the_library() -> None:
    code = "import sys, tests.nanoservice.second_service, nanoservice.server; sys.exit('msgspec' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=environment({}), cwd=ROOT, timeout=60).returncode == 0
