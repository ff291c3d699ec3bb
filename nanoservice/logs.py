"""Logs: one JSON object a line on standard output, readable text on a terminal."""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import TextIO

# What every record has; all else came through `extra=` and belongs into the line.
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def _extras(record: logging.LogRecord) -> dict[str, object]:
    return {key: value for key, value in vars(record).items() if key not in _STANDARD}


class JsonFormatter(logging.Formatter):
    """Format a record as one line of JSON: time (UTC), level, logger, message, what `extra=` gave, exception."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, without its end."""
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
    """Format a record for a person: time, level, message, what `extra=` gave as key=value."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the standard library's name
        """Return the first line of the record."""
        return " ".join([super().formatMessage(record), *(f"{k}={v!r}" for k, v in _extras(record).items())])


def configure(level: str, form: str, stream: TextIO | None = None) -> None:
    """Send all logging to `stream` (default: standard output) from `level` on; `form` is json, text, or empty: by terminal."""
    stream = stream or sys.stdout
    handler = logging.StreamHandler(stream)
    handler.setFormatter(TextFormatter() if (form or ("text" if stream.isatty() else "json")) == "text" else JsonFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)
    # At debug the event loop logs each of its own steps; ours are the ones that were asked for.
    logging.getLogger("asyncio").setLevel(max(logging.INFO, logging.getLevelName(level.upper())))
