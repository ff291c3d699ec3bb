"""Measure what it costs to wait for a replica: the service with REDIS_REPLICAS=0 and 1, in turn, round after round.

All servers run on this machine, so the figures include the work of the replicas. Run `python -m bench.replicas`.
"""

import asyncio
import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median, quantiles

from bench.load import Load
from nanoservice.testing.valkey import Valkey, free_port
from nanoservice.testing.waiting import SLACK, wait_for

ROOT = Path(__file__).resolve().parent.parent
CONNECTIONS = 64
ROUNDS = 7
SECONDS, WARM_SECONDS = 3.0, 1.0
RATE = 1000.0  # requests a second, when the latency is measured


@contextlib.contextmanager
def service(store: Valkey, replicas: int, folder: Path) -> Iterator[tuple[int, Callable[[], float]]]:
    """Run the service. Yield its port and a function that returns the seconds of CPU time that it has used."""
    port = free_port()
    environ = store.environ(BIND_PORT=str(port), BIND_HOST="127.0.0.1", REDIS_REPLICAS=str(replicas), PYTHONPATH=str(ROOT))
    with (folder / f"service-{replicas}.log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-m", "hitcounter"], env=environ, stdout=log, stderr=log)

    def cpu() -> float:
        ticks = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")

    try:
        wait_for(lambda: b"listening" in Path(log.name).read_bytes(), 20 * SLACK)
        yield port, cpu
    finally:
        process.terminate()
        process.wait(20)


async def closed(port: int, cpu: Callable[[], float]) -> tuple[float, float]:
    """Return the microseconds of CPU time that a request costs the service, and the requests a second."""
    load = Load(port, CONNECTIONS)
    await load.closed(SECONDS, WARM_SECONDS, cpu)
    assert not load.failed, load.errors
    assert not load.duplicates
    return (load.marks[1] - load.marks[0]) / load.answered * 1e6, load.answered / load.seconds


async def latencies(port: int) -> list[float]:
    """Return the latencies of requests, in milliseconds."""
    load = Load(port, CONNECTIONS)
    await load.open(SECONDS, RATE)
    assert not load.failed, load.errors
    return [seconds * 1000 for seconds in load.latencies]


def main() -> None:
    """Measure, and print the medians."""
    data = ROOT / ".data"
    data.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-", dir=data) as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        servers: list[Valkey] = []
        for number in range(3):
            (folder / str(number)).mkdir()
            replica_of = ("--replicaof", f"127.0.0.1 {servers[0].port}", "--repl-diskless-sync-delay", "0") if servers else ()
            server = Valkey(folder / str(number), "--appendfsync", "always", *replica_of)
            stack.callback(server.kill)
            server.start()
            servers.append(server)
        primary = servers[0]
        wait_for(lambda: primary.run("WAIT", 2, 100) == 2, 20 * SLACK)
        ports = {count: stack.enter_context(service(primary, count, folder)) for count in (0, 1)}
        costs: dict[int, list[float]] = {0: [], 1: []}
        rates: dict[int, list[float]] = {0: [], 1: []}
        waits: dict[int, list[float]] = {0: [], 1: []}
        for _ in range(ROUNDS):
            for count, (port, cpu) in ports.items():
                cost, rate = asyncio.run(closed(port, cpu))
                costs[count].append(cost)
                rates[count].append(rate)
                waits[count] += asyncio.run(latencies(port))
        print(f"{CONNECTIONS} connections, {ROUNDS} rounds; latencies at {RATE:.0f} requests a second")
        for count in (0, 1):
            cuts = quantiles(waits[count], n=100)
            print(
                f"REDIS_REPLICAS={count}: {median(costs[count]):.1f} µs of CPU time for each request, "
                f"{median(rates[count]):,.0f} requests/s, p50 {cuts[49]:.2f} ms, p99 {cuts[98]:.2f} ms"
            )
        ratios = [one / none for none, one in zip(costs[0], costs[1], strict=True)]
        print(f"CPU time for each request, 1 against 0: median {median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}")


if __name__ == "__main__":
    main()
