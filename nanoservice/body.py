"""Read the JSON body of a request into a dataclass, or refuse the request with problem details that name the field."""

import codecs
from collections.abc import Awaitable, Callable
from typing import TypeVar

import msgspec
from aiohttp import hdrs, web

from nanoservice.direct import MAX_BODY
from nanoservice.errors import ProblemError

T = TypeVar("T")

_MAX_DETAIL = 300  # characters; a message about an unknown value of an enumeration quotes this value


def json_body(kind: type[T]) -> Callable[[web.Request], Awaitable[T]]:
    """Return a function that reads the body of a request into `kind`: a dataclass, or another type that msgspec supports.

    Call this once, in `setup`: it raises TypeError for a type that msgspec does not support. The function that it returns raises
    ProblemError: 415 if the body is not `application/json` in UTF-8, 413 if it is longer than 1 MiB, 400 if it is not JSON, and
    422 if a field is missing or has a wrong value. For a check of its own, a dataclass raises ValueError in `__post_init__`: the
    client gets 422 with the text of this error. Unknown fields are ignored, unless `kind` is a `msgspec.Struct` with
    `forbid_unknown_fields`.
    """
    decoder = msgspec.json.Decoder(kind)

    async def read(request: web.Request) -> T:
        media_type = request.content_type
        if media_type != "application/json" and not (media_type.startswith("application/") and media_type.endswith("+json")):
            raise ProblemError(415, "the Content-Type of the body must be application/json")
        if (request.charset or "utf-8").lower() not in ("utf-8", "utf8"):
            raise ProblemError(415, "the charset of the body must be utf-8")
        if request.headers.get(hdrs.CONTENT_ENCODING, "identity").lower() != "identity":
            raise ProblemError(415, "the body must not be compressed")
        try:
            if (size := request.content_length or 0) > MAX_BODY:
                raise web.HTTPRequestEntityTooLarge(MAX_BODY, size)
            return decoder.decode((await request.read()).removeprefix(codecs.BOM_UTF8))
        except web.HTTPRequestEntityTooLarge:
            raise ProblemError(413, f"a body has at most {MAX_BODY} bytes") from None
        except msgspec.ValidationError as error:
            raise ProblemError(422, f"the body is not valid: {error}"[:_MAX_DETAIL]) from None
        except (msgspec.DecodeError, RecursionError, ValueError) as error:
            raise ProblemError(400, f"the body is not JSON: {error}"[:_MAX_DETAIL]) from None

    return read
