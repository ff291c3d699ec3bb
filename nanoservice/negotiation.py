"""Content negotiation by `Accept` (RFC 9110, section 12.5.1)."""

import re
from collections.abc import Sequence
from functools import lru_cache

from nanoservice.errors import ProblemError

_MAX_ACCEPT = 1000  # characters; browsers send about 150

# Possessive quantifiers (`++`) prevent backtracking, which would be quadratic in the number of blanks.
_RANGE = re.compile(r"\s*+([\w!#$&^.+*-]++)/([\w!#$&^.+*-]++)\s*+((?:;[^;,]*+)*+)", re.ASCII)
_QUALITY = re.compile(r";\s*q=(0(?:\.[0-9]{0,3})?|1(?:\.0{0,3})?)\s*(?:;|$)", re.ASCII | re.IGNORECASE)


@lru_cache(maxsize=256)
def preferred(accept: str, offered: tuple[str, ...]) -> str | None:
    """Return the media type of `offered` that the Accept header prefers, or None if it accepts none of them.

    Between equally preferred types, the order in the header decides, then the order in `offered`. An empty header accepts
    everything. Parts that cannot be parsed are ignored. Raises ProblemError 431 if the header is longer than 1,000 characters.
    """
    if len(accept) > _MAX_ACCEPT:
        raise ProblemError(431, f"Accept is longer than {_MAX_ACCEPT} characters")
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
    """Return the quality that the most specific matching range gives to `media`, and the negated position of that range."""
    kind, subtype = media.split("/")
    matches = [
        ((major != "*") + (minor != "*"), quality, -position)
        for major, minor, quality, position in ranges
        if (major, minor) in ((kind, subtype), (kind, "*"), ("*", "*"))
    ]
    return max(matches, default=(0, 0.0, 0))[1:]
