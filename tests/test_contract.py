"""What the service answers on each path, method and media type."""

from conftest import Served


async def test_each_hit_is_counted_and_told(served: Served) -> None:
    for number in (1, 2, 3):
        async with served.client.get("/") as answer:
            assert await answer.text() == f"Hello from Redis! I have been seen {number} times.\nPOST requests served: 0.\n"
            assert answer.status == 200
            assert answer.headers["Cache-Control"] == "no-store"
            assert answer.content_type == "text/plain"
