"""The log has one JSON object a line, or readable text on a terminal, and never a secret."""

import io
import json
import logging
import sys
import warnings
from collections.abc import Iterator

import aiohttp
import pytest

from nanoservice import logs
from nanoservice.testing.valkey import Valkey
from tests.support.process import Spawn


class Terminal(io.StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Restore the configuration of `logging` after each test."""
    root = logging.getLogger()
    handlers, level, others = root.handlers[:], root.level, logging.getLogger("asyncio").level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.getLogger("asyncio").setLevel(others)
    logging.captureWarnings(False)


def test_line_is_json_with_time_level_logger_message_and_extras() -> None:
    stream = io.StringIO()
    logs.configure("info", "", stream)
    logging.getLogger("x").info("two\nlines %d", 7, extra={"port": 80})
    line = json.loads(stream.getvalue())
    assert stream.getvalue().count("\n") == 1
    assert line.pop("time").endswith("+00:00")
    assert line == {"level": "info", "logger": "x", "message": "two\nlines 7", "port": 80}


def test_exception_is_in_its_line() -> None:
    stream = io.StringIO()
    logs.configure("info", "json", stream)
    try:
        raise ValueError("why")
    except ValueError:
        logging.getLogger("x").exception("failed")
    assert stream.getvalue().count("\n") == 1
    assert "ValueError: why" in json.loads(stream.getvalue())["exception"]


def test_terminal_gets_text() -> None:
    stream = Terminal()
    logs.configure("info", "", stream)
    logging.getLogger("x").info("listening", extra={"port": 80})
    assert stream.getvalue().rstrip().endswith("INFO    listening port=80")


def test_json_can_be_chosen_on_a_terminal() -> None:
    stream = Terminal()
    logs.configure("info", "json", stream)
    logging.getLogger("x").info("listening")
    assert json.loads(stream.getvalue())["message"] == "listening"


@pytest.mark.parametrize(("level", "lines"), [("debug", 3), ("info", 2), ("warning", 1), ("error", 0)])
def test_records_below_the_level_are_not_written(level: str, lines: int) -> None:
    stream = io.StringIO()
    logs.configure(level, "json", stream)
    logging.getLogger("x").debug("1")
    logging.getLogger("x").info("2")
    logging.getLogger("x").warning("3")
    assert stream.getvalue().count("\n") == lines


def test_python_warning_is_logged_as_a_line() -> None:
    stream = io.StringIO()
    logs.configure("info", "json", stream)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(True)
        warnings.warn("old", DeprecationWarning, stacklevel=1)
        logging.captureWarnings(False)
    assert "DeprecationWarning: old" in json.loads(stream.getvalue())["message"]


@pytest.mark.parametrize(("level", "lines"), [("debug", 2), ("info", 0)])
async def test_request_is_logged_at_debug_only(valkey: Valkey, spawn: Spawn, level: str, lines: int) -> None:
    process = spawn(valkey.environ(BIND_HOST="127.0.0.1", LOG_LEVEL=level))
    for path in ("/?s3cret", "/s3cret"):
        async with aiohttp.request("GET", f"{process.url.rstrip('/')}{path}") as answer:
            await answer.read()
    assert process.end() == 0
    logged = [line for line in process.log if line["message"] == "request"]
    assert [(line["method"], line["route"], line["status"]) for line in logged] == [("GET", "/", 200), ("GET", "unmatched", 404)][
        :lines
    ]
    assert "s3cret" not in str(process.log)


def test_standard_output_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "json")
    logging.getLogger("x").info("here")
    sys.stdout.flush()
    assert json.loads(capsys.readouterr().out)["message"] == "here"
