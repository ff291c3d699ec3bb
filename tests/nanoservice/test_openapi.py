"""The OpenAPI document of the chassis's routes is valid and complete, and matches the service's answers."""

from collections.abc import AsyncIterator

import jsonschema_rs
import pytest
import schemathesis

from nanoservice.config import Config
from nanoservice.service import Service
from nanoservice.testing.served import Served, serving
from nanoservice.testing.valkey import Valkey
from tests.support import openapi


@pytest.fixture
async def served(valkey: Valkey) -> AsyncIterator[Served]:
    """Serve a service that has only the routes of the chassis."""
    async with serving(Service("bare", "1.0", Config, lambda app, config: None), valkey.environ()) as it:
        yield it


async def test_document_is_valid_openapi_3_1(served: Served) -> None:
    openapi.check_validity(await openapi.document(served))


def test_invalid_document_is_found() -> None:
    with pytest.raises(jsonschema_rs.ValidationError):
        schemathesis.openapi.from_dict({"openapi": "3.1.0", "info": {"title": "x"}, "paths": {}}).validate()


async def test_every_route_is_documented_and_no_other(served: Served) -> None:
    assert openapi.operations(await openapi.document(served)).keys() == openapi.routes(served)


async def test_every_reference_leads_somewhere_and_every_component_is_used(served: Served) -> None:
    openapi.check_references(await openapi.document(served))


async def test_every_operation_has_a_name_of_its_own_and_a_summary(served: Served) -> None:
    openapi.check_names(await openapi.document(served))


async def test_every_503_is_documented_with_retry_after(served: Served, valkey: Valkey) -> None:
    valkey.kill()
    await openapi.check_503(served, await openapi.document(served))


async def test_417_is_documented_wherever_it_is_answered(served: Served) -> None:
    await openapi.check_417(served, await openapi.document(served))
