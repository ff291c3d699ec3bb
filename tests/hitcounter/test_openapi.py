"""The OpenAPI document: valid, the same as the routes, and true of what is answered."""

import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import schemathesis

from nanoservice.testing.served import Served
from nanoservice.testing.valkey import Valkey
from nanoservice.testing.waiting import SLACK
from tests.support.process import Process

SECONDS = 40 * SLACK  # for one run of schemathesis


async def document(served: Served) -> dict[str, Any]:
    async with served.client.get("/openapi.json") as answer:
        assert (answer.status, answer.content_type) == (200, "application/json")
        found: dict[str, Any] = await answer.json()
        return found


async def test_document_is_valid_openapi_3_1(served: Served) -> None:
    found = await document(served)
    assert found["openapi"].startswith("3.1.")
    schema = schemathesis.openapi.from_dict(found)
    schema.validate()
    assert schema.statistic.operations.total == len(documented(found))  # it understands them all


async def test_invalid_document_is_told() -> None:
    with pytest.raises(jsonschema_rs.ValidationError):
        schemathesis.openapi.from_dict({"openapi": "3.1.0", "info": {"title": "x"}, "paths": {}}).validate()


def documented(found: dict[str, Any]) -> set[tuple[str, str]]:
    return {(path, method) for path, methods in found["paths"].items() for method in methods}


async def test_every_route_is_documented_and_no_other(served: Served) -> None:
    routed = {(route.resource.canonical, route.method.lower()) for route in served.running.app.router.routes() if route.resource}
    assert documented(await document(served)) == routed
    assert len(routed) == 16


async def test_every_reference_leads_somewhere_and_every_component_is_used(served: Served) -> None:
    found = await document(served)
    used = set()

    def walk(node: Any) -> None:
        for value in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
            walk(value)
        if isinstance(node, dict) and "$ref" in node:
            used.add(node["$ref"])

    walk(found)
    assert used == {f"#/components/{kind}/{name}" for kind, parts in found["components"].items() for name in parts}


async def test_every_operation_has_a_name_of_its_own_and_a_summary(served: Served) -> None:
    found = await document(served)
    operations = [found["paths"][path][method] for path, method in documented(found)]
    assert len({operation["operationId"] for operation in operations}) == len(operations)
    assert all(operation["summary"] for operation in operations)


async def test_counts_are_64_bit_numbers(served: Served) -> None:
    counts = (await document(served))["components"]["schemas"]["Counts"]
    # Without the format, generated Java, Go, C# and Rust clients hold 32 bits.
    assert counts["properties"] == {name: {"type": "integer", "format": "int64", "minimum": 0} for name in ("hits", "posts")}


async def test_every_503_is_documented_with_when_to_try_again(served: Served) -> None:
    found = await document(served)
    unavailable = [
        found["components"]["responses"][answers["503"]["$ref"].rsplit("/", 1)[1]]
        for answers in (found["paths"][path][method]["responses"] for path, method in documented(found))
        if "503" in answers
    ]
    assert len(unavailable) == 4
    assert all(answer["headers"]["Retry-After"] == {"$ref": "#/components/headers/RetryAfter"} for answer in unavailable)
    assert found["components"]["headers"]["RetryAfter"]["required"]


async def test_417_is_documented_wherever_it_is_answered(served: Served) -> None:
    found = await document(served)
    for path, method in documented(found):
        async with served.client.request(method, path, headers={"Expect": "x"}) as answer:
            assert (answer.status, answer.content_type) == (417, "application/problem+json"), (path, method)
        documents = found["paths"][path][method]["responses"].get("417", {})
        assert documents.get("$ref", "").endswith("/HeadProblem" if method == "head" else "/Problem"), (path, method)


def check(process: Process, folder: Path, *options: str) -> None:
    """Have schemathesis try the service with all its checks."""
    done = subprocess.run(
        [
            sys.executable, "-m", "schemathesis.cli", "run", process.url + "openapi.json", "--checks", "all", "--mode", "all",
            "--max-examples", "50", "--seed", "1", "--generation-database", "none", "--continue-on-failure", "--no-color",
            *options,
        ],
        cwd=folder, capture_output=True, text=True, timeout=SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "No issues found" in done.stdout


def test_schemathesis_finds_nothing(spawn: Callable[..., Process], valkey: Valkey, tmp_path: Path) -> None:
    process = spawn(valkey.environ(REDIS_TIMEOUT="30", REQUEST_TIMEOUT="30"))
    check(process, tmp_path)
    check(process, tmp_path, "--header", "Accept: application/json", "--include-path", "/")
    with urllib.request.urlopen(f"http://127.0.0.1:{process.admin_port}/metrics") as answer:
        page = answer.read().decode()
    # It has tried what is right, what is wrong, and methods that are not documented.
    for labels in ('"GET",route="/",status="200"', '"POST",route="/",status="400"', '"PATCH",route="unmatched",status="405"'):
        assert f"http_request_duration_seconds_count{{method={labels}}}" in page
    told = {line["message"].partition(";")[0] for line in process.log if line["level"] not in ("debug", "info")}
    assert told <= {"slow request"}  # a busy machine may make one
