"""Time limits of a route that differ from those of all other routes."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

H = TypeVar("H", bound=Callable[..., Any])


class TimeLimits(NamedTuple):
    """Time limits in seconds. None stands for the limit of all other routes."""

    receive: float | None = None
    handle: float | None = None


def time_limits(*, receive: float | None = None, handle: float | None = None) -> Callable[[H], H]:
    """Return a decorator for a handler that needs more or less time than other handlers.

    The handler is a function or a method of a `web.View`. A direct route (`direct.add`) cannot have time limits of its own.
    A request must be complete `receive` seconds after its first byte (for others: 10), or it gets 408. The handler must begin its
    answer `handle` seconds after that (for others: 10), or it is cancelled, and the request gets 504. In any case,
    a shutdown waits for at most 10 s.
    """
    if any(limit is not None and limit <= 0 for limit in (receive, handle)):
        raise ValueError("a time limit is a positive number of seconds")

    def decorate(handler: H) -> H:
        handler.time_limits = TimeLimits(receive, handle)  # type: ignore[attr-defined] # functions have any attribute
        return handler

    return decorate
