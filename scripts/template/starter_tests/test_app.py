"""Test the service starter on a real server, with a real Valkey."""

import re
from collections.abc import AsyncIterator

import pytest

from nanoservice.config import table
from nanoservice.testing.served import Served, serving
from nanoservice.testing.valkey import Valkey
from starter.app import COUNT, NAME, SERVICE
from tests.support import ROOT, openapi


@pytest.fixture
async def served(valkey: Valkey) -> AsyncIterator[Served]:
    """Serve the service in the test's process, with the test's own Valkey."""
    async with serving(SERVICE, valkey.environ()) as it:
        yield it


async def count(served: Served, method: str) -> int:
    async with served.client.request(method, "/") as answer:
        assert (answer.status, answer.headers["Cache-Control"]) == (200, "no-store")
        return int((await answer.json())["count"])


async def test_get_returns_what_posts_have_counted(served: Served, valkey: Valkey) -> None:
    assert [await count(served, method) for method in ("GET", "POST", "POST", "GET")] == [0, 1, 2, 2]
    assert valkey.run("GET", COUNT) == "2"


async def test_setting_is_the_number_that_a_post_adds(valkey: Valkey) -> None:
    async with serving(SERVICE, valkey.environ(STARTER_COUNT_STEP="5")) as served:
        assert await count(served, "POST") == 5
    assert "`STARTER_COUNT_STEP`" in table(SERVICE.config)


async def test_openapi_document_is_valid_and_complete(served: Served, valkey: Valkey) -> None:
    document = await openapi.document(served)
    openapi.check_validity(document)
    openapi.check_references(document)
    openapi.check_names(document)
    await openapi.check_417(served, document)
    assert openapi.operations(document).keys() == openapi.routes(served)
    valkey.kill()
    await openapi.check_503(served, document)


async def test_user_in_redis_has_the_rights_that_the_service_needs_and_no_others(valkey: Valkey) -> None:
    users = (ROOT / "manifests" / "redis" / "users.acl").read_text()
    (rights,) = re.findall(rf"^user {NAME} (.+)$", users, re.MULTILINE)
    assert rights.split()[:3] == ["resetchannels", f"~{{{NAME}}}:*", "-@all"]

    async def statuses(*rights: str) -> set[int]:
        valkey.run("ACL", "SETUSER", NAME, "reset", "on", ">secret", *rights)
        async with serving(SERVICE, valkey.environ(REDIS_USERNAME=NAME, REDIS_PASSWORD="secret")) as served:
            found = set()
            for method, path in (("GET", "/readyz"), ("GET", "/"), ("POST", "/")):
                async with served.client.request(method, path) as answer:
                    found.add(answer.status)
            return found

    assert await statuses(*rights.split()) == {200}
    for right in rights.split()[3:]:
        assert 503 in await statuses(*(other for other in rights.split() if other != right)), f"{right} is not needed"
