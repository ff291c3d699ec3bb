"""Refuse commands that would block a connection of the pool for longer than a reply of Redis may take.

Such a command would look like an outage of Redis: no reply arrives within `REDIS_TIMEOUT`.
"""

import itertools
from typing import Any

# Maps a command that blocks to the position of its time limit, and to the number of the limit's units in a second.
_BLOCKING = {
    **dict.fromkeys(("BLMOVE", "BLPOP", "BRPOP", "BRPOPLPUSH", "BZPOPMAX", "BZPOPMIN"), (-1, 1)),
    **dict.fromkeys(("BLMPOP", "BZMPOP"), (1, 1)),
    "WAIT": (2, 1000),
    "WAITAOF": (3, 1000),
}
_OPTIONS = {"XREAD": 1, "XREADGROUP": 4}  # Maps a command with an option BLOCK, in milliseconds, to its first option's position.
_ENDLESS = "MONITOR", "PSUBSCRIBE", "SSUBSCRIBE", "SUBSCRIBE"


def check(command: tuple[Any, ...], most: float) -> None:
    """Raise ValueError if `command`, a name and its arguments, may block its connection for more than `most` seconds."""
    name = str(command[0]).upper()
    if name in _ENDLESS:
        raise _error(name)
    position, units = _BLOCKING.get(name, (0, 1))
    if name in _OPTIONS:
        options = itertools.takewhile(lambda word: word != "STREAMS", map(_upper, command))
        position, units = next((at + 1 for at, word in enumerate(options) if word == "BLOCK" and at >= _OPTIONS[name]), 0), 1000
    if position and not 0 < float(command[position]) / units <= most:
        raise _error(name, f"give it a timeout from 0.001 to {most:g} s (half of REDIS_TIMEOUT), or ")


def _upper(word: Any) -> str:
    return (word.decode(errors="replace") if isinstance(word, bytes) else str(word)).upper()


def _error(name: str, shorter: str = "") -> ValueError:
    return ValueError(
        f"{name} would block a connection that requests share: {shorter}send it in a background task, over a connection of its "
        "own (app[STORE].connection()); see docs/development.md"
    )
