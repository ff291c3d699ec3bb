"""Logs: one JSON object per line on standard output, or readable text on a terminal."""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import TextIO

# Every record has these attributes. All other attributes were passed as `extra=`, and the line shows them.
_RECORD_ATTRIBUTES = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def _extras(record: logging.LogRecord) -> dict[str, object]:
    return {key: value for key, value in vars(record).items() if key not in _RECORD_ATTRIBUTES}


class JsonFormatter(logging.Formatter):
    """Format a record as one line of JSON: time (UTC), level, logger, message, the fields of `extra=`, exception."""

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
    """Format a record for a person: time, level, message, the fields of `extra=` as key=value."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the standard library's name
        """Return the first line of the record."""
        return " ".join([super().formatMessage(record), *(f"{k}={v!r}" for k, v in _extras(record).items())])


def configure(level: str, log_format: str, stream: TextIO | None = None) -> None:
    """Send all log records of `level` and above to `stream` (default: standard output).

    `log_format` is `json` or `text`. If it is empty, the format is `text` for a terminal, and `json` for any other stream.
    """
    stream = stream or sys.stdout
    handler = logging.StreamHandler(stream)
    text = log_format == "text" or (not log_format and stream.isatty())
    handler.setFormatter(TextFormatter() if text else JsonFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)
    # At debug level, asyncio would log its own steps among the requests.
    logging.getLogger("asyncio").setLevel(max(logging.INFO, logging.getLevelName(level.upper())))
