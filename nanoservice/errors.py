"""The errors that the chassis raises: for bad settings, a start that fails, and requests that cannot be answered."""

import re
from collections.abc import Mapping
from http import HTTPStatus

_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")  # Latin-1 without control characters

# The server writes these headers itself. A handler's headers of these names are refused: replacing the server's needs more code.
_WRITTEN = "connection", "content-length", "date", "transfer-encoding"


class Lines(bytes):
    """Header lines that `header_lines` has checked."""


def header_lines(headers: Mapping[str, str]) -> Lines:
    """Return `headers` as header lines. Raises ValueError for an invalid name or value, such as a value with a line break.

    Headers that the server writes itself are refused, too.
    """
    for name, value in headers.items():
        check_name(name)
        if not _NAME.fullmatch(name) or not _VALUE.fullmatch(value):
            raise ValueError(f"the header {name!r} has an invalid name or value")
    return Lines("".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode("latin-1"))


def check_name(name: str) -> None:
    """Raise ValueError if the server writes the header `name` itself, because clients would get this header twice."""
    if name.lower() in _WRITTEN:
        raise ValueError(f"the server writes the header {name!r} itself: do not set it; force_close() closes the connection")


class ConfigError(Exception):
    """The settings are wrong. `problems` has one line for each problem, and no line contains a value."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


class SecretFileError(Exception):
    """The file of a secret cannot be used any more. The text names the file, but quotes nothing in it."""


class StartError(Exception):
    """A service with valid settings cannot start; the text says what to do."""


class ProblemError(Exception):
    """A handler raises this error to answer the request with problem details (RFC 9457). Nothing is logged.

    The constructor raises ValueError if `status` is not a status of an error, or if `headers` cannot be sent.
    """

    def __init__(self, status: int, detail: str, headers: Mapping[str, str] | None = None) -> None:
        if HTTPStatus(status) < 400:
            raise ValueError(f"{status} is not the status of an error")
        header_lines(headers or {})
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.headers = headers


class UnavailableError(ProblemError):
    """The service cannot serve this request now: the answer is 503 with `Retry-After`."""

    def __init__(self, detail: str) -> None:
        super().__init__(503, detail, {"Retry-After": "1"})
