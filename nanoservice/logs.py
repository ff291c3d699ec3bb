"""Logs: one JSON object per line on standard output, or readable text on a terminal."""

import io
import json
import logging
import os
import sys
import threading
from datetime import UTC, datetime
from typing import TextIO

from nanoservice.trace import CURRENT

FLUSH_SECONDS = 1.0  # At exit, the last lines must be written within this time.
_MAX_WAITING = 1 << 20  # bytes of lines that wait until they are written
_DROPPED = "log lines were dropped: the log was not read"

# Every record has these attributes. All other attributes were passed as `extra=`, and the line shows them.
_RECORD_ATTRIBUTES = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def _extras(record: logging.LogRecord) -> dict[str, object]:
    """Return the fields of the request that the current task answers, and those that were passed as `extra=`."""
    trace = CURRENT.get()
    extras = {key: value for key, value in vars(record).items() if key not in _RECORD_ATTRIBUTES}
    return {**trace.fields(), **extras} if trace is not None else extras


class JsonFormatter(logging.Formatter):
    """Format a record as one line of JSON: time (UTC), level, logger, message, the request, the fields of `extra=`, exception."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line without a line break."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_extras(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class TextFormatter(logging.Formatter):
    """Format a record for a person: time, level, message, the request and the fields of `extra=` as key=value."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the standard library's name
        """Return the first line of the record."""
        return " ".join([super().formatMessage(record), *(f"{k}={v!r}" for k, v in _extras(record).items())])


class BackgroundHandler(logging.Handler):
    """Write records to the file descriptor of `stream` in a thread. Drop and count the records that it cannot write in time.

    If the event loop wrote them itself, a pipe that nobody reads would stop the service. A pipe that is only slow loses nothing
    until `_MAX_WAITING` bytes wait. The descriptor stays in blocking mode, because other processes may share it.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self.dropped = 0  # number of records
        self._reported = 0  # the number of these that the log has reported
        self._descriptor = stream.fileno()
        self._lines: list[bytes] = []
        self._waiting = 0  # bytes that are not written yet
        self._changed = threading.Condition()
        self._thread = threading.Thread()

    def emit(self, record: logging.LogRecord) -> None:
        """Pass the record to the thread. This does not wait for the stream."""
        try:
            line = self._line(record)
            with self._changed:
                if self._waiting >= _MAX_WAITING:
                    self.dropped += 1
                    return
                self._lines.append(line)
                self._waiting += len(line)
                if not self._thread.is_alive():  # A forked process has no such thread either.
                    self._thread = threading.Thread(target=self._write, name="log", daemon=True)
                    self._thread.start()
                self._changed.notify_all()
        except Exception:  # as in the handlers of the standard library
            self.handleError(record)

    def flush(self) -> None:
        """Wait until all records are written, for `FLUSH_SECONDS` at most. `logging.shutdown` calls this at exit."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting, FLUSH_SECONDS)

    def _line(self, record: logging.LogRecord) -> bytes:
        return (self.format(record) + "\n").encode("utf-8", "backslashreplace")

    def _write(self) -> None:
        torn = b""  # a line break, if the last line was written only in part
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._lines)
                lines, self._lines = self._lines, []
                size, missing = sum(map(len, lines)), self.dropped - self._reported
            if missing:
                report = {"name": __name__, "levelname": "WARNING", "msg": _DROPPED, "lines": missing}
                lines.append(self._line(logging.makeLogRecord(report)))
            lines[0] = torn + lines[0]
            data = b"".join(lines)
            try:
                while data:
                    data = data[os.write(self._descriptor, data) :]
                self._reported += missing
                torn = b""
            except OSError:  # The reader is gone, or the disk is full.
                left, lost = len(data), -bool(missing)  # The report is not a record.
                while left > 0:
                    left -= len(lines.pop())
                    lost += 1
                with self._changed:
                    self.dropped += lost
                if left or lines:  # If nothing was written, the line before is still torn.
                    torn = b"\n" if left else b""
            with self._changed:
                self._waiting -= size
                self._changed.notify_all()


def dropped() -> int:
    """Return the number of records that could not be written."""
    return sum(handler.dropped for handler in logging.getLogger().handlers if isinstance(handler, BackgroundHandler))


def configure(level: str, log_format: str, stream: TextIO | None = None) -> None:
    """Send all log records of `level` and above to `stream` (default: standard output).

    `log_format` is `json` or `text`. If it is empty, the format is `text` for a terminal, and `json` for any other stream.
    """
    stream = stream or sys.stdout
    try:
        handler: logging.Handler = BackgroundHandler(stream)
    except io.UnsupportedOperation:  # The stream has no file descriptor.
        handler = logging.StreamHandler(stream)
    text = log_format == "text" or (not log_format and stream.isatty())
    handler.setFormatter(TextFormatter() if text else JsonFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)
    # At debug level, asyncio would log its own steps among the requests.
    logging.getLogger("asyncio").setLevel(max(logging.INFO, logging.getLevelName(level.upper())))
