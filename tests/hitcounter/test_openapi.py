"""The counter's OpenAPI document is valid and complete, and matches the counter's answers."""

import subprocess
import sys
import urllib.request
from pathlib import Path

from hitcounter.app import SERVICE
from nanoservice.testing.served import Served, serving
from nanoservice.testing.valkey import Valkey
from nanoservice.testing.waiting import SLACK
from tests.support import openapi
from tests.support.process import Process, Spawn

SECONDS = 40 * SLACK  # the time limit for one run of schemathesis


async def test_document_is_valid_openapi_3_1(served: Served) -> None:
    openapi.check_validity(await openapi.document(served))


async def test_every_route_is_documented_and_no_other(served: Served) -> None:
    assert openapi.operations(await openapi.document(served)).keys() == openapi.routes(served)


async def test_every_reference_leads_somewhere_and_every_component_is_used(served: Served) -> None:
    openapi.check_references(await openapi.document(served))


async def test_every_operation_has_a_name_of_its_own_and_a_summary(served: Served) -> None:
    openapi.check_names(await openapi.document(served))


async def test_counts_are_64_bit_numbers(served: Served) -> None:
    counts = (await openapi.document(served))["components"]["schemas"]["Counts"]
    # Without this format, generated clients in Java, Go, C# and Rust have numbers of 32 bits.
    assert counts["properties"] == {name: {"type": "integer", "format": "int64", "minimum": 0} for name in ("hits", "posts")}


async def test_every_503_is_documented_with_retry_after(valkey: Valkey) -> None:
    async with serving(SERVICE, valkey.environ(REQUEST_TIMEOUT="0.3")) as served:
        found = await openapi.document(served)
        valkey.kill()
        await openapi.check_503(served, found)


async def test_417_is_documented_wherever_it_is_answered(served: Served) -> None:
    await openapi.check_417(served, await openapi.document(served))


def check(process: Process, folder: Path, *options: str) -> None:
    """Run all checks of schemathesis against the service."""
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


def test_schemathesis_finds_nothing(spawn: Spawn, valkey: Valkey, tmp_path: Path) -> None:
    process = spawn(valkey.environ(REDIS_TIMEOUT="30", REQUEST_TIMEOUT="10"))
    check(process, tmp_path)
    check(process, tmp_path, "--header", "Accept: application/json", "--include-path", "/")
    with urllib.request.urlopen(f"http://127.0.0.1:{process.admin_port}/metrics") as answer:
        page = answer.read().decode()
    # The labels show that schemathesis has sent valid requests, invalid requests, and undocumented methods.
    for labels in ('"GET",route="/",status="200"', '"POST",route="/",status="400"', '"PATCH",route="unmatched",status="405"'):
        assert f"http_request_duration_seconds_count{{method={labels}}}" in page
    told = {line["message"].partition(";")[0] for line in process.log if line["level"] not in ("debug", "info")}
    assert told <= {"slow request"}  # a busy machine may have slow requests
