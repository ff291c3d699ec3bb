"""Content negotiation by `Accept` (RFC 9110, section 12.5.1)."""

import re
from collections.abc import Sequence
from functools import lru_cache

from nanoservice.answer import ProblemError

_LONGEST = 1000  # characters; browsers send about 150

# What has been matched is not tried again (`++`): else many blanks would take the square of their number.
_RANGE = re.compile(r"\s*+([\w!#$&^.+*-]++)/([\w!#$&^.+*-]++)\s*+((?:;[^;,]*+)*+)", re.ASCII)
_QUALITY = re.compile(r";\s*q=(0(?:\.[0-9]{0,3})?|1(?:\.0{0,3})?)\s*(?:;|$)", re.ASCII | re.IGNORECASE)


@lru_cache(maxsize=256)
def preferred(accept: str, offered: tuple[str, ...]) -> str | None:
    """Return which of the `offered` media types an Accept header wants most, None if it takes none of them.

    Between equals, what the header names first counts, then what is offered first. An empty header takes anything; what
    cannot be parsed in it is passed over. Raises ProblemError 431 if it is too long to be worth it.
    """
    if len(accept) > _LONGEST:
        raise ProblemError(431, f"Accept is longer than {_LONGEST} characters")
    ranges = []
    for position, part in enumerate(accept.lower().split(",")):
        if found := _RANGE.fullmatch(part):
            quality = _QUALITY.search(found[3])
            ranges.append((found[1], found[2], float(quality[1]) if quality else 1.0, position))
    if not ranges:
        return offered[0]
    ranked = [(*_rank(media, ranges), -index, media) for index, media in enumerate(offered)]
    best = max(ranked)
    return best[-1] if best[0] > 0 else None


def _rank(media: str, ranges: Sequence[tuple[str, str, float, int]]) -> tuple[float, int]:
    """Return the quality of `media` by the most specific range that fits it, and minus that range's position."""
    kind, form = media.split("/")
    fits = [
        ((major != "*") + (minor != "*"), quality, -position)
        for major, minor, quality, position in ranges
        if (major, minor) in ((kind, form), (kind, "*"), ("*", "*"))
    ]
    return max(fits, default=(0, 0.0, 0))[1:]
