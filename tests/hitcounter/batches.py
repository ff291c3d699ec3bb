"""Recognise the counter's batches among the requests that the proxy passes on to Redis, and read a batch's lane and number."""

from nanoservice.testing.proxy import Request


def is_batch(request: Request) -> bool:
    """Return whether the request calls the script."""
    return request.words[0].upper() == b"EVALSHA"


def writer(batch: Request) -> bytes:
    """Return the key of the lane that sent the batch."""
    return batch.words[5]


def sequence(batch: Request) -> int:
    """Return the sequence number that the lane gave the batch."""
    return int(batch.words[8])


def is_newer(kept: Request, request: Request) -> bool:
    """Return whether `request` is a newer batch of the lane that sent the batch `kept`."""
    return is_batch(request) and writer(request) == writer(kept) and sequence(request) > sequence(kept)
