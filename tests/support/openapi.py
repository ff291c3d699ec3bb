"""Check the OpenAPI document that a service serves; the checks are the same for every service."""

from typing import Any

import schemathesis

from nanoservice.testing.served import Served


async def document(served: Served) -> dict[str, Any]:
    """Return the OpenAPI document that the service serves."""
    async with served.client.get("/openapi.json") as answer:
        assert (answer.status, answer.content_type) == (200, "application/json")
        found: dict[str, Any] = await answer.json()
        return found


def operations(found: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """Return a dict from path and method to the documented operation."""
    return {(path, method): operation for path, methods in found["paths"].items() for method, operation in methods.items()}


def routes(served: Served) -> set[tuple[str, str]]:
    """Return the path and the method of each route of the service."""
    return {(route.resource.canonical, route.method.lower()) for route in served.running.app.router.routes() if route.resource}


def check_validity(found: dict[str, Any]) -> None:
    """Fail unless the document is valid OpenAPI 3.1, and schemathesis finds all its operations."""
    assert found["openapi"].startswith("3.1.")
    assert found["servers"] == [{"url": "/"}]
    assert found["security"] == []  # clients need no credentials
    schema = schemathesis.openapi.from_dict(found)
    schema.validate()
    assert schema.statistic.operations.total == len(operations(found))


def check_references(found: dict[str, Any]) -> None:
    """Fail unless every reference leads to a component, and every component is used."""
    used = set()

    def walk(node: Any) -> None:
        for value in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
            walk(value)
        if isinstance(node, dict) and "$ref" in node:
            used.add(node["$ref"])

    walk(found)
    assert used == {f"#/components/{kind}/{name}" for kind, parts in found["components"].items() for name in parts}


def check_names(found: dict[str, Any]) -> None:
    """Fail unless every operation has a unique `operationId`, and a summary."""
    documented = operations(found)
    assert len({operation["operationId"] for operation in documented.values()}) == len(documented)
    assert all(operation["summary"] for operation in documented.values())


async def check_417(served: Served, found: dict[str, Any]) -> None:
    """Fail unless each operation answers an unknown `Expect` with 417, and documents this answer."""
    for (path, method), operation in operations(found).items():
        async with served.client.request(method, path, headers={"Expect": "x"}) as answer:
            assert (answer.status, answer.content_type) == (417, "application/problem+json"), (path, method)
        documented = operation["responses"].get("417", {})
        assert documented.get("$ref", "").endswith("/HeadProblem" if method == "head" else "/Problem"), (path, method)


async def check_503(served: Served, found: dict[str, Any]) -> None:
    """Fail unless the operations that answer 503 are those that document 503, with `Retry-After`. Redis must be down."""
    unavailable = set()
    for path, method in operations(found):
        async with served.client.request(method, path) as answer:
            if answer.status == 503:
                unavailable.add((path, method))
                assert "Retry-After" in answer.headers
    assert unavailable
    documented = {key: one["responses"]["503"] for key, one in operations(found).items() if "503" in one["responses"]}
    assert documented.keys() == unavailable
    for reference in documented.values():
        answer_of = found["components"]["responses"][reference["$ref"].rsplit("/", 1)[1]]
        assert answer_of["headers"]["Retry-After"] == {"$ref": "#/components/headers/RetryAfter"}
    assert found["components"]["headers"]["RetryAfter"]["required"]
