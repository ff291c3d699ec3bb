"""The errors that the chassis raises: for bad settings, a start that fails, and requests that cannot be answered."""

from collections.abc import Mapping


class ConfigError(Exception):
    """The settings are wrong. `problems` has one line for each problem, and no line contains a value."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


class StartError(Exception):
    """A service with valid settings cannot start; the text says what to do."""


class ProblemError(Exception):
    """A handler raises this error to answer the request with problem details (RFC 9457). Nothing is logged."""

    def __init__(self, status: int, detail: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.headers = headers


class UnavailableError(ProblemError):
    """The service cannot serve this request now: the answer is 503 with `Retry-After`."""

    def __init__(self, detail: str) -> None:
        super().__init__(503, detail, {"Retry-After": "1"})
