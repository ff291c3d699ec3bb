"""The log has one JSON object a line, or readable text on a terminal, and never a secret."""

import asyncio
import errno
import io
import json
import logging
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, TextIO

import aiohttp
import pytest

from nanoservice import logs
from nanoservice.testing.valkey import Valkey
from nanoservice.testing.waiting import SLACK
from tests.support import ROOT
from tests.support.process import Spawn, environment
from tests.support.wire import ask, connected, request


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


@pytest.fixture
def pipe() -> Iterator[tuple[IO[bytes], TextIO]]:
    """Yield the two ends of a pipe: for the reader of the log, and for the service."""
    ends = os.pipe()
    with open(ends[0], "rb") as reader, open(ends[1], "w") as writer:
        yield reader, writer
        logging.getLogger().handlers[0].flush()


def fill(size: int = 1000) -> int:
    """Log numbered lines until 100 of them are dropped, and return the number of lines."""
    for number in range(1 << 20):
        if logs.dropped() >= 100:
            return number
        logging.getLogger("x").info("x" * size, extra={"number": number})
    raise AssertionError("no line was dropped")


def read(reader: IO[bytes], until: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """Return the lines up to the first one that fulfils `until`."""
    lines = [json.loads(reader.readline())]
    while not until(lines[-1]):
        lines.append(json.loads(reader.readline()))
    return lines


def test_lines_that_nobody_reads_are_dropped_and_counted_and_the_log_says_how_many(pipe: tuple[IO[bytes], TextIO]) -> None:
    reader, writer = pipe
    logs.configure("info", "json", writer)
    total = fill()
    lines = read(reader, lambda line: "lines" in line)
    assert [line["number"] for line in lines[:-1]] == list(range(total - 100))
    assert (lines[-1]["level"], lines[-1]["lines"]) == ("warning", 100)
    logging.getLogger("x").info("works again")
    assert json.loads(reader.readline())["message"] == "works again"
    assert logs.dropped() == 100


def test_lines_that_were_written_before_the_disk_was_full_are_not_counted_as_dropped(
    pipe: tuple[IO[bytes], TextIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = pipe
    begun, waiting, written = threading.Event(), threading.Event(), list[bytes]()

    def write(descriptor: int, data: bytes) -> int:
        if len(written) == 0:
            begun.set()
            assert waiting.wait(5 * SLACK)
        elif len(written) == 1:  # two lines and a part of the third one
            data = data[: data.index(b"\n", data.index(b"\n") + 1) + 10]
        elif len(written) < 4:
            written.append(b"")
            raise OSError(errno.ENOSPC, "no space")
        written.append(data)
        return os.write(descriptor, data)

    monkeypatch.setattr(logs, "os", SimpleNamespace(write=write))
    logs.configure("info", "json", writer)
    log, (handler,) = logging.getLogger("x"), logging.getLogger().handlers
    log.info("first")
    assert begun.wait(5 * SLACK)
    for number in range(5):
        log.info("in one write", extra={"number": number})
    waiting.set()
    handler.flush()
    assert logs.dropped() == 3
    log.info("not written at all")
    handler.flush()
    assert logs.dropped() == 4
    log.info("again")
    first, zero, one, torn, again, report = (reader.readline() for _ in range(6))
    assert [json.loads(line).get("number") for line in (first, zero, one)] == [None, 0, 1]
    assert len(torn) == 10
    assert json.loads(again)["message"] == "again"
    assert json.loads(report)["lines"] == 4


def test_memory_of_a_log_that_nobody_reads_is_bounded(pipe: tuple[IO[bytes], TextIO]) -> None:
    reader, writer = pipe
    logs.configure("info", "json", writer)
    assert fill(100_000) * 100_000 < (2 << 20) + 200 * 100_000  # two times the limit, the lines that are dropped, and the pipe
    read(reader, lambda line: "lines" in line)


def test_exit_waits_for_a_slow_reader_but_not_for_ever(tmp_path: Path) -> None:
    code = "import logging; from nanoservice import logs; logs.configure('info', 'json')\n"
    code += "for number in range(3000): logging.info('x' * 100, extra={'number': number})"
    began = time.monotonic()
    with subprocess.Popen([sys.executable, "-c", code], env=environment({}), cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout
        slow = b""
        while chunk := os.read(process.stdout.fileno(), 1 << 14):
            slow += chunk
            time.sleep(0.01)
    assert [json.loads(line)["number"] for line in slow.splitlines()] == list(range(3000))
    with subprocess.Popen([sys.executable, "-c", code], env=environment({}), cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.wait(10 * SLACK) == 0  # nobody reads
    assert time.monotonic() - began < 5 * SLACK


@pytest.mark.parametrize("reader", ["silent", "gone"])
async def test_service_goes_on_and_stops_when_nobody_reads_its_log(valkey: Valkey, tmp_path: Path, reader: str) -> None:
    environ = environment(valkey.environ(BIND_HOST="127.0.0.1", LOG_LEVEL="debug", LOG_FORMAT="json"))
    with subprocess.Popen(
        [sys.executable, "-m", "tests.nanoservice.sample"], env=environ, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout
        assert process.stderr
        try:
            ports = read(process.stdout, lambda line: "port" in line)[-1]
            if reader == "gone":
                process.stdout.close()
            dropped = 0.0
            async with asyncio.timeout(60):
                while dropped < 100:
                    async with connected(ports["port"]) as client:
                        await client.send(request("GET", "/x") * 200)
                        for _ in range(200):
                            assert (await client.reply()).status == 404
                    page = (await ask(ports["admin_port"], request("GET", "/metrics"))).body.decode()
                    dropped = float(
                        next(line for line in page.splitlines() if line.startswith("log_lines_dropped_total ")).split()[1]
                    )
            process.terminate()
            assert await asyncio.to_thread(process.wait, 10 * SLACK) == 0
        finally:
            process.kill()
        assert process.stderr.read() == b""
