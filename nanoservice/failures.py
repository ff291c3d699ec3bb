"""Log the failures of handlers with their tracebacks, but not so often that clients can fill the log."""

import logging
import time
from collections.abc import Iterator
from types import CodeType

from nanoservice.trace import Trace

_LOGGED = 3  # The same traceback is logged this number of times in each period.
_PERIOD = 60.0  # seconds
_MAX_KINDS = 64  # The number of different tracebacks that are counted separately in a period. All others count as one.

_Kind = tuple[str, ...]  # the type of the error, and the file and line of each frame


class FailureLog:
    """Logs failures. It logs the same traceback only a few times a minute, and then how many failures it has left out."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._period_ends = 0.0
        self._seen: dict[_Kind, int] = {}

    def log(self, error: BaseException, trace: Trace) -> None:
        """Log that the handler of the request `trace` failed with `error`."""
        self.flush()
        kind: _Kind = type(error).__qualname__, *(f"{code.co_filename}:{line}" for code, line in frames(error))
        if kind not in self._seen and len(self._seen) >= _MAX_KINDS:
            kind = ("other errors",)
        seen = self._seen[kind] = self._seen.get(kind, 0) + 1
        if seen <= _LOGGED:
            self._logger.error("a handler failed", exc_info=error, extra=trace.fields())

    def flush(self) -> None:
        """If the period has ended, log how many failures of each kind were left out. Call this about once a second."""
        if (now := time.monotonic()) >= self._period_ends:
            for (error, *places), seen in self._seen.items():
                if seen > _LOGGED:
                    omitted = {"error": error, "place": places[-1] if places else "", "omitted": seen - _LOGGED}
                    self._logger.error("a handler failed more often than logged", extra=omitted)
            self._seen.clear()
            self._period_ends = now + _PERIOD


def frames(error: BaseException) -> Iterator[tuple[CodeType, int]]:
    """Yield the code and the line number of each frame in the traceback of `error`, the innermost frame last."""
    traceback = error.__traceback__
    while traceback:
        yield traceback.tb_frame.f_code, traceback.tb_lineno
        traceback = traceback.tb_next
