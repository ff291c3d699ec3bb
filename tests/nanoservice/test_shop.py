"""The sample service of at most 120 lines, the shop, does everything that its text claims."""

import asyncio
import io
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from nanoservice import background
from nanoservice.testing.served import Served, serving
from nanoservice.testing.valkey import Valkey
from nanoservice.testing.waiting import SLACK, eventually
from tests.nanoservice import shop
from tests.support import ROOT
from tests.support.process import metric

ORDER = {"customer": "ada", "items": [{"name": "tea", "number": 2}, {"name": "cup", "number": 1}]}
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
TRACE_ID = PARENT[3:35]


@pytest.fixture
def key(tmp_path: Path) -> Path:
    """Return the file with the shop's key."""
    file = tmp_path / "key"
    file.write_text("open sesame\n")
    return file


@pytest.fixture
async def served(valkey: Valkey, key: Path) -> AsyncIterator[Served]:
    """Serve the shop."""
    environ = valkey.environ(SHOP_API_KEY_FILE=str(key), SHOP_REFILL_MILLISECONDS="60000", USER="root", API_URL="x")
    async with serving(shop.SERVICE, environ) as it:
        yield it


def lines(log: io.StringIO, message: str) -> list[dict[str, Any]]:
    """Return the lines of the log with this message."""
    return [line for line in map(json.loads, log.getvalue().splitlines()) if line["message"] == message]


async def post(served: Served, content: Any, key: str = "open sesame", **headers: str) -> tuple[int, dict[str, Any]]:
    """Send an order, and return the status and the content of the answer."""
    data = io.BytesIO(content if isinstance(content, bytes) else json.dumps(content).encode())
    sent = {"Authorization": f"Bearer {key}", "Content-Type": "application/json", **headers}
    async with served.client.post("/orders", data=data, headers=sent) as answer:
        return answer.status, await answer.json()


async def get(served: Served, path: str, **headers: str) -> tuple[int, dict[str, Any]]:
    async with served.client.get(path, headers=headers) as answer:
        return answer.status, await answer.json(content_type=None) if "json" in answer.content_type else {}


def test_shop_has_at_most_120_lines() -> None:
    assert len((ROOT / "tests" / "nanoservice" / "shop.py").read_text().splitlines()) <= 120


async def test_json_comes_in_and_goes_out_through_one_pipeline_and_is_measured(served: Served, valkey: Valkey) -> None:
    await eventually(lambda: _stock(valkey, 10), SLACK)
    status, answer = await post(served, ORDER)
    assert (status, answer["position"], answer["left"]) == (201, 1, 7)
    assert answer["order"] == {**ORDER, "speed": "normal", "tags": {}}
    assert await metric(served, "shop_items_sold_total") == 3
    assert json.loads(valkey.run("LINDEX", "{shop}:orders", "0"))["customer"] == "ada"


async def _stock(valkey: Valkey, number: int) -> bool:
    return bool(valkey.run("GET", "{shop}:stock") == str(number))


@pytest.mark.parametrize(
    ("content", "status", "detail"),
    [
        (b"{", 400, "the body is not JSON: Input data was truncated"),
        (b"", 400, "the body is not JSON: Input data was truncated"),
        (b'{"customer": "\xff"}', 400, "the body is not JSON"),
        (b'{"customer": "\\ud800"}', 400, "the body is not JSON"),
        (b'{"tags": ' + b"[" * 100000, 422, "at `$.tags`"),
        (b'{"x": ' + b"[" * 100000, 400, "the body is not JSON"),
        ({"customer": "ada"}, 422, "missing required field `items`"),
        ({**ORDER, "customer": 7}, 422, "at `$.customer`"),
        ({**ORDER, "items": [{"name": "tea", "number": True}]}, 422, "at `$.items[0].number`"),
        ({**ORDER, "items": [{"name": "tea", "number": 101}]}, 422, "number must be from 1 to 100 - at `$.items[0]`"),
        ({**ORDER, "speed": "x" * 1000}, 422, "Invalid enum value"),
        ({**ORDER, "tags": {"a": None}}, 422, "at `$.tags[...]`"),
        ([], 422, "Expected `object`"),
        (b" " * (1 << 20) + b"1", 413, "a body has at most 1048576 bytes"),
    ],
)
async def test_body_that_is_not_an_order_is_refused_with_the_name_of_the_field(
    served: Served, content: Any, status: int, detail: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    found, answer = await post(served, content)
    assert (found, answer["status"]) == (status, status)
    assert detail in answer["detail"]
    assert len(answer["detail"]) <= 300
    assert not caplog.messages


@pytest.mark.parametrize("name", ["Content-Type", "Content-Encoding"])
async def test_body_of_another_media_type_or_with_compression_is_415(served: Served, name: str) -> None:
    for value in ("text/plain", "application/x-www-form-urlencoded") if name == "Content-Type" else ("gzip",):
        status, answer = await post(served, ORDER, **{name: value})
        assert status == 415
        assert answer["detail"]
    assert (await post(served, ORDER, **{"Content-Type": "application/merge-patch+json; charset=utf-8"}))[0] == 201


async def test_secret_is_read_again_from_its_file(served: Served, key: Path, log: io.StringIO) -> None:
    assert (await post(served, ORDER, key="wrong"))[0] == 401
    key.write_text("new")
    assert (await post(served, ORDER))[0] == 401
    assert (await post(served, ORDER, key="new"))[0] == 201
    key.unlink()
    assert (await post(served, ORDER, key="new"))[0] == 500
    [line] = lines(log, "a handler failed")
    assert f"{key} cannot be read" in line["exception"]
    assert "open sesame" not in log.getvalue()


async def test_orders_are_streamed_as_they_come_for_longer_than_a_handler_may_take(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanoservice.connection.HANDLE_SECONDS", 0.5)
    async with served.client.get("/orders") as answer:
        for customer in ("ada", "bob"):
            await asyncio.sleep(2)
            assert (await post(served, {**ORDER, "customer": customer}))[0] == 201
            assert json.loads(await answer.content.readline())["customer"] == customer
        await post(served, {**ORDER, "customer": "closing"})
        assert b"closing" in await answer.content.read()


async def test_slow_handler_is_cancelled_and_504_names_the_cause(served: Served, log: io.StringIO) -> None:
    status, answer = await get(served, "/slow", traceparent=PARENT)
    assert (status, answer["detail"]) == (504, "the handler did not begin its answer within 0.5 s")
    [line] = lines(log, "a handler failed")
    assert (line["method"], line["route"], line["trace_id"]) == ("GET", "/slow", answer["trace_id"])
    assert "await asyncio.sleep(60)" in line["exception"]
    assert line["exception"].endswith("TimeoutError: the handler did not begin its answer within 0.5 s")


async def test_handler_whose_client_has_gone_is_cancelled_too(served: Served, log: io.StringIO) -> None:
    with pytest.raises(TimeoutError):
        await served.client.get("/slow", timeout=aiohttp.ClientTimeout(total=0.1))
    await eventually(lambda: _logged(log, "a handler failed"), 3 * SLACK)


async def _logged(log: io.StringIO, message: str) -> bool:
    return bool(lines(log, message))


async def test_failing_handler_is_500_and_its_line_has_the_trace_of_the_request(served: Served, log: io.StringIO) -> None:
    status, answer = await get(served, "/fail", traceparent=PARENT)
    assert (status, answer["trace_id"]) == (500, TRACE_ID)
    assert "detail" not in answer
    [line] = lines(log, "a handler failed")
    assert (line["method"], line["route"], line["trace_id"]) == ("GET", "/fail", TRACE_ID)
    assert "LookupError: a detail for the log alone" in line["exception"]


async def test_line_of_a_handler_has_the_trace_of_its_request(served: Served, log: io.StringIO) -> None:
    await post(served, ORDER, traceparent=PARENT)
    await post(served, ORDER)
    first, second = lines(log, "order taken")
    assert (first["method"], first["route"], first["trace_id"], first["position"]) == ("POST", "/orders", TRACE_ID, 1)
    assert second["trace_id"] != TRACE_ID
    assert len(second["trace_id"]) == 32


async def test_background_task_that_fails_is_reported_at_once_and_started_again(
    served: Served, valkey: Valkey, log: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (await get(served, "/readyz"))[0] == 200
    assert not lines(log, "a background task failed")
    async with serving(shop.SERVICE, valkey.environ(SHOP_REFILL_MILLISECONDS="1", REDIS_TIMEOUT="0.5")) as quick:
        assert (await get(quick, "/readyz"))[0] == 200
        valkey.run("ACL", "SETUSER", "default", "-set")
        await eventually(lambda: _logged(log, "a background task failed"), SLACK)
        status, answer = await get(quick, "/readyz")
        assert (status, answer["detail"]) == (503, "a background task has failed: refill")
        assert await metric(quick, "background_task_failures_total") == 1
        [line] = lines(log, "a background task failed")
        assert (line["task"], line["seconds_until_retry"]) == ("refill", background._FIRST_DELAY)
        assert "NOPERM" in line["exception"]
        valkey.run("ACL", "SETUSER", "default", "+set")
        await eventually(lambda: _is_ready(quick), 4 * SLACK)


async def _is_ready(served: Served) -> bool:
    return (await get(served, "/readyz"))[0] == 200
